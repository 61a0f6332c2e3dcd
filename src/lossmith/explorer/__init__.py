"""A window into a loss: a page on this machine that shows what a loss says, weighs and does. `view` has its numbers."""

from lossmith.explorer.export import export_view
from lossmith.explorer.server import serve
from lossmith.explorer.shown import view
from lossmith.explorer.state import State, read_state

__all__ = ["State", "export_view", "read_state", "serve", "view"]
