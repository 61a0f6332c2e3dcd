"""Losses of whole completions: functions of one log-ratio a completion, Λ_i = Σ_t (logp - anchor), and its rewards.

Losses of preferences (DPO and its kin) and regressions of Λ on the reward. They couple the completions of a group, so
the loss sees the whole batch at once. Without an anchor Λ is the log-probability itself.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.anatomy import Anatomy, Link, Pull
from lossmith.losses.as_tensor import wide
from lossmith.losses.axes.advantage import Groups, Signal
from lossmith.losses.batch import Batch, Normalizer
from lossmith.losses.composition.flat import no_parameter
from lossmith.losses.composition.formula import in_style
from lossmith.losses.composition.notation import where
from lossmith.losses.loss import Credit, Loss, LossOutput, distance_metrics, reward_metrics
from lossmith.losses.piece import Piece, shown

__all__ = ["CompletionLoss", "CompletionTerm", "Completions"]


@dataclass(frozen=True, eq=False)
class Completions:
    """What a term sees. Rows without a valid token are not among them."""

    log_ratio: Tensor  # Λ [N], with gradient
    reward: Tensor  # R [N]
    lengths: Tensor  # T [N], as numbers
    live: Tensor  # [N] bool
    batch: Batch

    def groups(self, x: Tensor | None = None) -> Groups:
        """Statistics of the reward, or of another [N], within each prompt's group."""
        of = self.reward if x is None else x
        return Groups.of(of, self.batch.require("group", "a paired loss"), self.live)

    def mean(self, x: Tensor, units: float) -> Tensor:
        """Σ over live rows, divided by the units counted."""
        return torch.where(self.live, x, torch.zeros_like(x)).sum() / max(units, 1)


class CompletionTerm(Piece):
    """A loss as a function of Λ [N]; `slope` is its derivative, derived by hand."""

    anchor: ClassVar[str] = "ref"  # Λ is taken against the reference ("ref"), the old policy ("old"), or "none"
    coupling: ClassVar[str] = "group"
    stops_gradient: ClassVar[bool] = False

    @property
    def compares(self) -> str:
        """With what a completion is compared: "group", or "" (nothing)."""
        return "group" if self.coupling == "group" else ""

    @property
    def reads(self) -> frozenset[str]:
        """The fields of Batch that it reads, as its parameters stand."""
        return self.needs

    def units(self, at: Completions) -> float:
        """What the mean is over: completions, unless it says otherwise."""
        return int(at.live.sum())

    def value(self, at: Completions, units: float) -> Tensor:
        """The loss, a scalar with gradient into Λ."""
        raise NotImplementedError

    def slope(self, at: Completions, units: float) -> Tensor:
        """dL/dΛ [N] in closed form."""
        raise NotImplementedError

    def compute_metrics(self, at: Completions) -> dict[str, float]:
        """More metrics of its own."""
        return {}

    def formula(self) -> str:
        """L in terms of Λ and R."""
        raise NotImplementedError

    def code(self) -> list[str]:
        """Lines of plain torch that end in `return`, from Lam [N], R [N], group and T [N]."""
        raise NotImplementedError


@dataclass(frozen=True)
class CompletionLoss(Loss):
    """One term of whole completions, under a name."""

    name: str
    term: CompletionTerm

    def __post_init__(self) -> None:
        if not isinstance(self.term, CompletionTerm):
            raise LossError(f"term must be a CompletionTerm, not {self.term!r}.")

    @property
    def needs(self) -> frozenset[str]:
        anchor = {"ref_logp"} if self.term.anchor == "ref" else set()
        return self.term.reads | self.term.missing | anchor

    @property
    def coupling(self) -> str:
        return self.term.coupling

    @property
    def compares(self) -> str:
        return self.term.compares

    @property
    def stops_gradient(self) -> bool:
        return self.term.stops_gradient

    @property
    def uses_old(self) -> bool:
        return self.term.anchor == "old"

    def completions(self, batch: Batch) -> Completions:
        """What the term sees of a batch."""
        logp, owner = batch.require("logp", self.name), self.name
        per_token = logp  # a batch holds 0 at masked positions, of the anchor too
        if self.term.anchor != "none":
            per_token = logp - (
                batch.require("ref_logp", owner).detach() if self.term.anchor == "ref" else batch.old(owner)
            )
        reward = Signal(batch, wide(batch.require("reward", self.name))).per_sequence
        lengths = batch.lengths.clamp(min=1).to(logp.dtype)
        return Completions(per_token.sum(1), reward, lengths, batch.live, batch)

    def __call__(self, batch: Batch, normalizer: Normalizer | None = None) -> LossOutput:
        at = self.completions(batch)
        loss, logp = self.term.value(at, self._units(at, normalizer)), batch.require("logp", self.name)
        if not bool(torch.isfinite(loss.detach().to(logp.dtype))):
            raise LossError(
                f"{self.name}: the loss leaves what {logp.dtype} holds, with rewards of "
                f"{float(at.reward.abs().max()):.3g}. Let the scorer give smaller numbers."
            )
        loss, advantage = loss.to(batch.dtype), torch.zeros_like(logp).detach()  # rewards are in float64
        return LossOutput(loss, advantage, {self.term.option: loss}, lambda: self._metrics(at))

    def _units(self, at: Completions, normalizer: Normalizer | None) -> float:
        if normalizer is None:
            return self.term.units(at)
        if normalizer.units is None:
            raise LossError(
                f"{self.name} averages over pairs, groups or completions, which this Normalizer does not count: make "
                "it with loss.counts(batch) on each rank, and add them."
            )
        return normalizer.units

    def counts(self, batch: Batch) -> Normalizer:
        """The term's units (pairs, groups or completions) included."""
        counts = Normalizer.of(batch.valid, batch.group)
        return dataclasses.replace(counts, units=self.term.units(self.completions(batch)))

    @torch.no_grad()
    def closed_form_gradient(self, batch: Batch, credit: Credit | None = None) -> Tensor:
        if credit is not None:
            credit.check(self, batch)
        at = self.completions(batch)
        slope = torch.where(at.live, self.term.slope(at, self.term.units(at)), torch.zeros_like(at.log_ratio))
        return torch.where(batch.valid, slope[:, None], torch.zeros((), dtype=slope.dtype))

    @torch.no_grad()
    def anatomy(self, batch: Batch) -> Anatomy:
        at = self.completions(batch)

        def link(name: str, x: Tensor, words: str) -> Link:
            return Link(name, torch.where(batch.valid, x[:, None], 0.0), words)

        slope = -self.closed_form_gradient(batch)
        log_ratio = link("log-ratio", at.log_ratio, self.formula().splitlines()[-1].strip())
        factors = (Link("slope", slope, f"−dL/dΛ, L = {self.term.formula()}"),)
        pull = Pull(self.term.option, factors, batch.valid)
        return Anatomy((link("score", at.reward, "R"),), (log_ratio,), (pull,))

    @torch.no_grad()
    def _metrics(self, at: Completions) -> dict[str, float]:
        metrics = reward_metrics(at.batch) | distance_metrics(at.batch, at.batch.tokens)
        if bool(at.live.any()):
            metrics["log_ratio"] = float(at.log_ratio[at.live].mean())
            metrics["units"] = float(self.term.units(at))
            metrics |= self.term.compute_metrics(at)
        return metrics

    # -- representations --------------------------------------------------------------------------------------------

    def formula(self, style: str = "text") -> str:
        expression, definitions = where(self.term.formula())
        anchor = {"ref": " − log π_ref(y_t)", "old": " − log π_old(y_t)"}.get(self.term.anchor)
        log_ratio = f"(log π_θ(y_t){anchor})" if anchor else "log π_θ(y_t)"
        return in_style([f"L(θ) = {expression}", *definitions, f"Λ_i = Σ_t {log_ratio}"], style)

    def code(self) -> str:
        anchor = {"ref": "ref_logp", "old": "old_logp"}.get(self.term.anchor)
        reads = self.term.reads
        fields = [*([anchor] if anchor else []), "reward", *(["group"] if "group" in reads else [])]
        fields += sorted(reads - {"reward", "group"})
        ratio = f"(logp - {anchor})" if anchor else "logp"
        lines = ["T, R = mask.sum(1), reward", f"Lam = ({ratio} * mask).sum(1)", *self.term.code()]
        return "\n".join(
            [
                f"def {re.sub(chr(92) + 'W', '_', self.name)}(logp, mask, *, {', '.join(fields)}):",
                *("    " + x for x in lines),
            ]
        )

    def replace(self, **changes: Any) -> CompletionLoss:
        name = changes.pop("name", self.name)
        if not isinstance(name, str):
            raise LossError(f"the name of a loss is text, not {shown(name)}.")
        if changes.pop("completion", self.term.option) != self.term.option:
            raise LossError(f"{self.name} is a loss of completion={self.term.option!r}: another is another loss.")
        term = changes.pop("term", self.term)
        known = type(term).flat_names()
        for flat, value in changes.items():
            if flat not in known:
                raise no_parameter(self.name, flat, value, known)
        return CompletionLoss(name, dataclasses.replace(term, **{known[k]: v for k, v in changes.items()}))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "completion": self.term.option} | self.term.flat()
