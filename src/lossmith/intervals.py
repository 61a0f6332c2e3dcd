"""Every interval and every verdict: what a sample supports, and no more.

mean_of   a mean: Student's t. Values that are all alike have no spread to estimate from: see there
share_of  a share (preferred, right, agreed): Clopper-Pearson, on the number of prompts or what they are worth;
          `share_across` where each comparison is of two prompts
verdict   what a paired difference says, in a sentence; `doubt` why an accuracy may be no better than a coin's

All are at 95%, two-sided. None has zero width: where nothing is known of how far other values may lie, there is no
interval (NaN; None in JSON).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ALIKE",
    "FEWEST",
    "Interval",
    "alike",
    "allows_verdict",
    "doubt",
    "in_words",
    "mean_of",
    "share_across",
    "share_of",
    "verdict",
]

FEWEST = 10
"""Prompts below which there is no verdict, whatever the interval.

Up to 5, not even a unanimous sample is unlike a coin (2·2^-5 = 0.06); up to 8, one prompt to the contrary turns what
all others agree on (7 of 8: p = 0.07, 8 of 9: p = 0.04, sign test); and Student's t is trusted on skewed scores only
from about here (its coverage is simulated in the tests).
"""
TAIL = 0.025
ALIKE = 1e-9  # relative to the size of what is averaged: smaller differences are rounding


@dataclass(frozen=True)
class Interval:
    """A mean or share with its 95% confidence interval over `n` independent units (prompts)."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None where there is too little to say."""
        figures = {"mean": self.mean, "ci95_low": self.low, "ci95_high": self.high}
        return {name: x if math.isfinite(x) else None for name, x in figures.items()} | {"n": self.n}


def mean_of(values: Sequence[float], within: tuple[float, float] | None = None) -> Interval:
    """The mean of independent values: Student's t.

    Values that are all alike say only that others are rare: fewer than 1 - 0.025^(1/n) of all (Clopper-Pearson at 0 of
    n). `within` is the least and greatest value that there may be; such rare ones could lie at its ends, which bounds
    the mean. Without it, or where it is one point, nothing is known and there is no interval.
    """
    n = len(values)
    if n < 2:
        return Interval(values[0] if n else math.nan, math.nan, math.nan, n)
    mean = statistics.fmean(values)
    ends = within or (mean, mean)
    size = ALIKE * max(map(abs, (*values, *ends)))
    if not alike(values, size):
        from scipy.special import stdtrit

        half = float(stdtrit(n - 1, 1 - TAIL)) * statistics.stdev(values) / math.sqrt(n)
        return Interval(mean, mean - half, mean + half, n)
    if ends[1] - ends[0] <= size:
        return Interval(mean, math.nan, math.nan, n)
    others = 1 - TAIL ** (1 / n)
    return Interval(mean, mean - others * max(mean - ends[0], 0.0), mean + others * max(ends[1] - mean, 0.0), n)


def alike(values: Sequence[float], size: float | None = None) -> bool:
    """Whether values differ by no more than rounding, `size`; none are not alike."""
    if not len(values):
        return False
    return max(values) - min(values) <= (ALIKE * max(map(abs, values)) if size is None else size)


def share_of(values: Sequence[float], comparisons: int | None = None) -> Interval:
    """The share won: `values` are those of independent prompts, each in [0, 1]; a tie counts half.

    Clopper-Pearson (1934), which holds its 95% for any share and number. A prompt of several comparisons varies less
    than a single win or loss; the interval is then taken at the effective count p(1-p)/Var(p), corrected for the few
    prompts that the variance is known from (Korn and Graubard 1998), which is no less than the number of prompts (a
    value in [0, 1] varies no more than a win or loss of the same mean, so ties leave it on the wide side) and no more
    than that of `comparisons`.
    """
    return _share(values, len(values), max(comparisons or 0, len(values)))


def share_across(outcomes: Sequence[tuple[str, str, float]]) -> tuple[Interval, dict[str, float]]:
    """The share of pairs won where each pair is of two prompts, and what each prompt contributes to it.

    outcomes: (prompt of the better, prompt of the worse, 1 won, 0 lost, 0.5 a tie). A prompt is in many pairs, so
    these are far from independent. A contribution is share + n·(won - share·pairs)/(all pairs): their mean is the
    share, and their variance over n its variance (Hoeffding's projection; of two kinds, DeLong 1988). The interval is
    that of `share_of` at their effective count, which is no less than the pairs that share no prompt.
    """
    won: dict[str, float] = {}
    count: dict[str, int] = {}
    for better, worse, value in outcomes:
        for name in (better, worse):
            won[name] = won.get(name, 0.0) + value
            count[name] = count.get(name, 0) + 1
    n, pairs = len(won), max(len(outcomes), 1)
    share = math.fsum(value for _, _, value in outcomes) / pairs
    contributions = {name: share + n * (won[name] - share * count[name]) / pairs for name in won}
    unshared = min(len({o[0] for o in outcomes}), len({o[1] for o in outcomes}), n // 2)
    return _share(list(contributions.values()), max(unshared, 1), n), contributions


def _share(values: Sequence[float], least: int, most: int) -> Interval:
    n = len(values)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    share = min(max(statistics.fmean(values), 0.0), 1.0)
    variance = statistics.variance(values) / n if n > 1 else 0.0
    count = float(least)
    if most > least and variance > ALIKE**2:
        from scipy.special import stdtrit

        few = float(stdtrit(most, 1 - TAIL) / stdtrit(max(least - 1, 1), 1 - TAIL)) ** 2
        count = min(max(few * share * (1 - share) / variance, count), float(most))
    return Interval(share, *_clopper_pearson(share, count), n)


def _clopper_pearson(share: float, count: float) -> tuple[float, float]:
    from scipy.special import betaincinv

    hits = share * count
    low = float(betaincinv(hits, count - hits + 1, TAIL)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, count - hits, 1 - TAIL)) if hits < count else 1.0
    return low, high


# -- in words ---------------------------------------------------------------------------------------------------------


def in_words(row: Mapping[str, Any], form: str = ".3f") -> str:
    """`0.484 to 0.602` of an interval as JSON holds it; `?` where there is none."""
    low, high = row.get("ci95_low"), row.get("ci95_high")
    return "?" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def allows_verdict(row: Mapping[str, Any]) -> bool:
    """Whether an interval as JSON holds it exists, and is from enough prompts."""
    return row.get("ci95_low") is not None and row["n"] >= FEWEST


def verdict(change: Mapping[str, Any], what: str) -> str:
    """What the paired difference of `what` says, after - before, over held-out prompts."""
    n = change["n"]
    if n < FEWEST:
        return f"Too few held-out prompts ({n}) to say: a verdict on the {what} needs {FEWEST}. Hold out more."
    if not allows_verdict(change):
        return f"No verdict: the {what} is one and the same number throughout."
    if change["ci95_low"] > 0:
        return f"{what[0].upper()}{what[1:]} rose: the interval of the paired difference lies above 0."
    if change["ci95_high"] < 0:
        return f"{what[0].upper()}{what[1:]} FELL: the interval of the paired difference lies below 0."
    return (
        f"No clear change of the {what}: the interval of the paired difference ({in_words(change, '+.3f')}) holds 0. "
        "More held-out prompts make it narrower."
    )


def doubt(accuracy: Any) -> str:
    """Why a held-out accuracy is not known to be better than a coin's; "" where it is.

    accuracy: as reward_model.json holds it. Older ones may hold a bare number, or no interval; one that holds nothing
    claims nothing, and is not doubted.
    """
    if accuracy is None:
        return ""
    row = accuracy if isinstance(accuracy, Mapping) else {"mean": accuracy}
    mean, n, low = row.get("mean"), row.get("n"), row.get("ci95_low")
    if not isinstance(mean, int | float):
        return "no held-out prompt says how accurate it is"
    claim = f"its held-out accuracy {mean:.2f}"
    if not isinstance(n, int):
        return f"{claim} is that of an unknown number of prompts"
    if n < FEWEST:
        return (
            f"{claim} is that of {n} prompt{'s' * (n != 1)}: too few to tell it from chance (0.5), {FEWEST} are needed"
        )
    if low is None:
        low, high = _clopper_pearson(mean, n)
        row = dict(row) | {"ci95_low": low, "ci95_high": high}
    if low > 0.5:
        return ""
    comparison = "is worse than chance" if row["ci95_high"] < 0.5 else "is no better than chance"
    return f"{claim} {comparison}: its 95% interval, {in_words(row, '.2f')} over {n} prompts, does not lie above 0.5"
