"""Everything that the page shows of a state, as plain data: what the browser only draws."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lossmith.errors import LossError
from lossmith.explorer.chosen import build, changed, controls
from lossmith.explorer.formulas import formulas
from lossmith.explorer.group import group
from lossmith.explorer.state import State, fields_of, written
from lossmith.explorer.truth import truth
from lossmith.explorer.weights import weights
from lossmith.losses import find_entry
from lossmith.losses.catalogue.call import read_call

__all__ = ["after_change", "view"]


def view(state: State) -> dict[str, Any]:
    """The state's screen, and what can be moved. A loss that is refused is there with its refusal."""
    losses = [_chosen(call) for call in state.losses]
    calls = [one["call"] for one in losses if not one["error"]]
    screens = {
        "loss": lambda: formulas(calls),
        "weight": lambda: weights(calls, state.old_prob),
        "group": lambda: group(calls, state),
        "truth": lambda: truth(calls, state),
    }
    return {
        "query": state.query(),
        "screen": state.screen,
        "losses": losses,
        "numbers": [_number(state, field) for field in fields_of(state.screen)],
        "view": screens[state.screen](),
    }


def after_change(state: State, index: int, name: str, value: Any) -> State:
    """The state with one parameter of one chosen loss changed. LossError: as the loss refuses it."""
    if not 0 <= index < len(state.losses):
        raise LossError(f"there is no loss number {index + 1} in this view.")
    value = math.inf if value == "inf" else value  # which JSON cannot say
    calls = list(state.losses)
    calls[index] = changed(calls[index], name, value)
    return dataclasses.replace(state, losses=tuple(calls))


def _chosen(call: str) -> dict[str, Any]:
    try:
        loss, name = build(call), read_call(call)[0]
        entry = find_entry(name)
    except LossError as error:
        return {"call": call, "error": str(error), "controls": [], "traps": [], "summary": ""}
    return {
        "call": call,
        "error": "",
        "controls": controls(loss, name),
        "traps": [f"{trap}." for trap in loss.traps],
        "summary": entry.summary,
    }


def _number(state: State, field: Any) -> dict[str, Any]:
    about, value = field.metadata, getattr(state, field.name)
    return {
        "name": field.name,
        "doc": about["doc"],
        "kind": "list" if isinstance(value, tuple) else "number",
        "value": None if isinstance(value, tuple) else value,
        "text": written(value).replace(",", ", "),
        "low": about["low"],
        "high": about["high"],
        "step": about["step"],
        "whole": about["step"] == 1,
    }
