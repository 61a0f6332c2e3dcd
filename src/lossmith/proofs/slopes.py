"""Checks of the gradient: against the closed form, against finite differences, and at the edges."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses import Batch
from lossmith.losses.axes.trust import Tokens, Trust
from lossmith.proofs.finding import FAILED, PASSED, Finding, gap, judged, not_applicable
from lossmith.proofs.random_batches import (
    Draw,
    Evaluation,
    Fields,
    evaluate,
    gradients,
    make,
    over_tokens,
    random_fields,
)

__all__ = ["closed_form", "far_ratios", "finite_differences", "given_advantages", "zero_advantage"]

DRIFTS = (0.3, 1.5, 0.001)  # both sides of usual clips, far outside, and both sides of clips of a few ten-thousandths
STEP = 1e-6  # of the finite differences, nats


def closed_form(loss: Any, seed: int) -> Finding:
    """autograd dL/dlogp equals loss.closed_form_gradient(batch), and of single tokens w(r, A) is -(dℓ/dlogp)/A."""
    try:
        numbers = [_closed_gap(loss, random_fields(loss, seed, drift)) for drift in DRIFTS]
        numbers.append(_single_gap(loss))
    except NotImplementedError as error:
        return not_applicable("closed_form", f"the loss states no closed form ({error or 'not implemented'})")
    return judged("closed_form", max(numbers, key=_nan_first), 1e-12, "autograd dL/dlogp against the closed form")


def given_advantages(loss: Any, seed: int) -> Finding:
    """The same where the advantage is given: per completion, per token, all negative, and with exact zeros."""
    check, numbers = "given_advantages", []
    for drift in DRIFTS[:2]:
        for advantage in _advantages(loss, seed):
            fields = random_fields(loss, seed, drift) | {"advantage": advantage}
            try:
                numbers.append(_closed_gap(loss, fields))
            except NotImplementedError as error:
                return not_applicable(check, f"the loss states no closed form ({error or 'not implemented'})")
            except LossError as error:
                return not_applicable(check, f"refused: {error}")
    return judged(check, max(numbers, key=_nan_first), 1e-12, "with advantages given, autograd against the closed form")


def _advantages(loss: Any, seed: int) -> list[Tensor]:
    draw = Draw(seed, 0.0)
    n, t = draw.mask.shape
    row, token = draw.normal("given rows", n), draw.normal("given tokens", n, t)
    some = [row, -row.abs(), torch.where(row > 0, row, torch.zeros_like(row))]
    return some + ([token] if loss.coupling == "token" or not _per_sequence(loss) else [])


def _per_sequence(loss: Any) -> bool:
    """One ratio for a completion: what a given advantage per token means is the loss's own convention."""
    return bool(getattr(getattr(loss, "ratio_level", None), "per_sequence", True))


def _closed_gap(loss: Any, fields: Fields) -> float:
    if not hasattr(loss, "closed_form_gradient"):
        raise NotImplementedError
    batch, found = Batch(**fields), evaluate(loss, fields).gradients
    closed = {"logp": loss.closed_form_gradient(batch)}
    if hasattr(loss, "closed_form_beside"):
        closed |= loss.closed_form_beside(batch)
    return max((gap(found[name], slope) for name, slope in closed.items()), key=_nan_first)


def _single_gap(loss: Any) -> float:
    """The weight of the trust region against autograd of its value, on completions of one token at many ratios."""
    trust = getattr(loss, "trust", None)
    if not isinstance(trust, Trust):
        return 0.0
    ratio = torch.linspace(-3.0, 1.0, 82, dtype=torch.float64).exp()  # of a token of probability 0.3: none above 1
    advantage = torch.tensor([1.0, -0.7], dtype=torch.float64).repeat_interleave(len(ratio))[:, None]
    single = Tokens.single(ratio.repeat(2)[:, None], advantage, 0.3)
    logp = single.logp.clone().requires_grad_()
    at = dataclasses.replace(single, logp=logp, ratio=(logp - single.denominator_logp).exp())
    slope = torch.autograd.grad(trust.value(at).sum(), logp)[0]
    return gap(slope, -trust.weight(at.detach()) * advantage)


def _nan_first(x: float) -> tuple[bool, float]:
    return (x != x, x)


def finite_differences(loss: Any, seed: int) -> Finding:
    """The gradient is the derivative of the value, unless the loss stops a gradient and says so."""
    check, found = "finite_differences", []
    for drift in (0.3, 0.001):
        fields = random_fields(loss, seed, drift)
        grads = evaluate(loss, fields).gradients
        found += [_compare(loss, fields, leaf, grads[leaf]) for leaf in grads]
    number, dropped, slots = max(n for n, _, _ in found), sum(d for _, d, _ in found), sum(s for _, _, s in found)
    agrees = number <= 1e-5
    kinks = f"; {dropped} of {slots} slots lie at a kink" if dropped else ""
    if dropped > slots // 2:
        return Finding(check, FAILED, number, f"{dropped} of {slots} slots jump: the value is not smooth anywhere")
    declared = getattr(loss, "stops_gradient", None)
    if declared is None and not agrees:
        declared = closed_form(loss, seed).status == PASSED
        if not declared:
            return Finding(check, FAILED, number, "the gradient is not the derivative of the value, nor said to be so")
    if declared:
        detail = "the gradient is by design not the derivative of the value: the loss stops a gradient"
        if agrees and _constant_weight(loss):
            return not_applicable(
                check, "the loss stops a gradient, of a weight that is the same at these ratios", number
            )
        if agrees and not _differs_per_token(loss, seed):
            return Finding(check, FAILED, number, "said to stop a gradient, but the gradient is the derivative")
        return Finding(check, PASSED, number, detail + kinks)
    return Finding(check, PASSED if agrees else FAILED, number, "autograd against central differences" + kinks)


def _constant_weight(loss: Any) -> bool:
    """Whether the weight is one number from r = 1/2 to r = 2: a cap below, say."""
    try:
        found = [loss.weight(torch.tensor([0.5, 0.8, 1.0, 2.0], dtype=torch.float64), a) for a in (1.0, -1.0)]
    except (AttributeError, NotImplementedError, TypeError):
        return False
    return all(float(w.max() - w.min()) == 0 and float(w.max()) != 1 for w in found)


def _differs_per_token(loss: Any, seed: int) -> bool:
    """Whether the stop-gradient shows where the advantage differs between the tokens of a completion."""
    fields = random_fields(loss, seed)
    fields["advantage"] = Draw(seed, 0.0).normal("given tokens", *fields["mask"].shape)
    try:
        return _compare(loss, fields, "logp", evaluate(loss, fields).gradients["logp"])[0] > 1e-5
    except LossError:
        return False


def _compare(loss: Any, fields: Fields, leaf: str, grad: Tensor) -> tuple[float, int, int]:
    """(gap away from kinks, slots at a kink, slots) of one leaf. A kink: the one-sided slopes differ."""
    batch = Batch(**fields)
    here = float(loss(batch).loss)
    slots = over_tokens(fields["mask"], grad).expand_as(grad).nonzero().tolist()
    numeric, kept = torch.zeros_like(grad), torch.zeros_like(grad, dtype=torch.bool)
    scale = max(float(grad.abs().max()), 1e-3)
    for slot in map(tuple, slots):
        ends = []
        for step in (STEP, -STEP):
            moved = fields[leaf].clone()
            moved[slot] += step
            ends.append(float(loss(batch.replace(**{leaf: moved})).loss))
        up, down = (ends[0] - here) / STEP, (here - ends[1]) / STEP
        numeric[slot] = (ends[0] - ends[1]) / (2 * STEP)
        kept[slot] = abs(up - down) <= 1e-2 * scale
    difference = float(((numeric - grad).abs() * kept).max()) / scale
    return difference, len(slots) - int(kept.sum()), len(slots)


def far_ratios(loss: Any, seed: int) -> Finding:
    """Log-ratios of 40 nats, up and down, to the old, behavior and reference policies: loss and gradient finite."""
    base, sick = random_fields(loss, seed), 0
    others = [name for name in ("old_logp", "behavior_logp", "ref_logp") if name in base]
    cases = list(itertools.product((-40.0, 40.0), repeat=len(others)))
    for shifts in cases:
        far = dict(base) | {"logp": base["logp"] - 50}
        far |= {name: base["logp"] - 50 + shift for name, shift in zip(others, shifts, strict=True)}
        sick += not _finite(evaluate(loss, far))
    return judged(
        "far_ratios", float(sick), 0.0, f"batches with log-ratios of ±40 that are not finite, of {len(cases)}"
    )


def _finite(found: Evaluation) -> bool:
    return bool(torch.isfinite(found.value)) and all(bool(torch.isfinite(g).all()) for g in found.gradients.values())


def zero_advantage(loss: Any, seed: int) -> Finding:
    """With advantage 0 everywhere the policy term has no gradient: the completion is a trial, not a label."""
    check = "zero_advantage"
    fields = random_fields(loss, seed)
    fields["advantage"] = torch.zeros(len(fields["logp"]), dtype=torch.float64)
    leaves, batch = make(fields)
    try:
        output = loss(batch)
    except LossError as error:
        return not_applicable(check, f"refused: {error}")
    term = output.terms.get("policy")
    if term is None or not isinstance(output.advantage, Tensor):
        return not_applicable(check, "the loss has no policy term that an advantage multiplies")
    number = float(gradients(term, leaves)["logp"].abs().max())
    if getattr(getattr(loss, "trust", None), "acts_alone", False):
        return not_applicable(check, "the policy term holds a part that acts without an advantage", number)
    return judged(check, number, 0.0, "largest dL/dlogp of the policy term where every advantage is 0")
