"""The curve of a weight as an SVG: w(r, A) over the ratio, for good and bad actions, stopped regions marked."""

from __future__ import annotations

import math
from collections.abc import Callable
from xml.sax.saxutils import escape

import torch

from lossmith.errors import LossError
from lossmith.losses import Loss

__all__ = ["ratio_grid", "stopped_regions", "weight_plot"]

LOW, HIGH, POINTS = 0.1, 10.0, 481
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 440, 64, 64, 24, 96
BLUE, ORANGE, INK, PALE = "#1f5fa8", "#c2570c", "#222222", "#d9d9d9"
Curve = Callable[[float], float]


def weight_plot(loss: Loss) -> str:
    """A self-contained SVG. LossError: the loss has no weight per token."""
    try:
        loss.weight(1.0, 1.0)
    except NotImplementedError as error:
        raise LossError(f"there is nothing to plot: {error}") from None
    signs = (("A > 0", 1.0, BLUE), ("A < 0", -1.0, ORANGE))
    curves = {label: _curve(loss, sign) for label, sign, _ in signs}
    top = max(1.0, *(min(curve(r), 3.0) for curve in curves.values() for r in ratio_grid())) * 1.08
    parts = [_frame(loss.name, str(loss).split("\n")[0]), _axes(top)]
    for i, (label, _, color) in enumerate(signs):
        curve = curves[label]
        parts += [_strip(start, end, i, color, label) for start, end in stopped_regions(curve)]
        parts.append(_line(curve, top, color, dashed=i == 1))
        parts.append(_key(i, label, color))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _curve(loss: Loss, sign: float) -> Curve:
    return lambda r: float(loss.weight(torch.tensor(r, dtype=torch.float64), sign))


def ratio_grid() -> list[float]:
    """The ratios at which curves are drawn and stopped regions are looked for."""
    return [LOW * (HIGH / LOW) ** (i / (POINTS - 1)) for i in range(POINTS)]


def stopped_regions(curve: Curve) -> list[tuple[float, float]]:
    """Ratios within the plot at which the weight is 0, their ends found by bisection."""
    grid, regions, start = ratio_grid(), [], None
    zero = [curve(r) == 0 for r in grid]
    for i, (r, stopped) in enumerate(zip(grid, zero, strict=True)):
        if stopped and start is None:
            start = r if i == 0 else _edge(curve, grid[i - 1], r)
        if not stopped and start is not None:
            regions.append((start, _edge(curve, grid[i - 1], r)))
            start = None
    return [*regions, (start, HIGH)] if start is not None else regions


def _edge(curve: Curve, a: float, b: float) -> float:
    """Where the weight becomes 0, or ceases to be, between a and b."""
    at_a = curve(a) == 0
    for _ in range(50):
        middle = math.sqrt(a * b)
        a, b = (middle, b) if (curve(middle) == 0) == at_a else (a, middle)
    return b


# -- drawing ----------------------------------------------------------------------------------------------------------


def _x(r: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * math.log(r / LOW) / math.log(HIGH / LOW)


def _y(w: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * w / top


def _text(x: float, y: float, words: str, *, size: int = 13, anchor: str = "middle", color: str = INK) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}"'
    return f"<text {where}>{escape(words)}</text>"


def _frame(name: str, formula: str) -> str:
    size = 13 if len(formula) < 88 else 11 if len(formula) < 105 else 9
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
            ' font-family="system-ui, sans-serif" role="img">',
            f"<title>{escape(f'weight of {name}')}</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            _text(LEFT, 24, name, size=16, anchor="start"),
            _text(LEFT, 46, formula if len(formula) < 130 else formula[:128] + "…", size=size, anchor="start"),
        ]
    )


def _axes(top: float) -> str:
    base, parts = HEIGHT - BOTTOM, []
    for r in (0.1, 0.2, 0.5, 1, 2, 5, 10):
        color = "#888888" if r == 1 else PALE
        parts.append(f'<line x1="{_x(r):.1f}" x2="{_x(r):.1f}" y1="{TOP}" y2="{base}" stroke="{color}"/>')
        parts.append(_text(_x(r), base + 18, f"{r:g}"))
    step = 0.25 if top < 1.3 else 0.5
    for i in range(int(top / step) + 1):
        color = "#888888" if i * step == 1 else PALE
        y = _y(i * step, top)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{i * step:g}", anchor="end"))
    middle = (TOP + base) / 2
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "ratio r (log scale); bars: no gradient"))
    parts.append(f'<g transform="rotate(-90 18 {middle})">{_text(18, middle, "weight w(r, A)")}</g>')
    return "\n".join(parts)


def _strip(start: float, end: float, place: int, color: str, label: str) -> str:
    """A bar below the axis, and a light shade above it, where the weight is 0."""
    base, x, width = HEIGHT - BOTTOM, _x(start), _x(end) - _x(start)
    data = f'data-sign="{escape(label)}" data-from="{start:.12g}" data-to="{end:.12g}"'
    return "\n".join(
        [
            f'<rect class="stopped" {data} x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{base - TOP}"'
            f' fill="{color}" fill-opacity="0.07"/>',
            f'<rect x="{x:.1f}" y="{base + 28 + 12 * place}" width="{width:.1f}" height="8" fill="{color}"/>',
        ]
    )


def _line(curve: Curve, top: float, color: str, *, dashed: bool) -> str:
    """The curve, broken where it jumps and cut at the top of the plot."""
    pieces: list[list[str]] = [[]]
    before: float | None = None
    for r in ratio_grid():
        w = curve(r)
        jump = before is not None and (w == 0) != (before == 0) and abs(w - before) > 0.02 * top
        if jump:
            pieces.append([])
        if w <= top:
            pieces[-1].append(f"{_x(r):.2f},{_y(w, top):.2f}")
        elif pieces[-1]:
            pieces.append([])
        before = w
    dash = ' stroke-dasharray="7 4"' if dashed else ""
    style = f'fill="none" stroke="{color}" stroke-width="2.5"{dash}'
    return "\n".join(f'<polyline class="weight" points="{" ".join(p)}" {style}/>' for p in pieces if p)


def _key(place: int, label: str, color: str) -> str:
    x, y = WIDTH - RIGHT - 150 + 78 * place, 20
    dash = ' stroke-dasharray="7 4"' if place else ""
    line = f'<line x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2.5"{dash}/>'
    return line + _text(x + 30, y + 4, label, anchor="start", color=color)
