"""Lossmith: policy learning for RLHF with a loss that is what its name says.

import lossmith as ls
loss = ls.get_loss("grpo", beta=0.04)          # a value: print(loss) is its formula
out = loss(ls.Batch(logp, mask, old_logp=..., ref_logp=..., reward=..., group=...))
run = ls.train(scorer=my_function, loss=loss)  # the whole loop on a real model
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Names are imported when they are first used: `import lossmith.losses` must load torch and nothing more.
_HOMES = {
    "Recipe": "lossmith.training",
    "learn": "lossmith.training",
    "open_run": "lossmith.training",
    "plan": "lossmith.training",
    "resume": "lossmith.api",
    "train": "lossmith.api",
    "Policy": "lossmith.policy",
    "SamplingSettings": "lossmith.policy",
    "load_policy": "lossmith.policy",
    "sample": "lossmith.policy",
    "token_outputs": "lossmith.policy",
    "Prompt": "lossmith.prompts",
    "PromptSet": "lossmith.prompts",
    "load_prompts": "lossmith.prompts",
    "LogProbs": "lossmith.rollouts",
    "Distribution": "lossmith.rollouts",
    "Rollout": "lossmith.rollouts",
    "Score": "lossmith.rollouts",
    "ABSTAIN": "lossmith.scorers",
    "load_scorer": "lossmith.scorers",
    "score_rollouts": "lossmith.scorers",
    "LossError": "lossmith.errors",
    "LossmithError": "lossmith.errors",
    "PolicyError": "lossmith.errors",
    "PromptError": "lossmith.errors",
    "RecipeError": "lossmith.errors",
    "RunError": "lossmith.errors",
    "ScorerError": "lossmith.errors",
    "TrapWarning": "lossmith.errors",
}
_LOSS_NAMES = (
    "Batch", "BookClip", "Clip", "CompletionLoss", "Credit", "GAE", "KL", "LogP", "Loss", "LossOutput", "NoTrust",
    "Normalizer", "PolicyLoss", "SgClip", "TD", "ValueLoss", "all_parameters", "get_loss", "list_losses", "losses",
    "register_loss",
)  # fmt: skip

__all__ = sorted([*_HOMES, *_LOSS_NAMES])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    losses = importlib.import_module("lossmith.losses")
    if name == "losses":
        return losses
    if name in losses.__all__:
        return getattr(losses, name)
    raise AttributeError(f"module 'lossmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
