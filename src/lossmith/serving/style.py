"""The house style of every page: colors in the light and in the dark, type, buttons, what has the focus."""

from pathlib import Path

__all__ = ["HOUSE_STYLE"]

HOUSE_STYLE = Path(__file__).parent / "static" / "house.css"
