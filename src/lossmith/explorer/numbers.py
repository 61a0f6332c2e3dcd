"""How the page prints a number: in one place, and on this side, so that what is read there is what was computed."""

from __future__ import annotations

import math

__all__ = ["printed"]


def printed(x: float) -> str:
    """Four significant digits, with a real minus sign; a rounding error below 1e-12 is 0."""
    x = float(x)
    if math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    return f"{0.0 if abs(x) < 1e-12 else x:.4g}".replace("-", "−")
