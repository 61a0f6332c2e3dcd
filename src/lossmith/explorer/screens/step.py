"""A step: four real outputs of the default model, token by token: what a loss pushes, and what becomes of them.

The policy is a table: the recorded log-probabilities after each prefix are its logits, one row a prefix, and a step
moves the rows that it visited. A network would move others with them; the gradient at each token is the same.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossmithError, quiet_traps
from lossmith.explorer.address import State
from lossmith.explorer.chosen import Chosen
from lossmith.explorer.screens.group import level
from lossmith.losses import Batch, Loss

__all__ = ["SHOWN", "Table", "outputs", "taken", "view"]

SHOWN = ("score1", "score2", "score3", "score4", "updates", "size", "token", "which")


@cache
def outputs() -> dict[str, Any]:
    """What was recorded: `python -m lossmith.explorer.record` writes it."""
    found: dict[str, Any] = json.loads((Path(__file__).parents[1] / "outputs.json").read_text("utf-8"))
    return found


@dataclass(frozen=True, eq=False)
class Table:
    """A policy with a row of logits for each prefix: M outcomes, the last of which is every token not listed."""

    logits: Tensor  # [K, M], -inf where there is no outcome
    state: Tensor  # [N, T], the row before each token
    choice: Tensor  # [N, T], the outcome that was sampled
    mask: Tensor  # [N, T]
    names: tuple[tuple[str, ...], ...]  # of the outcomes of each row

    def log_probs(self, logits: Tensor) -> Tensor:
        """[N, T], with gradient; 0 where there is no token."""
        return torch.where(self.mask, logits.log_softmax(1)[self.state, self.choice], 0.0)

    def entropy(self, logits: Tensor) -> Tensor:
        """[N, T] nats, of the listed outcomes and the rest."""
        p = logits.softmax(1)
        logp = torch.where(p > 0, logits.log_softmax(1), 0.0)
        return torch.where(self.mask, -(p * logp).sum(1)[self.state], 0.0)

    def kl(self, logits: Tensor) -> Tensor:
        """KL to the recorded policy before each token, [N, T], with gradient."""
        p, there = logits.softmax(1), torch.isfinite(self.logits)
        gap = torch.where(there, logits.log_softmax(1) - self.logits.log_softmax(1), 0.0)
        return torch.where(self.mask, (p * gap).sum(1)[self.state], 0.0)


@cache
def table() -> Table:
    """Of the recorded outputs. Outputs that begin alike share the rows of what they begin with."""
    rows: dict[tuple[int, ...], dict[int, tuple[str, float]]] = {}
    said = outputs()["outputs"]
    ids = [[token["id"] for token in one["tokens"]] for one in said]
    for one, mine in zip(said, ids, strict=True):
        for t, token in enumerate(one["tokens"]):
            rows.setdefault(tuple(mine[:t]), {}).update({i: (text, logp) for i, text, logp in token["top"]})
    number = {prefix: k for k, prefix in enumerate(rows)}
    width, longest = max(map(len, rows.values())) + 1, max(map(len, ids))
    logits = torch.full((len(rows), width), -math.inf, dtype=torch.float64)
    state, choice = (torch.zeros(len(ids), longest, dtype=torch.int64) for _ in range(2))
    for k, row in enumerate(rows.values()):
        for j, (_, logp) in enumerate(row.values()):
            logits[k, j] = logp
        rest = 1 - float(logits[k].exp().sum())
        logits[k, -1] = math.log(max(rest, 1e-6))
    for i, mine in enumerate(ids):
        for t, token_id in enumerate(mine):
            prefix = tuple(mine[:t])
            state[i, t], choice[i, t] = number[prefix], list(rows[prefix]).index(token_id)
    mask = torch.arange(longest) < torch.tensor([len(mine) for mine in ids])[:, None]
    names = tuple(tuple(text for text, _ in row.values()) for row in rows.values())
    return Table(logits, state, choice, mask, names)


def batch_at(loss: Loss, logits: Tensor, scores: list[float]) -> Batch:
    """What the loss sees with these logits: the recorded policy is sampler, old policy and reference."""
    of, start = table(), table().logits
    n, recorded = len(of.mask), of.log_probs(start)
    zero = torch.zeros(n, dtype=torch.int64)
    cut = torch.tensor([one["finish"] == "length" for one in outputs()["outputs"]])
    fields: dict[str, Any] = {
        "reward": torch.tensor(scores, dtype=torch.float64), "group": zero, "old_logp": recorded,
        "behavior_logp": recorded, "ref_logp": recorded, "entropy": of.entropy(logits), "full_kl": of.kl(logits),
        "truncated": cut, "off_policy": zero.bool(), "lag": zero,
    }  # fmt: skip
    wanted = loss.needs | {"old_logp", "reward", "group"}
    return Batch(of.log_probs(logits), of.mask, **{k: x for k, x in fields.items() if k in wanted})


def taken(loss: Loss, scores: list[float], updates: int, size: float) -> list[Tensor]:
    """The logits before the first update, and after each: plain gradient steps on the same four outputs."""
    path = [table().logits]
    for _ in range(updates):
        logits = path[-1].clone().requires_grad_()
        value = loss(batch_at(loss, logits, scores)).loss
        grad = torch.autograd.grad(value, logits)[0] if value.requires_grad else torch.zeros_like(logits)
        path.append(path[-1] - size * torch.nan_to_num(grad))
    return path


def view(state: State, losses: list[Chosen]) -> dict[str, Any]:
    """moves: a loss a row. of: the loss whose pushes are shown; outputs: its four; token: one of theirs."""
    scores = [state[f"score{i}"] for i in range(1, 5)]
    known = [one for one in losses if one.loss is not None]
    base: dict[str, Any] = {"about": outputs(), "moves": [], "without": [], "of": None, "outputs": [], "token": None}
    paths = {}
    for one in known:
        try:
            with quiet_traps():
                paths[one] = taken(one.loss, scores, state["updates"], state["size"])  # type: ignore[arg-type]
        except (LossmithError, NotImplementedError) as error:
            base["without"].append((one, str(error)))
            continue
        before, after = (table().log_probs(paths[one][i]).sum(1) for i in (0, -1))
        base["moves"].append({"one": one, "before": before.tolist(), "after": after.tolist()})
    if not paths:
        return base
    chosen = next((one for one in paths if one.place + 1 == state["which"]), next(iter(paths)))
    return base | {"of": chosen} | _shown(state, chosen, paths[chosen], scores)


def _shown(state: State, one: Chosen, path: list[Tensor], scores: list[float]) -> dict[str, Any]:
    loss = one.loss
    assert loss is not None
    of = table()
    with quiet_traps():
        batch = batch_at(loss, path[-1], scores)
        found, out = loss.anatomy(batch), loss(batch)
    pull = sum((p.value for p in found.pulls), torch.zeros(of.mask.shape, dtype=torch.float64)).detach()
    before, after = (of.log_probs(logits).exp() for logits in (path[0], path[-1]))
    stopped = next((link.value > 0 for link in found.ratio if link.name == "cut off"), torch.zeros_like(of.mask))
    largest = float(pull.abs().max())
    rows = []
    for i, said in enumerate(outputs()["outputs"]):
        tokens = [
            {
                "key": f"{i + 1}.{t + 1}", "text": token["text"], "level": level(float(pull[i, t]), largest),
                "pull": float(pull[i, t]), "before": float(before[i, t]), "after": float(after[i, t]),
                "stopped": bool(stopped[i, t]),
            }
            for t, token in enumerate(said["tokens"])
        ]  # fmt: skip
        n = len(tokens)
        rows.append(
            {
                "number": i + 1, "score": scores[i], "finish": said["finish"], "tokens": tokens,
                "advantage": float(out.advantage[i, :n].mean()), "pull": float(pull[i].sum()),
                "stopped": int(stopped[i, :n].sum()),
                "logp": (float(before[i, :n].log().sum()), float(after[i, :n].log().sum())),
            }
        )  # fmt: skip
    token = _token(state, rows, path, pull, found)
    return {"outputs": rows, "token": token, "loss": float(out.loss.detach()), "size": float(pull.norm())}


def _token(state: State, rows: list[dict[str, Any]], path: list[Tensor], pull: Tensor, found: Any) -> dict[str, Any]:
    """The token that is asked for, else the most pushed: what else could have stood there, and its chain of numbers."""
    i, t = divmod(int(pull.abs().argmax()), pull.shape[1])
    try:
        a, b = (int(x) - 1 for x in state["token"].split("."))
        if not (0 <= a < len(rows) and 0 <= b < len(rows[a]["tokens"])):
            raise ValueError
        i, t = a, b
    except ValueError:
        if state["token"]:
            state.problems.append(f"there is no token {state['token']!r}: write output.token, 2.7 say.")
    of = table()
    k = int(of.state[i, t])
    was, now = path[0][k].softmax(0), path[-1][k].softmax(0)
    names = [*of.names[k]]
    order = was[: len(names)].argsort(descending=True).tolist()
    others = [(names[j], float(was[j]), float(now[j]), j == int(of.choice[i, t])) for j in order]
    others.append(("all other tokens", float(was[-1]), float(now[-1]), False))
    chain = [(link.name, link.words, float(link.value.expand(of.mask.shape)[i, t])) for link in found.credit]
    chain += [(link.name, link.words, float(link.value.expand(of.mask.shape)[i, t])) for link in found.ratio]
    for part in found.pulls:
        chain += [
            (f"{part.name}: {link.name}", link.words, float(link.value.expand(of.mask.shape)[i, t]))
            for link in part.factors
        ]
    return {"key": rows[i]["tokens"][t]["key"], **rows[i]["tokens"][t], "others": others, "chain": chain}
