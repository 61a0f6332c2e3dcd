"""Judgements from and for other programs: what they wrote is read, and what was judged here is written for them."""

from lossmith.feedback.exchange.importing import import_file
from lossmith.feedback.exchange.write import export_file

__all__ = ["export_file", "import_file"]
