"""Whether anything can be learned: scores that differ within a prompt, advantages that agree with them, a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lossmith.detectors.evidence import Evidence
from lossmith.detectors.finding import Detector, NotChecked, Sign
from lossmith.detectors.series import in_steps, longest
from lossmith.intervals import ALIKE

__all__ = ["DETECTORS", "without_signal"]

SILENT_WARN = 3  # steps in a row: one or two may be chance where few prompts are drawn
SILENT_STOP = 5  # nothing in five steps has never been followed by anything without a change of scorer or prompts
CONSTANT = 0.5  # of all groups: half of the sampling is for nothing, as is usual of prompts too easy or too hard
FEWEST_GROUPS = 16  # below which half of them may be chance
AGAINST = 0.75  # of pairs: KL in the reward and a critic's baseline turn some round, chance alone half of them
FEWEST_PAIRS = 20  # 15 of 20 by chance: 2%
NO_GRADIENT = 1e-12  # below it AdamW takes a gradient for 0


def without_signal(record: Mapping[str, Any]) -> bool:
    """Whether nothing was to be learned from a step's scores: no advantage, or no pair of a better and a worse."""
    if "advantage_abs" in record:
        rounding = (
            1e-6 * abs(record.get("reward", 0.0)) if record.get("groups", -1) == record.get("constant_groups") else 0.0
        )
        return bool(record["advantage_abs"] <= rounding)
    return record.get("units") == 0


def _one_score(numbers: Mapping[str, float]) -> bool:
    return "reward_std" in numbers and numbers["reward_std"] <= ALIKE * abs(numbers.get("reward", 0.0))


def _silent(evidence: Evidence) -> list[tuple[int, float]]:
    """(step, 1 where nothing was to be learned though not every completion had one score, else 0)."""
    return [(s.index, float(without_signal(s.finite) and not _one_score(s.finite))) for s in evidence.steps]


def _no_signal(evidence: Evidence) -> Sign | None:
    silent = _silent(evidence)
    stretch = longest(silent, bool)
    if len(stretch) >= SILENT_WARN:
        sentence = (
            f"no signal: {in_steps(stretch)} the scores of each prompt's completions were all equal, and nothing was "
            "learned"
        )
        places = evidence.places("constant_groups", stretch)
        level: Any = "stop" if len(stretch) >= SILENT_STOP else "warn"
        return Sign(level, sentence, len(stretch), len(silent), "steps", stretch, places)
    several = [s for s in evidence.steps if not _one_score(s.finite) and not _alone(s.finite)]
    groups = sum(s.finite.get("groups", 0) for s in several)
    constant = sum(s.finite.get("constant_groups", 0) for s in several)
    if groups < FEWEST_GROUPS or constant < CONSTANT * groups:
        return None
    steps = [s.index for s in several if s.finite.get("constant_groups")]
    sentence = (
        f"{constant / groups:.0%} of the prompts' groups had one score for all their completions: these taught nothing"
    )
    return Sign(
        "note", sentence, constant / groups, int(groups), "groups", tuple(steps), evidence.places("constant_groups")
    )


def _alone(numbers: Mapping[str, float]) -> bool:
    """Whether there is one completion of each prompt, which is a group that cannot differ."""
    return numbers.get("groups", 0) >= numbers.get("completions", float("inf"))


def _sign(evidence: Evidence) -> Sign | None:
    pairs = dict(evidence.series("pairs_compared"))
    shares = evidence.series("discordant")
    n = sum(pairs.get(step, 0.0) for step, _ in shares)
    share = sum(v * pairs.get(step, 0.0) for step, v in shares) / max(n, 1)
    ill = tuple(step for step, v in shares if v >= AGAINST)
    stretch = longest(shares, lambda v: v >= AGAINST)
    if n < FEWEST_PAIRS or share < AGAINST:
        return None
    sentence = (
        f"advantages point against the scores: of {n:.0f} pairs of completions of one prompt, {share:.0%} give the "
        "better one the smaller advantage"
    )
    level: Any = "stop" if len(stretch) >= SILENT_WARN else "warn"
    return Sign(level, sentence, share, int(n), "pairs", ill, evidence.places("discordant", ill))


def _no_gradient(evidence: Evidence) -> Sign | None:
    signal = {s.index for s in evidence.steps if not without_signal(s.finite) and not s.finite.get("skipped_updates")}
    series = [(step, v) for step, v in evidence.series("grad_norm") if step in signal]
    stretch = longest(series, lambda v: v <= NO_GRADIENT)
    if len(stretch) < 2:
        return None
    level: Any = "stop" if len(stretch) >= SILENT_STOP else "warn"
    sentence = f"the gradient was 0 {in_steps(stretch)}, although the scores of some prompts' completions differ"
    return Sign(level, sentence, 0.0, len(series), "steps with a signal", stretch)


def _one_score_only(evidence: Evidence) -> Sign | NotChecked | None:
    several = [s for s in evidence.steps if "reward_std" in s.finite and s.finite.get("completions", 2) > 1]
    series = [(s.index, float(_one_score(s.finite))) for s in several]
    stretch = longest(series, bool)
    if len(stretch) < SILENT_WARN:
        return None
    inside = [s.finite for s in several if s.index in set(stretch)]
    n = int(sum(numbers.get("completions", 0) for numbers in inside))
    scores = sorted({numbers.get("reward", 0.0) for numbers in inside})
    what = f"scored {scores[0]:g}" if len(scores) == 1 else "of a step had one score"
    sentence = f"no signal: {in_steps(stretch)} all {n} completions {what}; the scorer does not tell them apart"
    level: Any = "stop" if len(stretch) >= SILENT_STOP else "warn"
    return Sign(level, sentence, scores[0], n, "completions", stretch, evidence.places("reward", stretch))


DETECTORS: Sequence[Detector] = (
    Detector(
        "constant_scorer",
        "the scorer gives every completion one score",
        f"one score for a whole step, {SILENT_WARN} steps in a row (stop: {SILENT_STOP})",
        ("reward_std",),
        _one_score_only,
        "the scorer looks for something that no completion has or all have, fails into a default, or is given texts "
        "that are all the same",
        "look at the completions shown and score them by hand; then mend the scorer, or choose one that grades",
        "arXiv:2503.14476",
        SILENT_WARN,
    ),
    Detector(
        "no_signal",
        "the completions of a prompt all have one score",
        f"no advantage in a whole step, {SILENT_WARN} steps in a row (stop: {SILENT_STOP}); note: {CONSTANT:.0%} of at "
        f"least {FEWEST_GROUPS} groups",
        ("advantage_abs|groups|units",),
        _no_signal,
        "prompts that are too easy or too hard for the policy, too few completions of each, or a scorer that reads the "
        "prompt only",
        "raise samples_per_prompt or the temperature, take out the prompts shown, or use a scorer with finer grades",
        "arXiv:2503.14476",
    ),
    Detector(
        "advantage_sign",
        "advantages point against the scores",
        f"{AGAINST:.0%} of at least {FEWEST_PAIRS} pairs of one prompt's completions (stop: {SILENT_WARN} steps in a "
        "row)",
        ("discordant",),
        _sign,
        "a sign turned round: a cost given as a reward, a loss's own advantage with the wrong sign, or completions and "
        "scores out of order",
        "compare score and advantage of the completions shown; a score must be greater for the better text",
        "arXiv:1909.08593",
    ),
    Detector(
        "no_gradient",
        "there is a signal, and no gradient",
        f"a gradient below {NO_GRADIENT:g} in 2 steps in a row (stop: {SILENT_STOP})",
        ("grad_norm",),
        _no_gradient,
        "every token is masked or clipped away, the loss does not depend on the log-probabilities, or the weights are "
        "frozen or 0",
        "look at clip_fraction and at the loss's masks (`lossmith losses show NAME`), and that the model has weights",
        least=2,
    ),
)  # fmt: skip
