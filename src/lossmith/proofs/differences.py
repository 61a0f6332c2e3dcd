"""The first difference between a foreign function and a named loss, in words.

Three ways to say it, the plainest that holds: the same numbers up to one factor (a sign, a normalizer); the same
numbers as a near relative of the named loss (another aggregation, another clip); or where it differs, by ratio and
sign of the advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, quiet_traps
from lossmith.losses import PolicyLoss
from lossmith.losses.axes.kl import KL
from lossmith.losses.composition.flat import AXES
from lossmith.proofs.finding import gap

__all__ = ["Comparison", "describe"]

Evaluated = tuple[Tensor, Tensor]  # value, dL/dlogp [N, T]
Evaluate = Callable[[dict[str, Tensor]], Evaluated]


@dataclass(frozen=True)
class Comparison:
    """One batch, seen by the loss and by the function."""

    function: str
    convention: str
    loss: PolicyLoss
    what: str  # what kind of batch it is
    fields: dict[str, Tensor]
    ours: Evaluated
    theirs: Evaluated

    def agrees(self, other: Evaluated, tolerance: float, sign: int = 1) -> bool:
        """Whether the function has this value and gradient, times the sign; not where either is not finite."""
        gaps = [gap(mine * sign, yours, 1e-9) for mine, yours in zip(other, self.theirs, strict=True)]
        return all(g <= tolerance for g in gaps)


def describe(
    found: Comparison, others: Sequence[Comparison], like: Callable[[PolicyLoss], Evaluate], tolerance: float
) -> str:
    """The difference in words. others: further batches, a single token first."""
    head = f"{found.function} is not {found.loss.name}, as the convention {found.convention!r} calls it"
    kinds = (
        _not_finite,
        partial(_sign, others[0]),
        _cut,
        _factor,
        partial(_relative, others, like),
        _leak,
        _stopped,
        _where,
    )
    for kind in kinds:
        said = kind(found, tolerance)
        if said:
            return f"{head}: {said}"
    raise AssertionError("no difference")  # the last kind always has something to say


def _not_finite(found: Comparison, tolerance: float) -> str:
    value, grad = found.theirs
    if math.isfinite(float(value)) and bool(torch.isfinite(grad).all()):
        return ""
    which = "the value" if not math.isfinite(float(value)) else "the gradient"
    return f"with {found.what}, {which} is not finite."


def _sign(single: Comparison, found: Comparison, tolerance: float) -> str:
    """A token that did well is made less likely."""
    ours, theirs = float(single.ours[1]), float(single.theirs[1])
    if ours * theirs >= 0:
        return ""
    exact = " Everything is that of the named loss times -1." if found.agrees(found.ours, tolerance, -1) else ""
    return (
        f"the sign. For a token with advantage 1 at ratio 1, dL/dlogp is {theirs:.4g} where {found.loss.name} has "
        f"{ours:.4g}: it makes rewarded completions less likely.{exact}"
    )


def _cut(found: Comparison, tolerance: float) -> str:
    """Pieces that do not add up."""
    if not found.what.startswith("micro-batches"):
        return ""
    return (
        f"the normalizer. With {found.what} the shares add up to {float(found.theirs[0]):.6g}, where the whole batch "
        f"has {float(found.ours[0]):.6g}: a piece must be divided by the counts of the whole, which the trainer hands "
        "over, and not by its own."
    )


def _factor(found: Comparison, tolerance: float) -> str:
    """The same up to one number."""
    factor = _proportion(found.ours[1], found.theirs[1], tolerance)
    if factor is None or abs(factor - 1) <= tolerance:
        return ""
    value = gap(found.ours[0] * factor, found.theirs[0], 1e-9) <= tolerance
    both = "value and gradient are" if value else "the gradient is"
    return f"the normalizer. With {found.what}, {both} {factor:.6g} times as large{_known(found, abs(factor))}."


def _proportion(ours: Tensor, theirs: Tensor, tolerance: float) -> float | None:
    norm = float((ours * ours).sum())
    if norm == 0:
        return None
    factor = float((ours * theirs).sum()) / norm
    return factor if factor != 0 and gap(ours * factor, theirs, 1e-12) <= tolerance else None


def _known(found: Comparison, factor: float) -> str:
    """Where such a factor comes from: the counts of this batch."""
    mask = found.fields["mask"]
    n, width, tokens = len(mask), mask.shape[1], int(mask.sum())
    live = int(mask.any(1).sum())
    counts = {
        "the number of tokens": tokens,
        "the number of completions": live,
        "the width of the batch": width,
        "the longest completion": int(mask.sum(1).max()),
        "the mean length": tokens / max(live, 1),
    }
    pairs = {f"all rows, the empty ones too ({n}), where {live} have tokens": live / n if n != live else 0.0}
    pairs[f"all positions ({n * width}), where {tokens} are valid"] = (
        tokens / (n * width) if tokens < n * width else 0.0
    )
    for words, count in counts.items():
        if count > 1 and math.isclose(factor, count, rel_tol=1e-5):
            return f", {words}: a sum where a mean is meant"
        if count > 1 and math.isclose(factor, 1 / count, rel_tol=1e-5):
            return f", 1 over {words} ({count:g}): divided by it once too often"
    for words, share in pairs.items():
        if share and math.isclose(factor, share, rel_tol=1e-5):
            return f": it divides by {words}"
    return ""


def _relative(
    others: Sequence[Comparison], like: Callable[[PolicyLoss], Evaluate], found: Comparison, tolerance: float
) -> str:
    """Its numbers are those of the named loss with one thing changed: of all that fit this batch, what fits most."""
    fits: dict[str, tuple[int, int]] = {}
    for words, loss in _relatives(found):
        for sign in (1, -1):
            if _fits(found, like(loss), sign, tolerance):
                more = sum(_fits(other, like(loss), sign, tolerance) for other in others)
                fits[words] = max(fits.get(words, (0, 0)), (more, sign))
    if not fits:
        return ""
    words, (count, sign) = max(fits.items(), key=lambda x: x[1][0])
    turned = " and the sign turned" if sign < 0 else ""
    if count == len(others):
        what = f"Its numbers are those of {words}{turned}"
    else:
        what = f"With {found.what}, its numbers are those of {words}{turned}; with others, something else differs too"
    return f"{_axis(words)}. {what}. {found.loss.name} has {_own(found.loss, words)}."


def _fits(other: Comparison, evaluate: Evaluate, sign: int, tolerance: float) -> bool:
    try:
        return other.agrees(evaluate(other.fields), tolerance, sign)
    except (LossError, RuntimeError):  # it needs what this batch does not hold, or has no gradient
        return False


def _relatives(found: Comparison) -> Iterator[tuple[str, PolicyLoss]]:
    """(what is changed, the loss) of everything that differs from it in one choice."""
    loss, width = found.loss, found.fields["mask"].shape[1]
    changes: list[dict[str, Any]] = []
    for axis in ("aggregate", "ratio_level", "trust", "mismatch", "token_mask", "sequence_mask", "extra"):
        for option in AXES[axis]:
            if option != getattr(loss, axis).option:
                changes.append({axis: option} | ({"max_length": width} if option.endswith("_norm") else {}))
    if loss.kl.in_loss:
        estimators = next(f.metadata["choices"] for f in KL.__dataclass_fields__.values() if f.name == "estimator")
        changes += [{"beta": 0.0}, *({"kl_estimator": x} for x in estimators if x != loss.kl.estimator)]
        changes += [{"kl_ratio_weight": not loss.to_dict()["kl_ratio_weight"]}]
    flat = loss.to_dict()
    if flat.get("entropy_coef"):
        changes.append({"entropy_coef": 0.0})
    if "denominator" in flat:
        changes.append({"denominator": "behavior" if flat["denominator"] == "old" else "old"})
    changes += _bounds(found, flat)
    for change in changes:
        try:
            with quiet_traps():
                yield ", ".join(f"{k}={v!r}" for k, v in change.items()), loss.replace(**change)
        except LossError:
            continue


def _bounds(found: Comparison, flat: dict[str, Any]) -> list[dict[str, Any]]:
    """Other bounds of the clip: exchanged, none or an outer one, and those at which the function's gradient stops."""
    changes: list[dict[str, Any]] = []
    if "dual_clip" in flat:
        changes += [{"dual_clip": None if flat["dual_clip"] else 3.0}]
    if {"clip_low", "clip_high"} <= flat.keys():
        low, high = flat["clip_low"], flat["clip_high"]
        changes += [{"clip_low": high, "clip_high": low}, {"clip_high": low}, {"clip_low": high}]
        above, below = _stops(found, 1), _stops(found, -1)
        changes += [{"clip_high": x} for x in above] + [{"clip_low": x} for x in below]
        changes += [{"clip_low": x, "clip_high": y} for x in below for y in above]
    return changes


def _stops(found: Comparison, sign: int) -> list[float]:
    """How far from 1 the ratio goes before a token loses its gradient: bounds in hundredths that fit what was seen."""
    ratio, advantage = _ratio(found), _advantage(found)
    side = found.fields["mask"] & (advantage * sign > 0) & ((ratio - 1) * sign > 0)
    gone = found.theirs[1] == 0
    moved = (ratio - 1).abs()
    kept, lost = moved[side & ~gone], moved[side & gone]
    if not len(lost):
        return []
    low, high = float(kept.max()) if len(kept) else 0.0, float(lost.min())
    return [k / 100 for k in range(max(1, math.ceil(low * 100)), math.floor(high * 100) + 1)][:20]


def _leak(found: Comparison, tolerance: float) -> str:
    """A gradient at masked positions, or a loss that reads them."""
    mask, grad = found.fields["mask"], found.theirs[1]
    stray = (grad != 0) & ~mask
    if bool(stray.any()):
        row, token = stray.nonzero()[0].tolist()
        return (
            f"the mask. With {found.what}, {int(stray.sum())} masked positions get a gradient, the first at row {row}, "
            f"position {token} ({float(grad[row, token]):.3g})."
        )
    if found.what.startswith("other numbers"):
        return (
            "the mask. Other numbers at masked positions change "
            + ("its gradient." if gap(found.ours[1], grad, 1e-9) > tolerance else "its value.")
            + " They are read before the mask is applied."
        )
    return ""


def _stopped(found: Comparison, tolerance: float) -> str:
    """The same value with another gradient: something is detached that is not in the named loss, or the reverse."""
    if gap(found.ours[0], found.theirs[0], 1e-9) > tolerance:
        return ""
    tokens = int(found.fields["mask"].sum())
    apart = _apart(found, tolerance)
    none = int((apart & (found.theirs[1] == 0)).sum())
    what = f"{none} of them get none" if none else "none of them is 0"
    return (
        f"the gradient. With {found.what}, the value agrees, and dL/dlogp differs at {int(apart.sum())} of {tokens} "
        f"tokens ({what}): a factor is detached that carries gradient in {found.loss.name}, or the reverse. "
        f"{_first(found, apart)}"
    )


def _where(found: Comparison, tolerance: float) -> str:
    """By side of the ratio and sign of the advantage."""
    apart = _apart(found, tolerance)
    if not bool(apart.any()):
        return (
            f"the value. With {found.what}, every gradient agrees, but the value is {float(found.theirs[0]):.6g} where "
            f"{found.loss.name} has {float(found.ours[0]):.6g}."
        )
    parts = [part for sign, word in ((1, "A > 0"), (-1, "A < 0")) if (part := _stretches(found, apart, sign, word))]
    clip = bool((apart & ((found.theirs[1] == 0) != (found.ours[1] == 0))).any())
    kind = "the side of the clip" if clip else "the gradient"
    return f"{kind}. With {found.what}, dL/dlogp differs at {' and '.join(parts)}. {_first(found, apart)}"


def _stretches(found: Comparison, apart: Tensor, sign: int, word: str) -> str:
    """Where along the ratio the tokens of this sign differ."""
    side = found.fields["mask"] & (_advantage(found) * sign > 0)
    ratio, order = _ratio(found)[side].sort()
    differs = apart[side][order]
    if not bool(differs.any()):
        return ""
    edges = differs.int().diff(prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten() - 1
    spans = [f"{float(ratio[a]):.3g} to {float(ratio[b]):.3g}" for a, b in zip(starts, ends, strict=True)]
    where = ", ".join(spans) if len(spans) <= 4 else f"{float(ratio[starts[0]]):.3g} to {float(ratio[ends[-1]]):.3g}"
    return f"{int(differs.sum())} of {len(differs)} tokens with {word}, at ratios {where}"


def _apart(found: Comparison, tolerance: float) -> Tensor:
    scale = max(float(found.ours[1].abs().max()), float(found.theirs[1].abs().max()), 1e-9)
    return ((found.ours[1] - found.theirs[1]).abs() > tolerance * scale) & found.fields["mask"]


def _first(found: Comparison, apart: Tensor) -> str:
    row, token = apart.nonzero()[0].tolist()
    ours, theirs = float(found.ours[1][row, token]), float(found.theirs[1][row, token])
    at = f"ratio {float(_ratio(found)[row, token]):.4g}, advantage {float(_advantage(found)[row, token]):.3g}"
    return f"First at row {row}, token {token} ({at}): {theirs:.4g} where {found.loss.name} has {ours:.4g}."


def _ratio(found: Comparison) -> Tensor:
    return (found.fields["logp"] - found.fields["old_logp"]).exp()


def _advantage(found: Comparison) -> Tensor:
    advantage = found.fields["advantage"]
    return (advantage if advantage.ndim == 2 else advantage[:, None]).expand(found.fields["mask"].shape)


def _axis(words: str) -> str:
    """What kind of choice was changed."""
    kinds = {
        "aggregate": "the normalizer",
        "ratio_level": "the ratio",
        "denominator": "the ratio",
        "trust": "the trust region",
        "clip_low": "the side of the clip",
        "clip_high": "the side of the clip",
        "dual_clip": "the side of the clip",
        "mismatch": "the mismatch weight",
        "beta": "the KL term",
        "kl_estimator": "the KL term",
        "kl_ratio_weight": "the KL term",
    }
    return kinds.get(words.split("=")[0], "one term")


def _own(loss: PolicyLoss, words: str) -> str:
    """The same choices as the named loss has them."""
    flat = loss.to_dict()
    names = [part.split("=")[0] for part in words.split(", ") if part.split("=")[0] in flat]
    return ", ".join(f"{name}={flat[name]!r}" for name in names)
