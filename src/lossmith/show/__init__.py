"""What people look at before they choose a loss: losses side by side, and the curve of a weight."""

from lossmith.show.compare import RATIOS, Comparison, changes_of_preset, compare
from lossmith.show.plot import weight_plot

__all__ = ["RATIOS", "Comparison", "changes_of_preset", "compare", "weight_plot"]
