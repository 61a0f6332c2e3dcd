"""A loss that is somebody's function of the whole batch: no parts to look into, and everything else a loss has."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.batch import FIELDS, Batch, Normalizer
from lossmith.losses.composition.flat import no_parameter
from lossmith.losses.loss import Loss, LossOutput, distance_metrics, reward_metrics
from lossmith.losses.piece import shown

__all__ = ["FunctionLoss", "parameters_of", "read_fields"]


@dataclass(frozen=True)
class FunctionLoss(Loss):
    """`function(batch, **parameters)` -> a scalar with gradient into batch.logp, or a LossOutput."""

    name: str
    function: Callable[..., Tensor | LossOutput]
    parameters: tuple[tuple[str, Any], ...] = ()
    reads: frozenset[str] = frozenset()  # what the function needs besides logp and mask
    source: str = ""  # "module:function", for recipes and checkpoints
    stops: bool = False  # part of it depends on logp without gradient

    @property
    def needs(self) -> frozenset[str]:
        return self.reads

    @property
    def stops_gradient(self) -> bool:
        return self.stops

    def __call__(self, batch: Batch, normalizer: Normalizer | None = None) -> LossOutput:
        if normalizer is not None:
            raise LossError(
                f"{self.name} is a function with a normalizer of its own: counts over ranks mean nothing to it."
            )
        for field in sorted(self.reads):
            batch.require(field, self.name)
        made = self.function(batch, **dict(self.parameters))
        if isinstance(made, LossOutput):
            return made
        if not isinstance(made, Tensor) or made.ndim != 0:
            shape = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise LossError(f"{self.name} must return one number (a tensor without dimensions), not {shape}.")
        advantage = torch.zeros(batch.valid.shape, dtype=batch.dtype, device=batch.valid.device)
        return LossOutput(
            made, advantage, {self.name: made}, lambda: reward_metrics(batch) | distance_metrics(batch, batch.tokens)
        )

    def weight(self, ratio: Tensor | float, advantage: Tensor | float, old_prob: float = 0.3) -> Tensor:
        """The shape of w(r, A) by autograd: 1 at r = 1 for A > 0, because the function's normalizer is not known.

        Measured on pairs of completions of one token: one at ratio r with reward and advantage A, one at ratio 1 with
        -A, in one group. 0 where the function gives a token at r = 1 no gradient.
        """
        r, a = torch.broadcast_tensors(_tensor(ratio), _tensor(advantage))
        pairs = zip(r.flatten().tolist(), a.flatten().tolist(), strict=True)
        unit = self._pull(1.0, 1.0, old_prob)
        found = [self._pull(x, y, old_prob) / (y if y else 1.0) / unit if unit else 0.0 for x, y in pairs]
        return torch.tensor(found, dtype=torch.float64).reshape(r.shape)

    def _pull(self, ratio: float, advantage: float, old_prob: float) -> float:
        """-dL/dlogp of the first of two single tokens."""
        old = torch.full((2, 1), old_prob, dtype=torch.float64).log()
        logp = (old + torch.tensor([[ratio], [1.0]], dtype=torch.float64).log()).requires_grad_()
        signs = torch.tensor([advantage, -advantage], dtype=torch.float64)
        rows = torch.ones(2, 1, dtype=torch.bool)
        zero = torch.zeros(2, 1, dtype=torch.float64)
        known = dict.fromkeys(("old_logp", "behavior_logp", "ref_logp"), old)
        known |= dict.fromkeys(("reward", "advantage"), signs)
        known |= dict.fromkeys(("value", "old_value", "entropy", "full_kl"), zero)
        known |= {"group": torch.zeros(2, dtype=torch.int64), "truncated": torch.zeros(2, dtype=torch.bool)}
        fields = {name: x for name, x in known.items() if name in self.reads or name == "old_logp"}
        loss = self(Batch(logp, rows, **fields)).loss
        grad = torch.autograd.grad(loss, logp, allow_unused=True)[0] if loss.requires_grad else None
        return 0.0 if grad is None else -float(grad[0, 0])

    # -- representations --------------------------------------------------------------------------------------------

    def formula(self, style: str = "text") -> str:
        """What the function's docstring says: it cannot be looked into."""
        if style not in ("text", "latex"):
            raise LossError(f"formula style is {style!r}; known: text, latex.")
        words = inspect.getdoc(self.function) or f"{self.name}, a function without a docstring"
        given = ", ".join(f"{k}={v}" for k, v in self.parameters)
        if style == "text":
            return words + (f"\n  with {given}" if given else "")
        lines = " ".join(words.split()).replace("\\", r"\textbackslash ")
        for mark in "_%&#${}^~":
            lines = lines.replace(mark, "\\" + mark if mark not in "^~" else rf"\{mark}{{}}")
        return rf"\text{{{lines}}}"

    def code(self) -> str:
        """The function's own source."""
        try:
            return inspect.getsource(self.function).rstrip()
        except OSError:
            raise NotImplementedError(f"the source of {self.name} cannot be found.") from None

    def replace(self, **changes: Any) -> FunctionLoss:
        name, known = changes.pop("name", self.name), dict(self.parameters)
        if not isinstance(name, str):
            raise LossError(f"the name of a loss is text, not {shown(name)}.")
        changes.pop("function", None)
        for key, value in changes.items():
            if key not in known:
                raise no_parameter(self.name, key, value, known)
        return dataclasses.replace(self, name=name, parameters=tuple((known | changes).items()))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "function": self.source} | dict(self.parameters)


def parameters_of(function: Callable[..., Any], skip: int) -> tuple[tuple[str, Any], ...]:
    """The keyword parameters with their defaults, after the first `skip`; each needs a default."""
    found = list(inspect.signature(function).parameters.values())[skip:]
    for p in found:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is p.empty:
            raise LossError(f"{function.__name__}: parameter {p.name!r} needs a name and a default value.")
    return tuple((p.name, p.default) for p in found)


def read_fields(function: Callable[..., Any]) -> frozenset[str]:
    """Fields of Batch whose names the function's code mentions, besides logp and mask."""
    fields = FIELDS.keys() - {"logp", "mask"}
    seen: set[str] = set()
    stack: list[CodeType] = [function.__code__] if hasattr(function, "__code__") else []
    while stack:
        code = stack.pop()
        seen |= set(code.co_names)
        stack += [c for c in code.co_consts if isinstance(c, CodeType)]
    return frozenset(fields & seen)


def _tensor(x: Tensor | float) -> Tensor:
    return x.double() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
