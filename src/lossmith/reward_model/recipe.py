"""The settings of reward-model training."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from lossmith.feedback.preferences import Form
from lossmith.optimization import check_optimizer
from lossmith.settings.base import LearningRate, MicroBatchTokens, Schedule, TrainerSettings

__all__ = ["DEFAULT_LOSS", "READS", "Loss", "RewardRecipe"]

Loss = Literal["auto", "bradley_terry", "plackett_luce", "all_pairs", "mean_squared", "logistic"]
DEFAULT_LOSS: dict[Form, str] = {
    "pairs": "bradley_terry", "rankings": "plackett_luce", "ratings": "mean_squared", "labels": "logistic",
}  # fmt: skip
READS: dict[str, set[Form]] = {
    "bradley_terry": {"pairs"}, "plackett_luce": {"pairs", "rankings"}, "all_pairs": {"pairs", "rankings"},
    "mean_squared": {"ratings"}, "logistic": {"labels"},
}  # fmt: skip


class RewardRecipe(TrainerSettings):
    """The settings of reward-model training."""

    model: str = Field(
        "default", description="where its body comes from: 'default' (SmolLM2-135M-Instruct), a folder, or a hub name"
    )
    form: Form | None = Field(
        None, description="what a database's judgements are turned into; by itself what keeps most of them"
    )
    loss: Loss = Field(
        "auto",
        description="auto: Plackett-Luce for rankings, Bradley-Terry for pairs, squares for ratings, logistic for "
        "labels",
    )
    centring: float = Field(
        0.01, ge=0, description="weight of the term that puts zero in the middle of what is compared"
    )
    epochs: int = Field(2, gt=0, description="passes over the preferences")
    comparisons_per_step: int = Field(8, gt=0, description="preferences in one optimizer step")
    train_layers: int | None = Field(
        None, ge=0, description="train the last so many layers and the head only: faster, and less memory"
    )
    held_out: int | float = Field(
        0.2, gt=0, description="share (or number) of the prompts that the figures are measured on"
    )
    ensemble: int = Field(1, gt=0, description="members; more than one makes an ensemble")
    ensemble_by: Literal["seeds", "subsets"] = Field(
        "seeds", description="members differ by seed, or also by the prompts they see"
    )
    combine: Literal["mean", "worst", "uncertain"] = Field(
        "mean", description="an ensemble's score: mean, worst, or uncertain (mean - penalty x variance)"
    )
    penalty: float = Field(1.0, ge=0, description="of `uncertain`")
    normalize: bool = Field(True, description="give scores in units of their spread over the training texts")
    max_length: int | None = Field(None, gt=0, description="tokens of the longest text; longer ones are refused")
    skip_bad: bool = Field(False, description="leave out texts that are too long, and count them")

    learning_rate: LearningRate = 2e-5
    schedule: Schedule = "linear"
    warmup_steps: int | None = Field(  # type: ignore[assignment]
        None, ge=0, description="steps over which the learning rate rises from 0; a twentieth of all if not given"
    )
    micro_batch_tokens: MicroBatchTokens = 2048
    seed: int = Field(0, ge=0, description="decides split, order and the new head")
    checkpoint_minutes: float = Field(
        1.0,
        ge=0,
        description="minutes between checkpoints, more where saving takes over 3% of the time; 0 for none but when it "
        "stops",
    )

    @classmethod
    def make(cls, source: str = "recipe", /, **fields: Any) -> Self:
        """A checked recipe. RecipeError: an unknown key, a wrong type or range, nothing that could be learned with."""
        recipe = cls.checked(source, fields)
        check_optimizer(source, recipe)
        return recipe

    def for_steps(self, steps: int) -> Self:
        """With the warm-up of so many steps."""
        return self if self.warmup_steps is not None else self.model_copy(update={"warmup_steps": steps // 20})
