"""Several scorers as one: a weighted sum, or an ensemble of scorers that mean the same."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Sequence, Set
from typing import Any

from lossmith.errors import ScorerError, nearest
from lossmith.rollouts import Rollout, Score
from lossmith.scorers.scorer import Scorer, ask, close_scorer, columns_read, verify_scorer

__all__ = ["COMBINE", "Ensemble", "WeightedScorers", "check_weights"]

COMBINE = ("mean", "worst", "uncertain")


def check_weights(weights: Any, count: int) -> None:
    """ScorerError: not None, and not one finite number for each of `count` scorers."""
    if weights is None:
        return
    if not isinstance(weights, list | tuple):
        raise ScorerError(f"weights are a list of numbers, one per scorer, not {type(weights).__name__}.")
    if len(weights) != count:
        raise ScorerError(f"{count} scorers and {len(weights)} weights; give one weight per scorer.")
    if not all(isinstance(w, int | float) and abs(w) <= sys.float_info.max for w in weights):
        raise ScorerError(f"weights are finite numbers, not {weights}.")


class _Members:
    """What every combination of scorers does with its members."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self.scorers = list(scorers)
        names = [scorer.name for scorer in scorers]
        self.members = [  # with "#2", "#3" after repeats
            name if name not in names[:i] else f"{name}#{names[: i + 1].count(name)}" for i, name in enumerate(names)
        ]

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self.score_within(rollouts, None)

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        raise NotImplementedError

    def close(self) -> None:
        """Close every member."""
        for scorer in self.scorers:
            close_scorer(scorer)

    def verify(self) -> None:
        """Have every member look whether it is still what was trained."""
        for scorer in self.scorers:
            verify_scorer(scorer)

    def columns_read(self, names: Set[str]) -> set[str]:
        """What any member is given."""
        return set().union(*(columns_read(scorer, names) for scorer in self.scorers))

    def _ask_all(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[list[Score]]:
        """Each member's column of scores; one time limit covers them all."""
        end = None if timeout is None else time.monotonic() + timeout
        return [ask(s, rollouts, None if end is None else max(0.0, end - time.monotonic())) for s in self.scorers]

    def _parts(self, scores: Sequence[Score]) -> tuple[Score, bool]:
        """(a Score with the members' scores as its parts and the error of the first that has one, any abstained)."""
        by_member = list(zip(self.members, scores, strict=True))
        parts = {name: s.value for name, s in by_member if s.value is not None}
        errors = [f"{s.error} [{name}]" for name, s in by_member if s.error is not None]
        logged = {key: value for s in scores for key, value in s.logged.items()}
        error = errors[0] if errors else None
        return Score(error=error, parts=parts, logged=logged), any(s.abstained for s in scores)


class WeightedScorers(_Members):
    """r(x, y) = Σ_k w_k r_k(x, y).

    The book's eq. 4.72 divides by the number of scorers K as well, which only rescales the reward.

    `standardize=True` first centers each member and divides it by its standard deviation (n - 1) over the valid
    scores of the batch, so that no member counts for more because its numbers are larger; a constant member counts
    0. The sum then compares completions of one batch, and does not compare batches.

    A completion on which any member errs is an error. A member that abstains is not applicable and adds nothing, as
    None does in TRL; where all abstain, so does the sum. `Score.parts` holds each member's score as the member gave
    it. One time limit covers all members.
    """

    def __init__(self, scorers: Sequence[Scorer], weights: Sequence[float] | None = None, standardize: bool = False):
        if not scorers:
            raise ScorerError("a combined score needs at least one scorer.")
        check_weights(weights, len(scorers))
        super().__init__(scorers)
        self.weights = [float(weight) for weight in weights or [1.0] * len(scorers)]
        self.standardize = standardize
        self.name = " + ".join(f"{w:g} {name}" for w, name in zip(self.weights, self.members, strict=True))

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        columns = self._ask_all(rollouts, timeout)
        scaled = [_standardize(column) if self.standardize else [s.value for s in column] for column in columns]
        by_completion = zip(zip(*columns, strict=True), zip(*scaled, strict=True), strict=True)
        return [self._combine(scores, values) for scores, values in by_completion]

    def _combine(self, scores: tuple[Score, ...], values: tuple[float | None, ...]) -> Score:
        """One completion: each member's score, and the value that goes into the sum."""
        combined, _ = self._parts(scores)
        if combined.error is not None:
            return combined
        if not combined.parts:
            return dataclasses.replace(combined, abstained=True)
        total = sum(w * v for w, v in zip(self.weights, values, strict=True) if v is not None)
        return dataclasses.replace(combined, value=total)


class Ensemble(_Members):
    """Scorers that mean the same and err differently, as one cautious score.

    combine: `mean`; `worst`, min_k r_k; or `uncertain`, mean - penalty · variance over the members. What only one
    member likes is not rewarded by the last two, and that is where a policy over-optimizes (arXiv:2310.02743). The
    members' scores are taken as they are: reward models give them in units of their own spread.

    Where any member abstains, so does the ensemble. `Score.parts` holds each member's score, and `disagreement`, their
    standard deviation.
    """

    def __init__(self, scorers: Sequence[Scorer], combine: str = "mean", penalty: float = 1.0):
        if len(scorers) < 2:
            raise ScorerError("an ensemble needs two scorers or more.")
        if combine not in COMBINE:
            raise ScorerError(f"combine is {combine!r}.{nearest(combine, COMBINE)}")
        if not isinstance(penalty, int | float) or not 0 <= penalty < math.inf:
            raise ScorerError(f"penalty = {penalty!r}, but must be finite and at least 0.")
        super().__init__(scorers)
        self.combine, self.penalty = combine, float(penalty)
        self.name = f"{combine} of {', '.join(self.members)}"

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        columns = self._ask_all(rollouts, timeout)
        return [self._combine(scores) for scores in zip(*columns, strict=True)]

    def _combine(self, scores: tuple[Score, ...]) -> Score:
        combined, abstained = self._parts(scores)
        if combined.error is not None or abstained:
            return combined if combined.error is not None else dataclasses.replace(combined, abstained=True)
        values = list(combined.parts.values())
        mean, variance = statistics.fmean(values), statistics.pvariance(values)
        value = {"mean": mean, "worst": min(values), "uncertain": mean - self.penalty * variance}[self.combine]
        return dataclasses.replace(combined, value=value, parts=combined.parts | {"disagreement": math.sqrt(variance)})


def _standardize(column: Sequence[Score]) -> list[float | None]:
    """(r - mean) / std over the valid scores, None elsewhere; all 0 where they do not vary."""
    valid = [score.value for score in column if score.value is not None]
    mean = statistics.fmean(valid) if valid else 0.0
    spread = statistics.stdev(valid) if len(valid) > 1 else 0.0  # exact arithmetic: 0.0 for a constant
    return [None if s.value is None else (s.value - mean) / spread if spread else 0.0 for s in column]
