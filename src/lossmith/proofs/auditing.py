"""The audit of a loss: what it provably does, as plain data. What a reader sees is made from it in words.py."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, ProofError, quiet_traps
from lossmith.losses import CATALOGUE, PolicyLoss
from lossmith.proofs.checks import prove
from lossmith.proofs.enumeration import Bias, World, bias, default_world, group_gradients, long_world
from lossmith.proofs.finding import Finding
from lossmith.proofs.kl_terms import Push, kl_push
from lossmith.proofs.length import LengthWeights, length_weights, neutral_fields
from lossmith.proofs.random_batches import batch_fields, evaluate
from lossmith.proofs.scenarios import (
    GROUP,
    Difficulty,
    Distance,
    baseline_variances,
    difficulty,
    normalized,
    off_policy,
    unscaled,
    without_kl,
)

__all__ = ["MAX_LENGTH", "REWARDS", "Audit", "audit", "with_max_length"]

MAX_LENGTH = 8  # filled in where a loss needs a token limit and has none
REWARDS = ((1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Audit:
    """Everything measured about one loss. None: does not apply to it, or could not be enumerated (see notes)."""

    name: str
    formula: str
    latex: str
    paper: str | None
    year: int | None
    summary: str | None
    needs: tuple[str, ...]
    coupling: str
    traps: tuple[str, ...]
    notes: tuple[str, ...]  # what was filled in, what could not be enumerated
    group_size: int
    beta: float  # coefficient of the KL to the reference, 0 without
    kl_place: str | None  # loss | reward
    on_policy: Bias | None  # of what follows the reward, without KL, against ∇E[r]
    long: Bias | None  # the same for completions of one to six tokens
    long_normalized: Bias | None  # and divided by constant counts; None where that changes nothing
    unscaled: Bias | None  # the same as on_policy, without dividing the advantages
    exact_critic: Bias | None  # the same as on_policy, with exact values where the loss has a critic
    with_kl: Bias | None  # of policy and KL together, against ∇(E[r] - β·KL)
    noise_to_reinforce: float | None  # variance at equal expected gradient, over that of REINFORCE without a baseline
    noise_to_leave_one_out: float | None
    off_policy: tuple[Distance, ...]
    mismatch: tuple[Distance, ...]  # only the sampler stands away
    difficulty: tuple[Difficulty, ...]
    difficulty_unscaled: tuple[Difficulty, ...]  # the same loss without dividing its advantages; () if it does not
    length: LengthWeights | None
    advantages: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]  # rewards of a group, its advantages
    push: tuple[Push, ...]  # of the KL term alone
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; what is not finite becomes text."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain


def audit(loss: Any, seeds: tuple[int, ...] = (0,)) -> Audit:
    """Everything there is to say about this loss. seeds: of the random batches of the checks."""
    loss, notes = with_max_length(loss)
    entry = CATALOGUE.get(loss.name)
    beta, place = _kl(loss)
    unknown = _unknown_fields(loss)
    measured, more = (_NOTHING, (unknown,)) if unknown else _measured(loss, beta, place)
    return Audit(
        name=loss.name,
        formula=loss.formula("text"),
        latex=_latex(loss),
        paper=entry.paper if entry else None,
        year=entry.year if entry else None,
        summary=entry.summary if entry else None,
        needs=tuple(sorted(loss.needs)),
        coupling=loss.coupling,
        traps=tuple(loss.traps),
        notes=(*notes, *more),
        group_size=GROUP,
        beta=beta,
        kl_place=place,
        length=None if unknown else length_weights(loss),
        advantages=() if unknown else _advantages(loss),
        findings=() if unknown else tuple(prove(loss, seeds)),
        **measured,
    )


def _latex(loss: Any) -> str:
    """Empty where the formula cannot be read, which the check `formula` says."""
    try:
        return str(loss.formula("latex"))
    except LossError:
        return ""


def with_max_length(loss: Any) -> tuple[Any, tuple[str, ...]]:
    """(the loss with a token limit, what was filled in)."""
    if "max_length" not in loss.needs:
        return loss, ()
    if not isinstance(loss, PolicyLoss):
        raise ProofError(f"{loss.name} needs max_length: build it with max_length=... and audit that.")
    with quiet_traps():
        filled = PolicyLoss.from_dict(loss.to_dict() | {"max_length": MAX_LENGTH})
    return filled, (f"max_length = {MAX_LENGTH} was filled in",)


def _unknown_fields(loss: Any) -> str:
    """Why nothing can be measured; "" if it can."""
    try:
        batch_fields(loss)
    except ProofError as error:
        return f"nothing is measured: {error}"
    return ""


def _kl(loss: Any) -> tuple[float, str | None]:
    """(coefficient, place) of the KL to the reference policy; (0, None) without one."""
    kl = getattr(loss, "kl", None)
    if kl is None or not kl.active or not {"ref_logp", "full_kl"} & set(loss.needs):
        return 0.0, None
    return float(kl.beta), str(kl.place)


_NOTHING: dict[str, Any] = {
    "on_policy": None,
    "long": None,
    "long_normalized": None,
    "unscaled": None,
    "exact_critic": None,
    "with_kl": None,
    "noise_to_reinforce": None,
    "noise_to_leave_one_out": None,
    "off_policy": (),
    "mismatch": (),
    "difficulty": (),
    "difficulty_unscaled": (),
    "push": (),
}


def _measured(loss: Any, beta: float, place: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What comes from enumeration, by field; and notes where it does not."""
    world, far, bare = default_world(), long_world(), without_kl(loss)
    try:
        whole = group_gradients(loss, world, GROUP)
        alone = bias(whole, world.true_gradient(), whole.main) if bare is loss else _expected(bare, world)
        rest, critic = unscaled(bare), "value" in loss.needs
        found = _NOTHING | {
            "on_policy": alone,
            "long": _expected(bare, far),
            "long_normalized": _normalized(bare, far),
            "off_policy": tuple(off_policy(loss)),
            "mismatch": tuple(off_policy(loss, (0.01, 0.1), sampler_only=True)),
            "difficulty": tuple(difficulty(loss)),
            "difficulty_unscaled": tuple(difficulty(rest)) if rest is not None else (),
            "unscaled": _expected(rest, world) if rest is not None else None,
            "exact_critic": _expected(bare, dataclasses.replace(world, exact_critic=True)) if critic else None,
        }
    except (ProofError, LossError) as error:
        return _NOTHING, (f"not enumerated: {error}",)
    if beta:
        both = whole.plus(*(t for t in ("policy", "kl") if t in whole.terms)) if "policy" in whole.terms else whole
        found["with_kl"] = bias(both, world.true_gradient(beta))
    if place == "loss":
        found["push"] = tuple(kl_push(loss, beta))
    return found | _noise(found["on_policy"]), _conventions(loss)


def _conventions(loss: Any) -> tuple[str, ...]:
    """What a reader has to know about the numbers of this loss."""
    notes = []
    if getattr(loss, "shaping", ()) or getattr(loss, "truncated", "keep") != "keep":
        notes.append("E[r] is of the scores as given, before this loss shapes, masks or zeroes them")
    if getattr(loss, "entropy_coef", 0):
        notes.append("the entropy bonus is not part of what is compared with ∇E[r]")
    return tuple(notes)


def _expected(loss: Any, world: World) -> Bias:
    """What follows the reward, against ∇E[r]."""
    gradients = group_gradients(loss, world, GROUP, main=True)
    return bias(gradients, world.true_gradient(), gradients.main)


def _normalized(loss: Any, world: World) -> Bias | None:
    """_expected with constant counts; None where the loss does not divide by what varies."""
    constant = normalized(loss, world)
    if constant is None:
        return None
    one, other = _expected(constant, world), _expected(loss, world)
    return None if abs(one.residual - other.residual) < 1e-9 else one


def _noise(found: Bias) -> dict[str, float | None]:
    """Variance at equal expected gradient (divided by c²) over that of the two plain estimators."""
    if found.scale <= 0:
        return {"noise_to_reinforce": None, "noise_to_leave_one_out": None}
    plain = baseline_variances(GROUP)
    equal = found.variance / found.scale**2
    return {
        "noise_to_reinforce": equal / plain["reinforce"],
        "noise_to_leave_one_out": equal / plain["leave_one_out"],
    }


def _advantages(loss: Any) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
    """A of one group of four one-token completions; values 0, greedy reward 0, reference equal to the policy."""
    rows = []
    for rewards in REWARDS:
        reward = torch.tensor(rewards, dtype=torch.float64)
        fields = neutral_fields(loss, torch.ones(len(rewards), 1, dtype=torch.bool))
        if "reward" not in loss.needs:
            return ()
        advantage = evaluate(loss, fields | {"reward": reward}).output.advantage
        if not isinstance(advantage, Tensor):
            return ()
        rows.append((rewards, tuple(advantage[:, 0].tolist())))
    return tuple(rows)


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
