"""A window into the losses: a local page on which one is looked at, turned, tried, and held against the truth.

Every number is computed here, with the library; the browser draws.
"""

from lossmith.explorer.app import export_view, make_app, serve

__all__ = ["export_view", "make_app", "serve"]
