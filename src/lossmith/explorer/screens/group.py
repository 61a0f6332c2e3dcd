"""A group: from typed rewards and lengths to the baseline, the advantages, each token's weight, and who is pushed."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossmithError, quiet_traps
from lossmith.explorer.address import State
from lossmith.explorer.chosen import Chosen
from lossmith.explorer.drawing import figure
from lossmith.losses import Batch, Loss, PolicyLoss
from lossmith.losses.anatomy import Anatomy

__all__ = ["EXAMPLES", "SHOWN", "batch_of", "level", "number_of", "read_groups", "view"]

SHOWN = ("rewards", "lengths", "budget", "moved", "away")
MOST = 16  # completions
EXAMPLES = {  # what is worth a look, as (rewards, lengths, budget)
    "one winner": ("1 0 0 0", "12 4 8 6", 16),
    "all the same": ("1 1 1 1", "12 4 8 6", 20),
    "a group of one": ("0.7", "6", 16),
    "easy and hard prompt": ("1 1 1 0 | 0 0 0 1", "5 5 5 5 | 5 5 5 5", 16),
    "short and long, both right": ("1 1 0 0", "3 18 3 18", 30),
    "cut off by the budget": ("0.9 0.4 0.6 0.2", "8 16 16 5", 16),
}


def view(state: State, losses: list[Chosen]) -> dict[str, Any]:
    """blocks: a loss each, with a row a completion."""
    rewards, lengths = read_groups(state)
    examples = [
        (name, state.query([o.spec for o in losses], rewards=r, lengths=n, budget=b))
        for name, (r, n, b) in EXAMPLES.items()
    ]
    known = [one for one in losses if one.loss is not None]
    blocks = [_block(one, state, rewards, lengths) for one in known]
    largest = max((abs(x) for b in blocks for row in b.get("rows", []) for x in row["tokens"]), default=0.0)
    for block in blocks:
        for row in block.get("rows", []):
            row["levels"] = [level(x, largest) for x in row["tokens"]]
    return {"blocks": blocks, "examples": examples}


def read_groups(state: State) -> tuple[list[list[float]], list[list[int]]]:
    """(rewards, lengths) of each prompt's completions. What cannot be read is a problem, and the usual is shown."""
    rewards = _lists(state, "rewards", -1e6, 1e6)
    lengths = _lists(state, "lengths", 1, 40)
    if sum(map(len, rewards)) > MOST:
        state.problems.append(f"rewards holds {sum(map(len, rewards))} numbers; at most {MOST} are shown.")
        rewards = [rewards[0][:MOST]]
    flat = [int(min(x, state["budget"])) for row in lengths for x in row]
    flat += [min(4, state["budget"])] * sum(map(len, rewards))  # a completion without a length has 4 tokens
    places = iter(flat)
    return rewards, [[next(places) for _ in row] for row in rewards]


def _lists(state: State, name: str, low: float, high: float) -> list[list[float]]:
    text = state[name]
    try:
        found = [[float(x) for x in re.split(r"[\s,;]+", part.strip()) if x] for part in text.split("|")]
        if not any(found) or not all(low <= x <= high for row in found for x in row):
            raise ValueError
    except ValueError:
        about = f"numbers from {low:g} to {high:g}, | between prompts"
        state.problems.append(f"{name} is {text!r}, but holds {about}; shown with the usual ones.")
        return [[1.0, 0.0, 0.0, 0.0]] if name == "rewards" else [[12.0, 4.0, 8.0, 6.0]]
    return [row for row in found if row]


def batch_of(
    loss: Loss, rewards: list[list[float]], lengths: list[list[int]], budget: int, ratio: float = 1.0, away: float = 0.0
) -> Batch:
    """The batch that the numbers describe: every token at this ratio to the old policy, and this far from the
    reference. LossError: the loss needs something that rewards and lengths do not say."""
    rows = [n for group in lengths for n in group]
    mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    old = torch.where(mask, math.log(0.3), 0.0).double()
    logp = torch.where(mask, old + math.log(ratio), 0.0)
    group = torch.tensor([g for g, row in enumerate(rewards) for _ in row])
    zero, one = torch.zeros_like(old), torch.zeros(len(rows), dtype=torch.int64)
    fields: dict[str, Any] = {
        "reward": torch.tensor([x for row in rewards for x in row], dtype=torch.float64),
        "group": group, "old_logp": old, "behavior_logp": old, "ref_logp": logp - away, "entropy": zero,
        "full_kl": zero, "truncated": torch.tensor([n >= budget for n in rows]), "off_policy": one.bool(), "lag": one,
        "value": zero, "old_value": zero,
    }  # fmt: skip
    wanted = loss.needs | {"old_logp"} | (loss.credit_reads & {"value", "old_value"})
    return Batch(logp, mask, **{k: x for k, x in fields.items() if k in wanted or k in ("reward", "group")})


def _block(one: Chosen, state: State, rewards: list[list[float]], lengths: list[list[int]]) -> dict[str, Any]:
    loss = one.loss
    assert loss is not None
    try:
        with quiet_traps():
            batch = batch_of(loss, rewards, lengths, state["budget"], state["moved"], state["away"])
            found = loss.anatomy(batch)
            out = loss(batch)
            credit = loss.credit(batch)
    except (LossmithError, NotImplementedError) as error:
        return {"one": one, "error": str(error)}
    pull = sum((p.value for p in found.pulls), torch.zeros(batch.valid.shape, dtype=torch.float64)).detach()
    links = [link for link in found.credit if link.name != "score"]  # that is the reward as it was typed
    rows = []
    for i in range(len(batch.valid)):
        n = int(batch.lengths[i])
        rows.append(
            {
                "prompt": int(batch.group[i]) + 1 if batch.group is not None else 1,
                "reward": float(batch.require("reward", loss.name)[i]),
                "length": n,
                "cut": n >= state["budget"],
                "credit": [number_of(link.value, i, n) for link in links],
                "weight": float(credit.weight[i, 0]) if isinstance(loss, PolicyLoss) else None,
                "tokens": [float(x) for x in pull[i, :n]],
                "whole": float(pull[i].sum()),
            }
        )
    return {
        "one": one,
        "heads": [(link.name, link.words) for link in links],
        "rows": rows,
        "differs": any(min(row["tokens"]) != max(row["tokens"]) for row in rows),
        "pulls": [
            {
                "name": part.name,
                "heads": [(link.name, link.words) for link in part.factors],
                "rows": [
                    [_numbers(x, i, row["length"]) for x in (*(link.value for link in part.factors), part.value)]
                    for i, row in enumerate(rows)
                ],
            }
            for part in found.pulls
        ],
        "loss": float(out.loss.detach()),
        "size": float(pull.norm()),
        "notes": _notes(loss, found, rows, state),
        "weights": isinstance(loss, PolicyLoss),
        "reads_value": bool((loss.needs | loss.credit_reads) & {"value", "old_value"}),
    }


def number_of(x: Tensor, i: int, n: int) -> float | None:
    """A completion's number, or the first of its tokens'; None where they differ."""
    row = x.expand(x.shape[0], -1)[i, :n] if x.ndim == 2 else x[i : i + 1]
    return float(row[0]) if len(row) and bool((row == row[0]).all()) else None


def _numbers(x: Tensor, i: int, n: int) -> str:
    """A completion's number as text; where its tokens differ, each of them."""
    one = number_of(x.detach(), i, n)
    return figure(one) if one is not None else ", ".join(map(figure, x.expand(x.shape[0], -1)[i, :n].tolist()))


def _notes(loss: Loss, found: Anatomy, rows: list[dict[str, Any]], state: State) -> list[str]:
    """What a newcomer would trip over, where it is so."""
    notes = []
    pushed = [abs(row["whole"]) for row in rows]
    sizes = {row["prompt"]: sum(r["prompt"] == row["prompt"] for r in rows) for row in rows}
    for prompt, size in sizes.items():
        mine = [row for row in rows if row["prompt"] == prompt]
        still = all(abs(row["whole"]) < 1e-12 for row in mine)
        name = f"prompt {prompt}" if len(sizes) > 1 else "this prompt"
        if still and size == 1:
            notes.append(f"{name} has one completion: there is nothing to compare it with, and nothing is pushed")
        elif still and len({row["reward"] for row in mine}) == 1:
            notes.append(f"all completions of {name} have the same reward: nothing is pushed")
    if any(row["cut"] for row in rows):
        what = {"keep": "count like others", "mask": "leave the loss", "zero": "get the reward 0"}[loss.of_truncated]
        notes.append(f"completions that the token budget cut off {what}")
    if state["moved"] == 1 and max(pushed, default=0) > 0 and getattr(loss, "uses_old", False):
        notes.append("at ratio 1 nothing is clipped: move the ratio to see the trust region act")
    return notes


def level(x: float, largest: float) -> str:
    """A class for a token's color: its sign, and five sizes."""
    if not x or not largest:
        return "z"
    return ("p" if x > 0 else "m") + str(max(1, math.ceil(5 * abs(x) / largest - 1e-9)))
