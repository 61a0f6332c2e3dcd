"""What people look at before they choose a loss: losses side by side, and the curve of a weight."""

from lossmith.report.loss.comparison import RATIOS, Comparison, changes_of_preset, compare
from lossmith.report.loss.curve import ratio_grid, stopped_regions, weight_plot

__all__ = ["RATIOS", "Comparison", "changes_of_preset", "compare", "ratio_grid", "stopped_regions", "weight_plot"]
