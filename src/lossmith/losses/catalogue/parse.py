"""A loss from what people write: a name, a call as text, or a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lossmith.errors import LossError, nearest
from lossmith.losses.catalogue import find_entry, get_loss
from lossmith.losses.completion.completion_loss import CompletionLoss
from lossmith.losses.completion.regressions import TERMS
from lossmith.losses.composition.policy_loss import PolicyLoss
from lossmith.losses.loss import Loss, together
from lossmith.losses.piece import shown

_COMPLETE = {"advantage", "ratio_level", "trust", "aggregate"}  # a table that says it all is read as it stands

__all__ = ["loss_from_dict", "parse_loss"]


def parse_loss(spec: Any) -> Loss:
    """A loss from a Loss, a name, a call as text ("grpo(beta=0.04)"), or a table of flat parameters.

    A name may be "module:function" or "path/file.py:function", with parameters in brackets or without.
    """
    if isinstance(spec, Loss):
        return spec
    if isinstance(spec, Mapping):
        fields = together(spec, {})
        name = fields.pop("name", None)
        if not isinstance(name, str):
            raise LossError("A loss table needs a name: a loss of the catalogue, or 'custom' for axes alone.")
        whole = name == "custom" or fields.keys() & {"completion", "function"} or fields.keys() >= _COMPLETE
        return loss_from_dict(spec) if whole else get_loss(name, **fields)
    if not isinstance(spec, str):
        raise LossError(f"A loss is a name, 'name(parameter=value)' or a table, not {type(spec).__name__}.")
    return get_loss(spec)


def loss_from_dict(flat: Mapping[str, Any]) -> Loss:
    """The loss that `to_dict` wrote, of whatever kind."""
    if "completion" in flat:
        kind = flat["completion"]
        if not isinstance(kind, str) or kind not in TERMS:
            raise LossError(f"completion is {shown(kind)}.{nearest(str(kind), TERMS)}")
        return CompletionLoss(kind, TERMS[kind]()).replace(**flat)
    if "function" in flat:
        fields = {k: v for k, v in flat.items() if k != "function"}
        return find_entry(str(flat["function"])).build().replace(**fields)
    return PolicyLoss.from_dict(dict(flat))
