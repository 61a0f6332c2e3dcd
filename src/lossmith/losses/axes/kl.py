"""KL to the reference policy: which estimator, where it acts, and how its coefficient moves.

κ = log π_θ(y_t) - log π_ref(y_t). What each choice regularizes (expected gradient on-policy, losses.md section 7):
k1 in the loss nothing; k2 the reverse KL(π‖π_ref), exactly; k3 the forward KL(π_ref‖π); abs neither; k1 or k3
weighted by the ratio, any estimator with straight-through, `full`, and k1 in the reward the reverse KL.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.axes.ratio import LOG_RATIO_BOUND
from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece, number, param

__all__ = ["ESTIMATORS", "KL", "adapt_coefficient", "kl_estimate"]

ESTIMATORS = ("k1", "k2", "k3", "abs", "square", "full")

_FORMULAS = {
    "k1": "κ",
    "k2": "κ²/2",
    "k3": "(e^(−κ) − 1 + κ)",
    "abs": "|κ|",
    "square": "κ²",
    "full": "KL(π_θ‖π_ref)",
}


def kl_estimate(kappa: Tensor, estimator: str) -> Tensor:
    """The estimator's value from κ (any shape, nats). k3's exponent is clamped to ±20."""
    if estimator == "k1":
        return kappa
    if estimator == "k2":
        return 0.5 * kappa**2
    if estimator == "abs":
        return kappa.abs()
    if estimator == "square":
        return kappa**2
    if estimator == "k3":
        return (-kappa).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp() - 1 + kappa
    raise LossError(f"{estimator!r} cannot be estimated from sampled tokens.")


def kl_slope(kappa: Tensor, estimator: str) -> Tensor:
    """d(estimate)/dlogp in closed form."""
    if estimator == "k1":
        return torch.ones_like(kappa)
    if estimator == "k2":
        return kappa
    if estimator == "abs":
        return kappa.sign()
    if estimator == "square":
        return 2 * kappa
    inside = (kappa.abs() <= LOG_RATIO_BOUND).to(kappa.dtype)
    return 1 - (-kappa).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp() * inside


@dataclass(frozen=True)
class KL(Piece):
    """β times an estimate of the KL divergence, in the loss or taken off the reward."""

    beta: float = param("beta", 0.0, "coefficient of the KL term; 0 means none", low=0)
    estimator: str = param("kl_estimator", "k3", "estimator of the KL divergence", choices=ESTIMATORS)
    place: str = param("kl_place", "loss", "a term of the loss, or taken off the reward", choices=("loss", "reward"))
    ratio_weight: bool = param("kl_ratio_weight", False, "multiply by the ratio, with gradient")
    straight_through: bool = param("kl_straight_through", False, "value of the estimator, gradient of k2")
    is_cap: float | None = param(
        "kl_is_cap",
        None,
        "with kl_straight_through: weight by the ratio, capped here and without gradient",
        above=0,
        bound=True,
    )
    against: str = param(
        "kl_target", "ref", "policy the penalty pulls to: ref or behavior", choices=("ref", "behavior")
    )
    masked: bool = param("mask_kl", False, "masks and mismatch weights also multiply the KL term, as in ms-swift")
    control: str = param("kl_control", "fixed", "the coefficient over time", choices=("fixed", "adaptive"))
    target: float = param("kl_control_target", 6.0, "adaptive: wanted KL of a completion, nats", above=0)
    horizon: float = param("kl_horizon", 10_000.0, "adaptive: completions over which the coefficient moves", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.place == "reward" and (self.ratio_weight or self.straight_through):
            raise LossError(
                "kl_place='reward' carries no gradient: kl_ratio_weight and kl_straight_through mean nothing."
            )
        if self.estimator == "full" and (self.ratio_weight or self.straight_through):
            raise LossError(
                "kl_estimator='full' is exact: kl_ratio_weight and kl_straight_through mean nothing for it."
            )
        if self.place == "reward" and self.estimator == "full":
            raise LossError("kl_place='reward' takes an estimate at sampled tokens: choose k1, k2 or k3, not 'full'.")
        if self.ratio_weight and self.straight_through:
            raise LossError("choose one of kl_ratio_weight and kl_straight_through: both correct the same gradient.")
        if self.is_cap is not None and not self.straight_through:
            raise LossError("kl_is_cap is the cap of a detached weight: it goes with kl_straight_through=True.")
        if self.against == "behavior" and (self.estimator == "full" or self.place == "reward"):
            raise LossError("kl_target='behavior' knows the sampled tokens only: use an estimator, kl_place='loss'.")
        if self.control == "adaptive" and self.beta == 0:
            raise LossError(
                "kl_control='adaptive' multiplies beta, and beta is 0: give a start value, for example 0.05."
            )

    @property
    def active(self) -> bool:
        return self.beta > 0

    @property
    def in_loss(self) -> bool:
        """A term of the loss."""
        return self.active and self.place == "loss"

    @property
    def in_reward(self) -> bool:
        """Taken off the reward."""
        return self.active and self.place == "reward"

    @property
    def uses_ratio(self) -> bool:
        """Whether the term is weighted by the ratio."""
        return self.active and (self.ratio_weight or self.is_cap is not None)

    @property
    def reads_old(self) -> bool:  # type: ignore[override]
        return self.in_reward

    @property
    def stops_gradient(self) -> bool:  # type: ignore[override]
        return self.in_loss and self.straight_through

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        if not self.active:
            return frozenset()
        if self.estimator == "full":
            return frozenset({"full_kl"})
        return frozenset({"ref_logp"}) if self.against == "ref" else frozenset({"behavior_logp"})

    def penalty(self, batch: Batch) -> Tensor:
        """β·k at the old policy, [N, T], to be taken off the reward of each token."""
        ref = batch.require("ref_logp", "a KL term (beta > 0)").detach()
        return self.beta * kl_estimate(batch.old("a KL term") - ref, self.estimator)

    def term(self, batch: Batch, ratio: Tensor) -> Tensor:
        """k [N, T] before β, with gradient, as a term of the loss."""
        if self.estimator == "full":
            return batch.require("full_kl", "kl_estimator='full'")
        kappa = self.kappa(batch)
        k = kl_estimate(kappa, self.estimator)
        if self.straight_through:
            k2 = kl_estimate(kappa, "k2")
            k = k2 + (k - k2).detach()
            return k if self.is_cap is None else k * ratio.detach().clamp(max=self.is_cap)
        return k * ratio if self.ratio_weight else k

    def slopes(self, batch: Batch, ratio: Tensor) -> tuple[Tensor, Tensor | None]:
        """d term/dlogp through κ, and d term/d log ratio through the ratio (None: it carries no gradient)."""
        kappa = self.kappa(batch)
        slope = kl_slope(kappa, "k2" if self.straight_through else self.estimator)
        if self.is_cap is not None:
            slope = slope * ratio.clamp(max=self.is_cap)
        if not self.ratio_weight:
            return slope, None
        return slope * ratio, kl_estimate(kappa, self.estimator) * ratio

    def kappa(self, batch: Batch) -> Tensor:
        """log π_θ - log π_ref (or log μ), [N, T], 0 at masked positions."""
        name = "ref_logp" if self.against == "ref" else "behavior_logp"
        anchor = batch.require(name, "a KL term (beta > 0)").detach()
        return batch.require("logp", "a KL term") - anchor  # a batch holds 0 at masked positions of both

    def trap(self) -> str | None:
        """Why this setting misleads, if it does."""
        plain = not (self.ratio_weight or self.straight_through)
        if self.in_loss and self.estimator == "k1" and plain:
            return (
                "k1 in the loss regularizes nothing: its gradient does not depend on the reference, and its "
                "expectation on-policy is 0; use kl_estimator='k2', or kl_place='reward'"
            )
        return None

    def formula(self) -> str:
        """β·k."""
        k = _FORMULAS[self.estimator]
        if self.ratio_weight:
            k = f"r·{k}"
        if self.straight_through:
            k = f"(κ²/2 + sg({k.removeprefix('(').removesuffix(')')} − κ²/2))"
        if self.is_cap is not None:
            k = f"sg(min(r, {number(self.is_cap)}))·{k}"
        return f"{number(self.beta)}·{k}"

    def code(self) -> list[str]:
        """Lines of plain torch that compute the term `kl` [N, T] with its coefficient."""
        if self.estimator == "full":
            return [f"kl = {self.beta} * full_kl"]
        now = "old_logp" if self.place == "reward" else "logp"
        anchor = "ref_logp" if self.against == "ref" else "behavior_logp"
        forms = {
            "k1": "kappa",
            "k2": "kappa**2 / 2",
            "k3": "torch.exp(-kappa) - 1 + kappa",
            "abs": "kappa.abs()",
            "square": "kappa**2",
        }
        lines = [f"kappa = {now} - {anchor}", f"kl = {forms[self.estimator]}"]
        if self.straight_through:
            lines.append("kl = kappa**2 / 2 + (kl - kappa**2 / 2).detach()  # its value, the gradient of k2")
        if self.is_cap is not None:
            lines.append(f"kl = r.detach().clamp(max={self.is_cap}) * kl")
        if self.ratio_weight:
            lines.append("kl = r * kl")
        return [*lines, f"kl = {self.beta} * kl"]


def adapt_coefficient(kl: KL, observed: float, completions: int) -> KL:
    """The adaptive controller of arXiv:1909.08593, section 2.2: proportional, with the error clipped to ±0.2.

    observed: mean KL of a completion (nats) at this step. Returns the KL piece with its next coefficient.
    """
    if kl.control != "adaptive":
        return kl
    error = max(-0.2, min(0.2, observed / kl.target - 1))
    return dataclasses.replace(kl, beta=kl.beta * (1 + error * completions / kl.horizon))
