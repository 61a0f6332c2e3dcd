"""One page about one run or several, for somebody who was not there: a file that opens anywhere, without a network."""

from lossmith.report.page.document import write_report

__all__ = ["write_report"]
