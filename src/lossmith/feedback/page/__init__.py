"""The annotation page: a local server on which people judge output sets."""

from lossmith.feedback.page.accounts import add_account
from lossmith.feedback.page.app import DEFAULT_CRITERIA, make_app
from lossmith.feedback.page.server import serve

__all__ = ["DEFAULT_CRITERIA", "add_account", "make_app", "serve"]
