"""Reward models: trained from preferences, measured on held-out prompts, and frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossmith.lazy import lazy_names

if TYPE_CHECKING:
    from lossmith.reward_model.evaluate import Measured
    from lossmith.reward_model.train import RewardRecipe, train_reward_model

__all__ = [
    "Measured",
    "RewardRecipe",
    "train_reward_model",
]

if not TYPE_CHECKING:  # a type checker reads the names above
    __getattr__ = lazy_names(__name__, __file__)
