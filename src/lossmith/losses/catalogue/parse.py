"""A loss from what people write: a name, a call as text, or a table."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from lossmith.errors import LossError
from lossmith.losses.catalogue import get_loss
from lossmith.losses.policy_loss import PolicyLoss

__all__ = ["parse_loss"]


def parse_loss(spec: Any) -> PolicyLoss:
    """A loss from a PolicyLoss, a name, a call as text ("grpo(beta=0.04)"), or a table of flat parameters."""
    if isinstance(spec, PolicyLoss):
        return spec
    if isinstance(spec, Mapping):
        fields = dict(spec)
        name = fields.pop("name", None)
        if name is None:
            raise LossError("A loss table needs a name: a loss of the catalogue, or 'custom' for axes alone.")
        return PolicyLoss.from_dict(dict(spec)) if name == "custom" else get_loss(name, **fields)
    if not isinstance(spec, str):
        raise LossError(f"A loss is a name, 'name(parameter=value)' or a table, not {type(spec).__name__}.")
    if "(" not in spec:
        return get_loss(spec.strip())
    name, keywords = _parse_call(spec)
    return get_loss(name, **keywords)


def _parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """ "grpo(beta=0.04)" -> ("grpo", {"beta": 0.04}); literals only, nothing is executed."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        return call.func.id, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError):
        raise LossError(
            f"cannot read the loss {text!r}: write it as name(parameter=value, ...), strings in quotes."
        ) from None
