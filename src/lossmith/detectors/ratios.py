"""Importance ratios: whether the trust region acts, on which side, and whether sampler and learner are one policy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from lossmith.detectors.evidence import Evidence
from lossmith.detectors.finding import Detector, NotChecked, Sign
from lossmith.detectors.measuring import BAND
from lossmith.detectors.series import WINDOW, begun, in_steps, longest, windows

__all__ = ["DETECTORS", "GAP_NOTE"]

ONE = 1e-12  # nats: KL(new || old) of ratios that are all 1 but for rounding
CLIPPED = 0.3  # of tokens, over all updates of a step: usual are 0 to 0.2, and gspo's narrow range reaches more
SOME = 0.02  # of tokens clipped, below which the sides are not compared
ONE_SIDE = 0.99  # of the clipped tokens on one side
SIDED_STEPS = 5  # in a row
ESS_WARN = 0.5  # of the tokens that the weighted sample is worth: where particle filters draw afresh
ESS_STOP = 0.1  # a handful of tokens decides the gradient
GAP_NOTE = 0.005  # nats a token: float32 stays below 0.0001, bfloat16 lies at 0.03
GAP_WARN = 0.1  # three times what bfloat16 rounding does to a small model
GAP_GROWTH = 3.0  # times that of the start: rounding does not grow, weights that did not arrive do
GAP_GROWN = 0.05


def updates_a_step(evidence: Evidence) -> int | None:
    """Optimizer steps in a round, where the recipe is known."""
    if "updates_per_step" not in evidence.settings:
        return None
    parts = min(int(evidence.setting("updates_per_step")), int(evidence.setting("prompts_per_step") or 1))
    return int(evidence.setting("epochs") or 1) * parts


def _one(evidence: Evidence) -> Sign | NotChecked | None:
    updates = updates_a_step(evidence)
    if updates is None:
        return NotChecked("how many updates a step makes is not recorded")
    if updates < 2:
        return NotChecked("a step makes one update, in which every ratio is 1")
    moving = {s.index for s in evidence.steps if s.numbers.get("grad_norm", 1.0) > 0}
    stretch = longest([(s, v) for s, v in evidence.series("kl_update") if s in moving], lambda v: abs(v) <= ONE)
    if len(stretch) < WINDOW:
        return None
    n = int(sum(v for s, v in evidence.series("tokens") if s in set(stretch)))
    sentence = f"every ratio was 1 {in_steps(stretch)}, though each step makes {updates} updates: nothing is clipped"
    return Sign("warn", sentence, 1.0, n, "tokens", stretch)


def _clipped_share(evidence: Evidence) -> list[tuple[int, float]]:
    """Share of tokens outside the trust region; where sides are told, masks that leave tokens out do not count."""
    below = dict(evidence.series("clipped_below"))
    sided = [(step, v + below.get(step, 0.0)) for step, v in evidence.series("clipped_above")]
    return sided or evidence.series("clip_fraction")


def _clipped(evidence: Evidence) -> Sign | None:
    series = _clipped_share(evidence)
    stretch = longest(series, lambda v: v >= CLIPPED)
    if len(stretch) < WINDOW:
        return None
    share = statistics.fmean(v for s, v in series if s in set(stretch))
    n = int(sum(v for s, v in evidence.series("tokens") if s in set(stretch)))
    sentence = f"{share:.0%} of the tokens were clipped {in_steps(stretch)}: each round is used too often or too hard"
    return Sign("warn", sentence, share, n, "tokens", stretch)


def _one_sided(evidence: Evidence) -> Sign | None:
    below = dict(evidence.series("clipped_below"))
    both = [(s, v, below[s]) for s, v in evidence.series("clipped_above") if s in below and v + below[s] >= SOME]
    above_only = longest([(s, a / (a + b)) for s, a, b in both], lambda v: v >= ONE_SIDE)
    below_only = longest([(s, b / (a + b)) for s, a, b in both], lambda v: v >= ONE_SIDE)
    stretch = max(above_only, below_only, key=len)
    if len(stretch) < SIDED_STEPS:
        return None
    side = "above 1 (made likelier)" if stretch == above_only else "below 1 (made less likely)"
    share = statistics.fmean(a + b for s, a, b in both if s in set(stretch))
    n = int(sum(v for s, v in evidence.series("tokens") if s in set(stretch)))
    sentence = f"{in_steps(stretch)} {share:.0%} of the tokens were clipped, all of them at ratios {side}"
    return Sign("warn", sentence[0].lower() + sentence[1:], share, n, "tokens", stretch)


def _ess(evidence: Evidence) -> Sign | None:
    series = evidence.series("ess")
    low = [(step, v) for step, v in windows(series, 2) if v < ESS_WARN]
    if not low:
        return None
    step, least = min(low, key=lambda pair: pair[1])
    n = int(dict(evidence.series("tokens")).get(step, 0))
    sentence = (
        f"by step {step + 1} the {n} sampled tokens are worth {least:.0%} of as many: the learner's probabilities are "
        "far from those that they were sampled with"
    )
    level: Any = "stop" if any(v < ESS_STOP for _, v in windows(series)) else "warn"
    return Sign(level, sentence, least, n, "tokens", tuple(s for s, _ in low))


def _gap(evidence: Evidence) -> Sign | None:
    series = evidence.series("sampler_gap")
    first = begun(series)
    step, most = max(windows(series, min(WINDOW, len(series))), key=lambda pair: pair[1])
    if most < GAP_NOTE:
        return None
    n = int(sum(v for _, v in evidence.series("tokens")))
    outside = [v for _, v in evidence.series("sampler_outside")]
    band = f", {statistics.fmean(outside):.1%} of them outside [{BAND[0]}, {BAND[1]}]" if outside else ""
    steps = tuple(s for s, v in series if v >= GAP_NOTE)
    if most >= GAP_GROWN and most > GAP_GROWTH * first:
        sentence = (
            f"sampler and learner drift apart: {first:.3f} nats a token at the start, {most:.3f} by step {step + 1}"
        )
        why = "the sampler still has older weights: an update did not reach it, or rollouts wait too long for theirs"
        cure = "see that the weights reach the sampler, bound how old a rollout may be, or correct: mismatch='tis'"
        return Sign("warn", sentence, most, n, "tokens", steps, cause=why, cure=cure)
    sentence = (
        f"sampler and learner disagree by {most:.3f} nats a token: where the loss takes the ratio for 1, it is about "
        f"{1 + most:.2f} or {1 / (1 + most):.2f}{band}"
    )
    return Sign("warn" if most >= GAP_WARN else "note", sentence, most, n, "tokens", steps)


DETECTORS: Sequence[Detector] = (
    Detector(
        "ratio_one",
        "several updates a step, and ratios that never leave 1",
        f"kl_update below {ONE:g} nats in {WINDOW} steps in a row, with 2 updates a step or more",
        ("kl_update",),
        _one,
        "the old log-probabilities are taken again at every update, or an update changes nothing",
        "take log π_old once, before the first update of a round; look at learning_rate",
        "arXiv:1707.06347",
        WINDOW,
    ),
    Detector(
        "mostly_clipped",
        "much of the round is outside the trust region",
        f"{CLIPPED:.0%} of the tokens clipped in {WINDOW} steps in a row",
        ("clipped_above|clip_fraction",),
        _clipped,
        "too many epochs or updates on one round, or steps that are too large",
        "lower epochs, updates_per_step or learning_rate, or widen the trust region (clip_low, clip_high)",
        "arXiv:1707.06347",
        WINDOW,
    ),
    Detector(
        "one_sided_clipping",
        "the trust region acts on one side only",
        f"{ONE_SIDE:.0%} of the clipped tokens on one side, {SIDED_STEPS} steps in a row with {SOME:.0%} clipped",
        ("clipped_above",),
        _one_sided,
        "advantages of one sign only (no baseline, or rewards that are all positive), or a bound on one side that is "
        "much tighter",
        "subtract a baseline (advantage='group', for one), or compare clip_low with clip_high",
        "arXiv:2503.14476",
        SIDED_STEPS,
    ),
    Detector(
        "effective_sample_size",
        "a few tokens carry all the importance weight",
        f"(Σw)²/(nΣw²) of the tokens' ratios π_learner/π_sampler below {ESS_WARN:g}, over 2 steps "
        f"(stop: {ESS_STOP:g}, over {WINDOW})",
        ("ess",),
        _ess,
        "rollouts of a much older policy, too many updates on them, or a sampler that is another model",
        "use fresher rollouts, fewer epochs, or a correction that bounds the weights (mismatch='tis')",
        "arXiv:1809.04129",
        2,
    ),
    Detector(
        "sampler_gap",
        "sampler and learner are not the same policy",
        f"mean |log π_learner - log π_sampler| above {GAP_WARN:g} nats a token, or {GAP_GROWTH:g} times that of the "
        f"start and above {GAP_GROWN:g}; note: above {GAP_NOTE:g}",
        ("sampler_gap",),
        _gap,
        "the sampler computes in another precision or with other kernels than the learner (bfloat16: about 0.03)",
        "correct it in the loss, as grpo(mismatch='tis') or mismatch='icepop' do; round less: float32_head or dtype",
        "arXiv:2510.26788",
    ),
)  # fmt: skip
