"""The conformance suite: what every loss must pass, ours or yours.

check_loss(my_loss) raises with the list of what fails; prove(my_loss) gives every finding with its number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lossmith.errors import ProofError, nearest
from lossmith.proofs import halves, invariances, listing, round_trip, slopes
from lossmith.proofs.enumeration import bias, default_world, group_gradients
from lossmith.proofs.finding import FAILED, PASSED, Finding, not_applicable, worst
from lossmith.proofs.printed.check import formula
from lossmith.proofs.random_batches import batch_fields

__all__ = ["CHECKS", "check_loss", "prove", "raises_reward"]


def raises_reward(loss: Any, seed: int) -> Finding:
    """On-policy, the expected step of the policy term raises E[r]: an overall sign that is wrong shows here only."""
    check = "raises_reward"
    if not {"reward", "reward_parts", "advantage"} & set(loss.needs):
        return not_applicable(check, "the loss reads no reward")
    # nothing is truncated: a loss that takes the score of truncated completions away climbs another E[r]
    world = dataclasses.replace(default_world(seed), truncates=False)
    try:
        gradients = group_gradients(loss, world, size=3, main=True)
    except ProofError as error:
        return not_applicable(check, str(error))
    found = bias(gradients, world.true_gradient(), gradients.main)
    if found.norm_ratio == 0:
        return not_applicable(check, "on-policy the expected gradient is 0", 0.0)
    status = PASSED if found.cosine > 0 else FAILED
    return Finding(check, status, found.cosine, "cosine of the expected step and ∇E[r], on-policy, groups of 3")


CHECKS: dict[str, Callable[[Any, int], Finding]] = {
    check.__name__: check
    for check in (
        slopes.closed_form,
        slopes.given_advantages,
        slopes.finite_differences,
        slopes.far_ratios,
        slopes.zero_advantage,
        halves.homogeneous,
        halves.reads,
        invariances.masked_positions,
        invariances.padding,
        invariances.row_order,
        invariances.group_labels,
        invariances.micro_batches,
        invariances.ranks,
        invariances.single_precision,
        invariances.all_masked,
        invariances.empty_rows,
        round_trip.deterministic,
        round_trip.inputs_untouched,
        formula,
        round_trip.round_trip,
        listing.listing,
        round_trip.reward_shift,
        round_trip.reward_scale,
        raises_reward,
    )
}


def prove(loss: Any, seeds: Iterable[int] = (0, 1)) -> list[Finding]:
    """Every check on batches of these seeds, the worst finding of each. A check that raises has failed.

    ProofError: the loss needs something that no random batch can hold.
    """
    batch_fields(loss)
    seeds = tuple(seeds)
    return [worst(_run(name, loss, seed) for seed in seeds) for name in CHECKS]


def check_loss(loss: Any, seeds: Iterable[int] = (0, 1), waived: Mapping[str, str] | None = None) -> None:
    """ProofError with the list of what fails; nothing if all is well.

    waived: {check: why this loss need not pass it}. A waiver of a check that passes is an error too.
    """
    waived = waived or {}
    unknown = waived.keys() - CHECKS.keys()
    if unknown:
        raise ProofError(f"there is no check {min(unknown)!r}.{nearest(min(unknown), CHECKS)}")
    found = prove(loss, seeds)
    failures = [finding for finding in found if finding.status == FAILED and finding.check not in waived]
    needless = [finding.check for finding in found if finding.check in waived and finding.status != FAILED]
    if needless:
        raise ProofError(f"{loss.name} does not fail {', '.join(needless)}: drop the waiver.")
    if failures:
        lines = [f"  {f.check}: {f.detail}" + ("" if f.number is None else f" ({f.number:.3g})") for f in failures]
        raise ProofError(f"{loss.name} fails {len(failures)} of {len(CHECKS)} checks:\n" + "\n".join(lines))


def _run(name: str, loss: Any, seed: int) -> Finding:
    try:
        return CHECKS[name](loss, seed)
    except Exception as error:  # whatever a loss of someone else raises is a finding, not the end of the suite
        return Finding(name, FAILED, None, f"raised {type(error).__name__}: {error}")
