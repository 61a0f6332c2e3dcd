"""Drawings as SVG that stands in the page: colors come from its style, by class; numbers to be read lie beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

__all__ = ["Line", "chart", "figure", "signed"]

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 480, 290, 52, 18, 14, 46
STRIP = 11  # height of a bar below the axis
DASHES = ("", "7 4", "2 3", "10 3 2 3")


def figure(x: float | None, digits: int = 4) -> str:
    """A number as the page prints it: so many significant digits, a minus sign of full width."""
    if x is None:
        return "–"
    if math.isnan(x):
        return "not defined"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if abs(x) < 1e-12:  # what is left of numbers that cancel
        return "0"
    text = f"{x:.{digits}g}"
    if "e" in text and 1e-6 < abs(x) < 1e7:
        text = f"{float(text):.12f}".rstrip("0").rstrip(".")
    return text.replace("-", "−")


def signed(x: float | None, digits: int = 4) -> str:
    """With a plus where it is above 0."""
    return f"+{figure(x, digits)}" if x is not None and x > 0 else figure(x, digits)


@dataclass(frozen=True)
class Line:
    """A curve; place: of the loss, which decides color and dashes. bars: stretches of x to be marked."""

    place: int
    name: str
    points: Sequence[tuple[float, float]]
    bars: Sequence[tuple[float, float]] = field(default_factory=tuple)
    dots: bool = False


def chart(
    key: str, lines: Sequence[Line], x: str, y: str, *, log: bool = False, ticks: Sequence[float] = (),
    top: float | None = None, at: float | None = None, said: str = "",
) -> Markup:  # fmt: skip
    """A drawing with its readings. at: an x that is marked. said: what it shows, for whoever does not see it."""
    xs = [a for line in lines for a, _ in line.points]
    ys = [b for line in lines for _, b in line.points if math.isfinite(b)]
    x_low, x_high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    x_high = x_high if x_high > x_low else x_low + 1
    y_low, y_high = min([0.0, *ys]), max([*ys, 0.0]) if top is None else top
    y_high = y_high if y_high > y_low else y_low + 1
    bars = sum(bool(line.bars) for line in lines)
    height = HEIGHT + STRIP * bars
    base = HEIGHT - BOTTOM

    def px(a: float) -> float:
        share = math.log(a / x_low) / math.log(x_high / x_low) if log else (a - x_low) / (x_high - x_low)
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def py(b: float) -> float:
        return base - (base - TOP) * (b - y_low) / (y_high - y_low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" class="chart" role="img" tabindex="0" aria-label="{escape(said)}">']
    for a in ticks or _ticks(x_low, x_high):
        if x_low <= a <= x_high:
            parts.append(f'<line class="grid" x1="{px(a):.1f}" x2="{px(a):.1f}" y1="{TOP}" y2="{base}"/>')
            parts.append(f'<text x="{px(a):.1f}" y="{base + 16}" text-anchor="middle">{figure(a)}</text>')
    for b in _ticks(y_low, y_high):
        kind = "grid zero" if b == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(b):.1f}" y2="{py(b):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{py(b) + 4:.1f}" text-anchor="end">{figure(b)}</text>')
    row = 0
    for line in lines:
        for start, end in line.bars:
            here = f'x="{px(start):.1f}" width="{max(px(end) - px(start), 1):.1f}"'
            parts.append(f'<rect class="c{line.place} shade" {here} y="{TOP}" height="{base - TOP}"/>')
            parts.append(f'<rect class="c{line.place} bar" {here} y="{base + 23 + STRIP * row}" height="7"/>')
        row += bool(line.bars)
    for line in lines:
        parts += _curve(line, px, py, y_high)
    if at is not None and x_low <= at <= x_high:
        parts.append(f'<line class="at" x1="{px(at):.1f}" x2="{px(at):.1f}" y1="{TOP}" y2="{base}"/>')
    parts.append(f'<line class="hover" x1="-9" x2="-9" y1="{TOP}" y2="{base}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 6}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text x="4" y="{TOP - 5}">{escape(y)}</text>')
    parts.append("</svg>")
    drawing = "".join(parts)
    return Markup(
        f'<div class="drawing" data-chart="{escape(key)}" data-left="{LEFT / WIDTH}" '
        f'data-right="{1 - RIGHT / WIDTH}" data-log="{int(log)}">{drawing}'
        f'<script type="application/json">{_readings(lines, px)}</script>'
        '<p class="reading" aria-live="polite" hidden></p></div>'
    )


def _curve(line: Line, px, py, top: float) -> list[str]:  # type: ignore[no-untyped-def]
    """Broken where it leaves the drawing, and where it jumps to 0 or from it."""
    pieces: list[list[tuple[float, float]]] = [[]]
    before = None
    for a, b in line.points:
        jump = line.bars and before is not None and (b == 0) != (before == 0) and abs(b - before) > 0.02 * top
        if jump or not math.isfinite(b) or b > top:
            pieces.append([])
        if math.isfinite(b) and b <= top:
            pieces[-1].append((px(a), py(b)))
        before = b
    dash = f' stroke-dasharray="{DASHES[line.place % 4]}"' if DASHES[line.place % 4] else ""
    found = [
        f'<polyline class="c{line.place} curve"{dash} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in piece)}"/>'
        for piece in pieces
        if piece
    ]
    if line.dots and line.points:
        a, b = line.points[-1]
        if math.isfinite(b):
            found.append(f'<circle class="c{line.place} dot" cx="{px(a):.1f}" cy="{py(b):.1f}" r="4.5"/>')
    return found


def _readings(lines: Sequence[Line], px) -> str:  # type: ignore[no-untyped-def]
    """What stands where: [[x of the drawing, x as text, [[place, name, value as text], ...]], ...]."""
    found: dict[float, list] = {}
    for line in lines:
        for a, b in line.points:
            found.setdefault(a, []).append([line.place, line.name, figure(b)])
    rows = [[round(px(a) / WIDTH, 4), figure(a), values] for a, values in sorted(found.items())]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, five or so."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
