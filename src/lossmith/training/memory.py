"""How much memory a run takes, and what is done where that is more than there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lossmith.policy import Policy, available_bytes
from lossmith.training.recipe import Recipe

__all__ = ["Need", "estimate"]

# Measured on the default model in bfloat16 with 512 to 2048 tokens: libraries and what the allocator leaves unused take
# 1.3 GB, and a layer keeps so many numbers of the hidden size a token for its backward pass; layers that are run again
# keep their input (in float32), and one of them at a time all.
_LIBRARIES = 1.3e9
_KEPT_PER_TOKEN = 32
_HEAD_ROWS = 512  # response positions whose logits exist at one time


@dataclass(frozen=True)
class Need:
    """Bytes. `fixed`: weights, gradients, optimiser, libraries; the others for the backward pass of a micro-batch."""

    fixed: float
    activations: float
    recomputed: float  # activations where layers are run again
    budget: float | None  # what the recipe allows, or the machine has

    @property
    def recompute(self) -> bool:
        """Whether it is too much, unless layers are run again in the backward pass."""
        return self.budget is not None and self.fixed + self.activations > self.budget


def estimate(policy: Policy, recipe: Recipe, reference: bool) -> Need:
    """What training this policy with this recipe takes."""
    weights = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.parameters())
    config = policy.model.config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    narrow = policy.compute_dtype == torch.bfloat16
    width = 2 if narrow else 4
    fixed = 4 * (weights * (2 if reference else 1) + 3 * trained) + (2 * weights if narrow else 0) + _LIBRARIES
    vocabulary = policy.model.get_output_embeddings().weight.shape[0]
    head = 2 * width * _HEAD_ROWS * vocabulary + 3 * 4 * vocabulary * hidden
    tokens = min(recipe.micro_batch_tokens, recipe.prompts_per_step * recipe.samples_per_prompt * recipe.max_tokens)
    layer = tokens * hidden * _KEPT_PER_TOKEN * width
    return Need(fixed, head + layers * layer, head + layer + layers * tokens * hidden * 4, _budget(policy, recipe))


def _budget(policy: Policy, recipe: Recipe) -> float | None:
    if recipe.memory_gb is not None:
        return recipe.memory_gb * 1e9
    if policy.device.type == "cuda":
        return float(torch.cuda.mem_get_info(policy.device)[0])
    free = available_bytes() if policy.device.type == "cpu" else None
    return None if free is None else free + 4 * sum(p.numel() for p in policy.model.parameters())  # they are loaded
