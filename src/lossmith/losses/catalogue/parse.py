"""A loss from what people write: a name, a call as text, or a table."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from lossmith.errors import LossError, nearest
from lossmith.losses.catalogue import find_entry, get_loss
from lossmith.losses.completion_loss import CompletionLoss
from lossmith.losses.completion_terms import TERMS
from lossmith.losses.loss import Loss
from lossmith.losses.policy_loss import PolicyLoss

_COMPLETE = {"advantage", "ratio_level", "trust", "aggregate"}  # a table that says it all is read as it stands

__all__ = ["loss_from_dict", "parse_loss"]


def parse_loss(spec: Any) -> Loss:
    """A loss from a Loss, a name, a call as text ("grpo(beta=0.04)"), or a table of flat parameters.

    A name may be "module:function" or "path/file.py:function", with parameters in brackets or without.
    """
    if isinstance(spec, Loss):
        return spec
    if isinstance(spec, Mapping):
        fields = dict(spec)
        name = fields.pop("name", None)
        if name is None:
            raise LossError("A loss table needs a name: a loss of the catalogue, or 'custom' for axes alone.")
        whole = name == "custom" or fields.keys() & {"completion", "function"} or fields.keys() >= _COMPLETE
        return loss_from_dict(spec) if whole else get_loss(name, **fields)
    if not isinstance(spec, str):
        raise LossError(f"A loss is a name, 'name(parameter=value)' or a table, not {type(spec).__name__}.")
    if "(" not in spec:
        return get_loss(spec.strip())
    name, keywords = _parse_call(spec)
    return get_loss(name, **keywords)


def loss_from_dict(flat: Mapping[str, Any]) -> Loss:
    """The loss that `to_dict` wrote, of whatever kind."""
    if "completion" in flat:
        kind = flat["completion"]
        if kind not in TERMS:
            raise LossError(f"completion is {kind!r}.{nearest(str(kind), TERMS)}")
        return CompletionLoss(str(flat["name"]), TERMS[kind]()).set(flat)
    if "function" in flat:
        fields = {k: v for k, v in flat.items() if k not in ("name", "function")}
        loss = find_entry(str(flat["function"])).build()
        return loss.set({"name": flat["name"], **fields})
    return PolicyLoss.from_dict(dict(flat))


def _parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """ "grpo(beta=0.04)" -> ("grpo", {"beta": 0.04}); literals only, nothing is executed."""
    name, _, rest = text.strip().partition("(")
    try:
        call = ast.parse(f"loss({rest}", mode="eval").body
        if not name.strip() or not isinstance(call, ast.Call) or call.args:
            raise ValueError
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        return name.strip(), {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError):
        raise LossError(
            f"cannot read the loss {text!r}: write it as name(parameter=value, ...), strings in quotes."
        ) from None
