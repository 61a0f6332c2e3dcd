"""An audit in sentences, as a page, and as a row of the table of all losses."""

from lossmith.report.audit.page import html_page
from lossmith.report.audit.sentences import Line, Section, sections

__all__ = ["Line", "Section", "html_page", "sections"]
