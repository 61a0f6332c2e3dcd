"""The tour: ten pages for whoever has never seen RLHF, made of the same screens, every one of which can be changed."""

from __future__ import annotations

import dataclasses
import shlex
from functools import cache
from typing import Any

from lossmith.errors import LossError, quiet_traps
from lossmith.explorer.address import FIELDS, State
from lossmith.explorer.chosen import Chosen
from lossmith.explorer.screens import group, loss, step, truth, weight
from lossmith.losses.axes.kl import kl_estimate
from lossmith.prompts import default_prompts_path, load_prompts, message_text

__all__ = ["PAGES", "START", "tour_view"]

START = "grpo"
PAGES = (
    "Questions without answers",
    "The model writes",
    "Somebody judges",
    "Better than the others?",
    "A loss of 0 that teaches",
    "Not too far: ratio and clipping",
    "Not too strange: the KL penalty",
    "The update",
    "When the score is not what you wanted",
    "The real thing",
)
_SCREENS = ("loss", "step", "step", "step", "step", "weight", "truth", "step", "truth", "loss")
_SCORES = ("score1", "score2", "score3", "score4")
_SHOWN = {
    2: ("token",),
    3: _SCORES,
    4: _SCORES,
    5: (*_SCORES,),
    6: ("ratio",),
    7: ("kappa",),
    8: ("updates", "size", *_SCORES),
    9: ("beta", "steps"),
}


@cache
def _prompts() -> tuple[str, ...]:
    found = load_prompts(default_prompts_path())
    return tuple(p.content if isinstance(p.content, str) else message_text(p.content[-1]) for p in found)


def tour_view(state: State, losses: list[Chosen]) -> dict[str, Any]:
    """page, title, the screen that it belongs to, the fields that it shows, and what its template says."""
    page = state["tour"]
    specs = [one.spec for one in losses]
    makers = {6: weight.view, 10: loss.view}
    made: dict[str, Any] = {}
    if page == 1:
        made = {"prompts": _prompts()[:6], "count": len(_prompts())}
    elif page in (2, 3, 4, 5, 8):
        made = step.view(_at_start(state) if page != 8 else state, losses)
        made["parts"] = [one["parts"] for one in step.outputs()["outputs"]]
        made["own"] = [one["score"] for one in step.outputs()["outputs"]]
        if page == 4:
            made["blocks"] = _advantages(state, losses)
        if page == 5:
            made["after"] = step.view(_with(state, updates=4), losses)
    elif page == 7:
        made = {"penalty": _penalty(state), "chosen": losses}
    elif page == 9:
        made = truth.view(_with(state, part="proxy"), losses)
    else:
        made = makers[page](state, losses)
    spec = next((one.spec for one in losses if one.loss is not None), START)
    return {
        "page": page,
        "title": PAGES[page - 1],
        "screen": _SCREENS[page - 1],
        "shown": _SHOWN.get(page, ()),
        "view": made,
        "back": state.query(specs, tour=page - 1) if page > 1 else "",
        "next": state.query(specs, tour=page + 1) if page < len(PAGES) else "",
        "next_title": PAGES[page] if page < len(PAGES) else "",
        "command": f"lossmith train --loss {shlex.quote(spec)}",
        "spec": spec,
    }


def _with(state: State, **values: Any) -> State:
    """The same state with some fields as if the address said so; problems are told once, by the first."""
    pairs = [(k, v) for k, v in state.pairs if k not in values]
    changed = dataclasses.replace(
        state, pairs=(*pairs, *((k, FIELDS[k].write(v)) for k, v in values.items())), problems=[]
    )
    changed.problems = state.problems
    return changed


def _at_start(state: State) -> State:
    return _with(state, updates=0)


def _advantages(state: State, losses: list[Chosen]) -> list[dict[str, Any]]:
    """Each loss's chain from score to advantage, for the four outputs."""
    scores = [state[name] for name in _SCORES]
    blocks = []
    for one in losses:
        if one.loss is None:
            continue
        try:
            with quiet_traps():
                batch = step.batch_at(one.loss, step.table().logits, scores)
                found = one.loss.anatomy(batch)
        except (LossError, NotImplementedError) as error:
            blocks.append({"one": one, "error": str(error)})
            continue
        rows = [[group.number_of(link.value, i, int(batch.lengths[i])) for link in found.credit] for i in range(4)]
        blocks.append({"one": one, "heads": [(x.name, x.words) for x in found.credit], "rows": rows})
    return blocks


def _penalty(state: State) -> list[dict[str, Any]]:
    """What each estimator says at this distance κ, and how it pulls: its slope, by autograd."""
    import torch

    rows = []
    for name in ("k1", "k2", "k3"):
        kappa = torch.tensor(state["kappa"], dtype=torch.float64, requires_grad=True)
        value = kl_estimate(kappa, name)
        rows.append(
            {"name": name, "value": float(value.detach()), "slope": float(torch.autograd.grad(value, kappa)[0])}
        )
    return rows
