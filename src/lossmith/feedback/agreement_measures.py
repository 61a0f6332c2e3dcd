"""The numbers of an agreement report, each a pure function of plain tables.

Data on which a measure is not defined give NaN, and never a warning: nothing judged twice, or one answer throughout,
for which "agreement beyond chance" has no meaning.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lossmith.intervals import Interval, share_of

__all__ = ["agreed", "cohen", "cycles", "fleiss", "in_words", "ordinal_alpha", "share_of_first", "spread"]

_CELLS = 8_000_000  # of the library's table of units by values by values, of which it holds several
_WORDS = (
    (0.0, "worse than chance"),
    (0.2, "slight"),
    (0.4, "fair"),
    (0.6, "moderate"),
    (0.8, "substantial"),
    (math.inf, "almost perfect"),
)


def in_words(value: float) -> str:
    """The usual names (Landis and Koch 1977) of a kappa or an alpha."""
    if math.isnan(value):
        return "not defined"
    return next(word for limit, word in _WORDS if value < limit)


def ordinal_alpha(units: Iterable[Mapping[Any, float]]) -> float:
    """Krippendorff's alpha, ordinal. A unit is {coder: value}; one with fewer than two values does not count."""
    shared = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in shared for value in unit.values()})
    if len(values) < 2:
        return math.nan
    levels = max(10, math.isqrt(_CELLS // len(shared)))
    column = {value: k for k, value in enumerate(values)}
    if len(values) > levels:  # a scorer's fractions: as many answers to each level, for only their order is read
        everything = sorted(value for unit in shared for value in unit.values())
        column = {value: bisect_left(everything, value) * levels // len(everything) for value in values}
    import krippendorff

    table = [[0] * (max(column.values()) + 1) for _ in shared]
    for row, unit in zip(table, shared, strict=True):
        for value in unit.values():
            row[column[value]] += 1
    return _clean(krippendorff.alpha(value_counts=table, level_of_measurement="ordinal"))


def cohen(table: Sequence[Sequence[int]]) -> float:
    """Cohen's kappa of a contingency table: rows what one annotator said, columns the other."""
    total = sum(map(sum, table))
    rows, columns = [sum(row) for row in table], [sum(column) for column in zip(*table, strict=True)]
    # Both always said one and the same thing: agreement by chance is certain, and the measure 0/0.
    if not total or any(a == b == total for a, b in zip(rows, columns, strict=True)):
        return math.nan
    import numpy as np
    from statsmodels.stats.inter_rater import cohens_kappa

    return _clean(cohens_kappa(np.asarray(table), return_results=False))


def fleiss(table: Sequence[Sequence[int]]) -> float:
    """Fleiss' kappa of a count table: rows items, columns categories; every row has the same sum of two or more."""
    columns = [sum(column) for column in zip(*table, strict=True)]
    if not table or sum(table[0]) < 2 or max(columns) == sum(columns):
        return math.nan
    import numpy as np
    from statsmodels.stats.inter_rater import fleiss_kappa

    return _clean(fleiss_kappa(np.asarray(table)))


def agreed(units: Iterable[Mapping[Any, object]]) -> float:
    """The share of answers, two annotators at a time, that are the same; NaN without any."""
    same = [a == b for unit in units for a, b in itertools.combinations(unit.values(), 2)]
    return sum(same) / len(same) if same else math.nan


def spread(units: Iterable[Mapping[Any, float]], width: float) -> float:
    """How far two annotators are apart on average, as a share of the `width` of the scale; NaN without any."""
    distances = [abs(a - b) for unit in units for a, b in itertools.combinations(unit.values(), 2)]
    return sum(distances) / len(distances) / width if distances and width else math.nan


def share_of_first(first: int, decided: int) -> tuple[Interval, float]:
    """The share with its 95% interval (Clopper-Pearson), and the two-sided binomial p-value against one half."""
    share = share_of([1.0] * first + [0.0] * (decided - first))
    if not decided:
        return share, math.nan
    from scipy.stats import binomtest

    return share, float(binomtest(first, decided, 0.5).pvalue)


def cycles(better: Iterable[tuple[str, str]]) -> tuple[int, int]:
    """How many triples go in a circle (a > b > c > a), and how many were decided on all three sides."""
    beaten: dict[str, set[str]] = {}
    for winner, loser in better:
        beaten.setdefault(winner, set()).add(loser)
        beaten.setdefault(loser, set())
    cyclic = complete = 0
    for a, b, c in itertools.combinations(sorted(beaten), 3):
        sides = [(a, b), (b, c), (c, a)]
        forward = [y in beaten[x] for x, y in sides]
        backward = [x in beaten[y] for x, y in sides]
        complete += all(f or g for f, g in zip(forward, backward, strict=True))
        cyclic += all(forward) or all(backward)
    return cyclic, complete


def _clean(value: float) -> float:
    """Without the rounding error that would call a plain 0 worse than chance."""
    return round(float(value), 12) + 0.0
