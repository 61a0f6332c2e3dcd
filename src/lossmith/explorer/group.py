"""The third screen: one group of completions, from rewards to what each token is told."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.explorer.chosen import build
from lossmith.explorer.numbers import printed
from lossmith.explorer.state import State
from lossmith.losses import Batch, Loss
from lossmith.losses.anatomy import Link
from lossmith.proofs.length import neutral_fields
from lossmith.proofs.random_batches import evaluate

__all__ = ["fields_of_group", "group"]

_OLD = math.log(0.05)  # of every token; low, so that it can become five times as likely


def group(calls: list[str], state: State) -> dict[str, Any]:
    """The group as each of these losses sees it."""
    return {
        "rewards": [printed(r) for r in state.rewards],
        "lengths": list(state.lengths),
        "cut": [bool(c) for c in state.cut],
        "old": printed(math.exp(_OLD)),
        "losses": [_seen(build(call), state) for call in calls],
    }


def fields_of_group(loss: Loss, state: State) -> dict[str, Tensor]:
    """The batch: every token as likely as every other, moved by the same ratio, as far from the reference.

    ProofError: the loss needs what no batch can be made up with.
    """
    lengths = torch.tensor(state.lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    fields = neutral_fields(loss, mask)
    old = torch.where(mask, torch.tensor(_OLD, dtype=torch.float64), 0.0)
    logp = torch.where(mask, old + math.log(state.ratio), 0.0)
    moved = {"logp": logp, "old_logp": old, "behavior_logp": old, "ref_logp": logp - state.kappa * mask}
    reward = torch.tensor(state.rewards, dtype=torch.float64)
    moved |= {"reward": reward, "truncated": torch.tensor(state.cut).bool(), "advantage": reward}
    if "reward_parts" in fields:
        moved["reward_parts"] = torch.stack([reward, torch.zeros_like(reward)], 1)
    return fields | {name: value for name, value in moved.items() if name in fields}


def _seen(loss: Loss, state: State) -> dict[str, Any]:
    try:
        fields = fields_of_group(loss, state)
        found = evaluate(loss, fields)
        anatomy = loss.anatomy(Batch(**fields))
    except (LossError, NotImplementedError) as error:
        return {"error": str(error)}
    mask, push = fields["mask"], -found.gradients["logp"]
    largest = float(push.abs().max())
    return {
        "error": "",
        "value": printed(float(found.value)),
        "columns": [{"name": link.name, "words": link.words} for link in anatomy.credit],
        "rows": [
            {
                "credit": [_row(link, i, mask) for link in anatomy.credit],
                "tokens": [
                    {"text": printed(x), "size": x / largest if largest else 0.0} for x in push[i][mask[i]].tolist()
                ],
                "total": printed(float(push[i].sum())),
                "pushed": _direction(float(push[i].sum()), largest),
            }
            for i in range(len(mask))
        ],
        "pulls": [
            {
                "name": pull.name,
                "factors": [
                    {"name": f.name, "words": f.words, "rows": [_row(f, i, mask) for i in range(len(mask))]}
                    for f in pull.factors
                ],
                "rows": [_row(Link("", pull.value), i, mask) for i in range(len(mask))],
            }
            for pull in anatomy.pulls
        ],
        "note": _note(state, largest),
    }


def _row(link: Link, i: int, mask: Tensor) -> str:
    """A completion's number; where its tokens differ, each of them."""
    values = [printed(x) for x in link.value[i][mask[i]].tolist()]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def _direction(total: float, largest: float) -> str:
    if abs(total) <= 1e-12 * max(largest, 1.0):
        return "not pushed"
    return "more likely" if total > 0 else "less likely"


def _note(state: State, largest: float) -> str:
    if largest > 1e-12:
        return ""
    if len(state.rewards) == 1:
        return "A group of one has nothing to be compared with here: no token is pushed."
    if len(set(state.rewards)) == 1:
        return "All rewards are equal: no completion is better than another, and no token is pushed."
    return "No token is pushed in this group."
