"""The settings of reward-model training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lossmith.errors import RecipeError, nearest
from lossmith.feedback.preferences import Form

__all__ = ["DEFAULT_LOSS", "READS", "Loss", "RewardRecipe"]

Loss = Literal["auto", "bradley_terry", "plackett_luce", "all_pairs", "mean_squared", "logistic"]
DEFAULT_LOSS: dict[Form, str] = {
    "pairs": "bradley_terry", "rankings": "plackett_luce", "ratings": "mean_squared", "labels": "logistic",
}  # fmt: skip
HUGE = 1_000_000_000  # no count of a training reaches it
READS: dict[str, set[Form]] = {
    "bradley_terry": {"pairs"}, "plackett_luce": {"pairs", "rankings"}, "all_pairs": {"pairs", "rankings"},
    "mean_squared": {"ratings"}, "logistic": {"labels"},
}  # fmt: skip


@dataclass(frozen=True)
class RewardRecipe:
    """The settings of reward-model training.

    train_layers: None trains the whole model; k its last k layers and the head. ensemble: how many members, which
    differ by their seed, or by the prompts that they see (`ensemble_by`). combine: how an ensemble's members make one
    score: mean, worst (the least), or uncertain (mean - penalty · variance).
    """

    model: str = "default"
    form: Form | None = None
    loss: Loss = "auto"
    centring: float = 0.01
    epochs: int = 2
    comparisons_per_step: int = 8
    learning_rate: float = 2e-5
    train_layers: int | None = None
    held_out: float = 0.2
    ensemble: int = 1
    ensemble_by: Literal["seeds", "subsets"] = "seeds"
    combine: Literal["mean", "worst", "uncertain"] = "mean"
    penalty: float = 1.0
    normalise: bool = True
    max_length: int | None = None
    skip_bad: bool = False
    checkpoint_minutes: float = 1.0
    micro_batch_tokens: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for key, low in (("epochs", 1), ("comparisons_per_step", 1), ("ensemble", 1), ("micro_batch_tokens", 1)):
            if getattr(self, key) < low:
                raise RecipeError(f"{key} = {getattr(self, key)}, but must be at least {low}.")
            if getattr(self, key) >= HUGE:
                raise RecipeError(f"{key} = {getattr(self, key)} is too large: it must be below {HUGE}.")
        for key in ("centring", "learning_rate", "penalty", "checkpoint_minutes"):
            if not 0 <= getattr(self, key) < math.inf:
                raise RecipeError(f"{key} = {getattr(self, key)}, but must be finite and at least 0.")
        if not 1e-12 <= self.learning_rate <= 1:
            does = "destroys the model" if self.learning_rate > 1 else "changes nothing"
            raise RecipeError(f"learning_rate = {self.learning_rate:g} {does}. Usual is 1e-6 to 1e-4.")
        for key, known in (("ensemble_by", ("seeds", "subsets")), ("combine", ("mean", "worst", "uncertain"))):
            if getattr(self, key) not in known:
                raise RecipeError(f"{key} = {getattr(self, key)!r}.{nearest(getattr(self, key), known)}")
        if self.loss != "auto" and self.loss not in READS:
            raise RecipeError(f"loss = {self.loss!r}.{nearest(self.loss, [*READS, 'auto'])}")
