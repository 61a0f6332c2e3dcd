"""A number over the steps: its beginning, its end, and where it stayed beyond a bound."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

__all__ = ["WINDOW", "begun", "in_steps", "longest", "since", "windows"]

WINDOW = 3  # steps in a mean: every step has other prompts, and one alone says little

Series = Sequence[tuple[int, float]]


def begun(series: Series) -> float:
    """Its mean over the first steps."""
    return statistics.fmean(value for _, value in series[:WINDOW])


def windows(series: Series, size: int = WINDOW) -> list[tuple[int, float]]:
    """(last step, mean) of every `size` steps in a row."""
    values = [value for _, value in series]
    return [(series[i + size - 1][0], statistics.fmean(values[i : i + size])) for i in range(len(values) - size + 1)]


def longest(series: Series, ill: Callable[[float], bool]) -> tuple[int, ...]:
    """The longest stretch of steps in a row for which `ill` holds; the later of two."""
    best: list[int] = []
    now: list[int] = []
    for step, value in series:
        now = [*now, step] if ill(value) else []
        if now and len(now) >= len(best):
            best = now
    return tuple(best)


def since(series: Series, ill: Callable[[float], bool]) -> tuple[int, ...]:
    """The steps at the end of the series for which `ill` holds without a break."""
    found: list[int] = []
    for step, value in reversed(series):
        if not ill(value):
            break
        found.insert(0, step)
    return tuple(found)


def in_steps(steps: Sequence[int]) -> str:
    """ "in step 4", "in steps 4 to 9", "in 3 steps between 4 and 9": people are told steps from 1."""
    if not steps:
        return ""
    first, last = steps[0] + 1, steps[-1] + 1
    if len(steps) == 1:
        return f"in step {first}"
    if last - first + 1 == len(steps):
        return f"in steps {first} to {last}"
    return f"in {len(steps)} steps between {first} and {last}"
