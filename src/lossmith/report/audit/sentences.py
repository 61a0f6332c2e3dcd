"""An audit in words: sections of lines, each with its number. The terminal and the page show the same lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lossmith.proofs.auditing import Audit
from lossmith.proofs.enumeration import Bias
from lossmith.proofs.finding import FAILED, NOT_APPLICABLE

__all__ = ["EXACT", "Line", "Section", "optimizes", "sections", "short"]

EXACT = 1e-9  # a residual below is rounding
SIMILAR = 1e-4  # relative change of an advantage below which it counts as unchanged (the eps beside a deviation)


@dataclass(frozen=True)
class Line:
    """label: what was measured; number: as text; text: what it means."""

    label: str
    number: str
    text: str


@dataclass(frozen=True)
class Section:
    title: str
    lines: tuple[Line, ...]
    note: str = ""


def short(x: float | None) -> str:
    """Four digits; rounding noise is 0."""
    if x is None:
        return "–"
    if not math.isfinite(x):
        return str(x).replace("inf", "∞")
    if abs(x) < 1e-9:
        return "0"
    nearly_one = 1e-9 < abs(abs(x) - 1) < 5e-5  # must not read as 1
    return f"{x:.4g}" if not nearly_one else f"{x:.9f}".rstrip("0")


def optimizes(found: Bias, objective: str = "∇E[r]") -> str:
    """One sentence about an expected gradient."""
    if found.norm_ratio == 0:
        return "the expected gradient is 0: it optimizes nothing"
    if found.residual < EXACT and found.scale > 0:
        return f"expected gradient = {short(found.scale)}·{objective} exactly"
    return (
        f"not the gradient of it: cosine {short(found.cosine)} to {objective}, "
        f"best multiple {short(found.scale)}, residual {short(found.residual)}"
    )


def sections(audit: Audit) -> list[Section]:
    """Every section that has something to say."""
    parts: tuple[Callable[[Audit], Section], ...] = (
        _objective, _noise, _length, _spread, _penalty, _off_policy, _advantages, _invariance, _checks
    )  # fmt: skip
    return [section for section in (part(audit) for part in parts) if section.lines]


def _objective(audit: Audit) -> Section:
    lines = []
    if audit.on_policy:
        found = audit.on_policy
        lines.append(Line("on-policy, without KL", short(found.residual), optimizes(found) + _named(audit, found)))
    if audit.unscaled:
        text = optimizes(audit.unscaled)
        lines.append(Line("without dividing by a deviation", short(audit.unscaled.residual), text))
    if audit.exact_critic:
        text = optimizes(audit.exact_critic) + "; above, the values are wrong by a fixed number for each prefix"
        lines.append(Line("with an exact critic", short(audit.exact_critic.residual), text))
    if audit.with_kl:
        objective = f"∇(E[r] − {short(audit.beta)}·KL)"
        text = (
            optimizes(audit.with_kl, objective) + f"; KL(π‖π_ref) of completions, the penalty in the {audit.kl_place}"
        )
        lines.append(Line("on-policy, with its KL", short(audit.with_kl.residual), text))
    if audit.long:
        lines.append(Line("completions of 1 to 6 tokens", short(audit.long.residual), optimizes(audit.long)))
    if audit.long_normalized:
        text = optimizes(audit.long_normalized) + "; so it is in a large batch, whose number of tokens hardly varies"
        lines.append(Line("the same, divided by a constant", short(audit.long_normalized.residual), text))
    ways = f"Groups of {audit.group_size}, all enumerated; the number is the relative residual."
    if audit.on_policy and not audit.on_policy.exact:
        ways = f"Groups of {audit.group_size}, sampled: ±{short(audit.on_policy.interval)} of the norm (95 %)."
    return Section("What it optimizes", tuple(lines), ways)


def _named(audit: Audit, found: Bias) -> str:
    """Where c is a number one knows: its name."""
    g = audit.group_size
    if found.residual >= EXACT:
        return ""
    if abs(found.scale - 1) < EXACT:
        return ": unbiased"
    over = (g - 1) / g / found.scale
    if over < 1 - EXACT or abs(over - round(over)) > 1e-6:
        return ""
    constant = "" if round(over) == 1 else f", divided by the constant {round(over)}"
    return f": (G−1)/G{constant}, because a completion's own reward is part of its group's mean"


def _noise(audit: Audit) -> Section:
    if not audit.on_policy:
        return Section("Noise", ())
    lines = [
        Line("signal to noise", short(audit.on_policy.signal_to_noise), "‖E[g]‖² / tr Cov(g) of one group's gradient g")
    ]
    for label, number in (
        ("variance over plain REINFORCE", audit.noise_to_reinforce),
        ("variance over leave-one-out", audit.noise_to_leave_one_out),
    ):
        if number is not None:
            lines.append(
                Line(label, short(number), "at equal expected gradient (divided by c²); below 1 is less noise")
            )
    return Section("Noise", tuple(lines), "On the default setting; rewards of another mean or spread change it.")


def _length(audit: Audit) -> Section:
    if not audit.length:
        return Section("Length", ())
    found, lines = audit.length, []
    lines.append(Line("exponent of a token's weight", short(round(found.exponent, 9)), found.statement))
    ratio = found.token[0] / found.token[-1]
    longest = found.lengths[-1]
    text = f"a token of a completion of 1 token weighs this many times a token of one of {longest}, at equal advantage"
    lines.append(Line(f"1 token against {longest}", short(ratio), text))
    return Section("Length", tuple(lines), "The sum over tokens, exponent 0, is that of the policy gradient.")


def _spread(audit: Audit) -> Section:
    if not audit.difficulty:
        return Section("Easy and hard prompts", ())
    lines = [
        Line(f"solved {100 * one.success:g} % of the time", short(one.scale), "c: expected gradient over ∇E[r]")
        for one in audit.difficulty
    ]
    lines.append(_ratio("even against hard", audit.difficulty, "as it is"))
    if audit.difficulty_unscaled:
        lines.append(_ratio("the same without its deviation", audit.difficulty_unscaled, "advantages not divided"))
    return Section(
        "Easy and hard prompts",
        tuple(lines),
        "Rewards 0 and 1, groups of 16, answers of one token. Where c differs, prompts are weighted by how often they "
        "are solved, and the sum over prompts is no longer E[r].",
    )


def _ratio(label: str, graded: tuple, what: str) -> Line:
    """c of the hardest prompt over c of the even one."""
    even = min(graded, key=lambda one: abs(one.success - 0.5))
    hard = min(graded, key=lambda one: one.success)
    number = hard.scale / even.scale if even.scale else math.nan
    text = f"{what}: a prompt solved {100 * hard.success:g} % of the time counts {short(number)} times an even one"
    return Line(label, short(number), text)


def _penalty(audit: Audit) -> Section:
    lines = []
    for push in audit.push:
        if push.size == 0:
            text = "no push at all: the penalty alone has expected gradient 0 and regularizes nothing"
        elif push.cosine < 0:
            text = f"pushes away from the reference, with {short(push.size)} times the force of β∇KL(π‖π_ref)"
        else:
            text = f"pulls to the reference, with {short(push.size)} times the force of β∇KL(π‖π_ref)"
        lines.append(Line(f"sampled by {push.sampler}", short(push.cosine), text))
    note = "Its KL term alone: cosine of its expected step and of the step that lowers KL(π‖π_ref) of completions."
    return Section("What the penalty pushes to", tuple(lines), note)


def _off_policy(audit: Audit) -> Section:
    both = (("old policy", audit.off_policy), ("sampler alone", audit.mismatch))
    lines = [
        Line(
            f"{who} {one.nats:g} nats away",
            short(one.cosine),
            f"mean cosine to ∇E[r] at the policy; worst direction {short(one.worst)}",
        )
        for who, distances in both
        for one in distances
    ]
    note = (
        "Groups of 3 sampled at this KL from the policy, in 4 random directions: by the old policy, or by a sampler "
        "whose numbers differ while the old policy is the policy itself, which a mismatch correction is for. "
        "The ratio of whole completions without a clip has cosine 1 at every distance."
    )
    return Section("Off-policy", tuple(lines), note)


def _advantages(audit: Audit) -> Section:
    def row(numbers: tuple[float, ...]) -> str:
        return ", ".join(short(round(x, 4)) for x in numbers)

    lines = [Line(f"rewards {row(rewards)}", row(given), "advantages") for rewards, given in audit.advantages]
    note = "One group of four, one token each; values and greedy reward 0, reference equal to the policy."
    return Section("Advantages", tuple(lines), note)


def _invariance(audit: Audit) -> Section:
    lines = []
    for check, change in (("reward_shift", "R + c, one c a prompt"), ("reward_scale", "3·R")):
        for found in audit.findings:
            if found.check == check and found.number is not None:
                same = "unchanged" if found.number <= SIMILAR else "changed"
                lines.append(Line(change, short(found.number), f"the advantage is {same} (relative change)"))
    return Section("Rewards shifted and scaled", tuple(lines))


def _checks(audit: Audit) -> Section:
    lines = [
        Line(one.check, short(one.number), f"{one.status}: {one.detail}")
        for one in audit.findings
        if one.check not in ("reward_shift", "reward_scale") or one.status != NOT_APPLICABLE
    ]
    failed = sum(one.status == FAILED for one in audit.findings)
    note = "No check fails." if not failed else f"{failed} checks fail."
    return Section("Checks", tuple(lines), note)
