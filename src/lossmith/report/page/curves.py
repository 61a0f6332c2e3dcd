"""Curves as SVG that stands in the page: its text and lines take the page's colors, light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lossmith.report.page.family import Family
from lossmith.training.metrics import METRICS

__all__ = ["COLORS", "Chart", "charts", "dash"]

# Each has a contrast of 3 or more on the page's white and on its black.
COLORS = ("#2f7fc1", "#cf6124", "#3d8f45", "#9a68c8", "#a37f14", "#c24d78", "#7d7d7d")
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
_INK, _LINE = "#010203", "#010204"  # replaced by the page's own

_CURVES = (
    ("reward", "Reward", "Mean score of each step's completions, which is what the policy is trained on"),
    ("held_out", "Held-out score", "Mean score of the held-out prompts before each of these steps, and at the end"),
    ("watch", "Watched score", "What the scorer says that nothing is trained on"),
    ("kl", "KL", "How far the policy is from the reference"),
    ("entropy", "Entropy", "How undecided the policy is; near 0 it always writes the same"),
    ("length", "Length", "Mean length of the completions"),
    ("ended", "Ended in time", "Share of the completions that ended within the token budget"),
    (
        "frac_reward_zero_std",
        "Groups without signal",
        "Prompts whose completions all had one score: they teach nothing",
    ),
    ("grad_norm", "Gradient", "Its length before it is scaled down to max_grad_norm"),
    ("clip_fraction", "Clipped", "Share of the tokens that the trust region cuts off"),
    ("sampler_gap", "Sampler gap", "How far the learner's log-probabilities are from those that were sampled with"),
    ("loss", "Loss", "About 0 for a policy gradient at ratio 1: not the performance"),
)
_PREFERRING = (
    ("accuracy", "Accuracy", "Share of the step's pairs whose better side has the greater score"),
    ("margin", "Margin", "Mean score of the better side minus that of the worse"),
    ("chosen_log_ratio", "Better sides", "How much likelier the better texts are than under the reference"),
    ("rejected_log_ratio", "Worse sides", "How much likelier the worse texts are than under the reference"),
    ("kl", "KL", "How far the policy is from the reference"),
    ("grad_norm", "Gradient", "Its length before it is scaled down to max_grad_norm"),
    ("loss", "Loss", "Mean over the pairs, completions or groups of the step"),
)
_UNITS = {"of the scorer": "score", "of that scorer": "score", "0 to 1": "share"}


@dataclass(frozen=True)
class Chart:
    """svg: to be put into the page as it stands. told: the figures in words, for whoever does not see it."""

    title: str
    what: str
    svg: str
    told: str


def dash(family: Family) -> str:
    """The stroke-dasharray of a family's lines; color alone is not for everybody."""
    return _DASHES[family.index % len(_DASHES)]


def charts(families: Sequence[Family]) -> tuple[list[Chart], list[str]]:
    """(the curves that some run has, the titles of those that none has)."""
    made, absent = [], []
    preferring = [f.runs[0].prefers for f in families]
    known = {c[0]: c for c in (*(_PREFERRING if any(preferring) else ()), *(() if all(preferring) else _CURVES))}
    for key, title, what in known.values():
        have = [f for f in families if f.band(key)]
        if have:
            unit = _unit(key)
            svg = _draw(key, partial(_over_steps, families=have, key=key), "step", unit)
            made.append(Chart(title, what, svg, _told(have, key)))
        else:
            absent.append(title)
    for key, title in (("reward", "Reward against √KL"), ("watch", "Watched score against √KL")):
        have = [f for f in families if _against(f, key)]
        if have:
            svg = _draw(
                f"distance-{key}",
                partial(_over_distance, families=have, key=key),
                "√KL, √nats a completion",
                _unit(key),
            )
            made.append(
                Chart(
                    title, "What was won for the distance from the reference; the large dot is the last step", svg, ""
                )
            )
    return made, absent


def _unit(key: str) -> str:
    unit = METRICS[key][1] if key in METRICS else ""
    return _UNITS.get(unit, unit)


def _over_steps(axes: Any, families: Sequence[Family], key: str) -> None:
    for family in families:
        color, style = COLORS[family.index % len(COLORS)], _style(family)
        steps, mean, low, high = zip(*family.band(key), strict=True)
        if len(family.runs) > 1:
            axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=color, linestyle=style, linewidth=1.8, marker="o", markersize=_size(len(steps)))
    if all(float(x).is_integer() for f in families for x, *_ in f.band(key)):
        axes.xaxis.get_major_locator().set_params(integer=True)


def _over_distance(axes: Any, families: Sequence[Family], key: str) -> None:
    for family in families:
        color, style = COLORS[family.index % len(COLORS)], _style(family)
        distance, value = zip(*_against(family, key), strict=True)
        axes.plot(distance, value, color=color, linestyle=style, linewidth=1.4, marker="o", markersize=3)
        axes.plot(distance[-1:], value[-1:], color=color, marker="o", markersize=7)


def _against(family: Family, key: str) -> list[tuple[float, float]]:
    """(√KL, value) of the steps, means over the seeds."""
    kl = {step: mean for step, mean, _, _ in family.band("kl")}
    return [(math.sqrt(max(kl[step], 0.0)), mean) for step, mean, _, _ in family.band(key) if step in kl]


def _size(points: int) -> float:
    return 3.0 if points <= 40 else 0.0


def _style(family: Family) -> str | tuple[int, tuple[float, ...]]:
    lengths = tuple(float(x) / 1.5 for x in dash(family).split())
    return (0, lengths) if lengths else "-"


def _told(families: Sequence[Family], key: str) -> str:
    parts = []
    for family in families:
        (first, a, *_), (last, b, *_) = family.band(key)[0], family.band(key)[-1]
        parts.append(f"{family.label}: {a:.4g} in step {first}, {b:.4g} in step {last}")
    return "; ".join(parts)


def _draw(key: str, draw: Callable[[Any], None], x: str, y: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    words: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
    }
    lines: dict[Any, Any] = {"axes.edgecolor": _LINE, "xtick.color": _INK, "ytick.color": _INK, "grid.color": _LINE}
    with matplotlib.rc_context(words | lines):
        figure = Figure(figsize=(4.4, 2.7))
        axes = figure.add_axes((0.19, 0.18, 0.78, 0.73))  # a layout that measures its labels takes twice as long
        draw(axes)
        axes.set(xlabel=x, ylabel=y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.6)
        axes.tick_params(length=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _in_page(buffer.getvalue(), key)


def _in_page(svg: str, key: str) -> str:
    """The drawing without its prologue, its size left to the page, and names that no other drawing on it has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{key}-", svg)
    svg = svg.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    return svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1).strip()
