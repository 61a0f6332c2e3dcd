"""Lossmith's losses inside SkyRL (0.3 or newer), through its two registries.

    from lossmith.adapters.skyrl import register
    register("dppo_tv")        # before the trainer is built, in the file that starts it

and trainer.algorithm.advantage_estimator=lossmith, trainer.algorithm.policy_loss_type=lossmith. SkyRL samples, scores,
multiplies the advantages with 1/Z, adds its own KL and entropy terms and steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossmith.adapters.hooks import HOOKS
from lossmith.adapters.rows import advantages as advantages_of
from lossmith.adapters.rows import given_loss, groups, objective, objective_half, wide
from lossmith.errors import LossError
from lossmith.losses import Batch, Loss, PolicyLoss

__all__ = ["SkyRLLoss", "register"]

HOOK = HOOKS["skyrl"]


class SkyRLLoss:
    """Both halves of a loss as SkyRL calls them. loss: as everywhere. LossError: the hook does not carry it."""

    def __init__(self, loss: Any) -> None:
        self.loss: Loss = given_loss(loss)
        HOOK.check(self.loss)
        self.half = objective_half(HOOK, self.loss)

    def advantages(
        self,
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        values: Tensor | None = None,
        config: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """(advantages, returns), [N, T] each, of the whole batch. index: [N] what names the prompt of each row.

        config: SkyRL's algorithm section. Its loss_reduction is the 1/Z that SkyRL multiplies with afterwards; what
        the loss's own differs by is put into the advantages here.
        """
        mask, kind = response_mask.bool(), token_level_rewards.dtype
        fields: dict[str, Any] = {"reward": token_level_rewards.sum(1).double(), "group": groups(index)}
        if values is not None:
            fields |= {"value": wide(values), "old_value": wide(values)}
        batch = Batch(mask=mask, **fields)
        made = advantages_of(HOOK, self.loss, batch, _reduction(config, batch)).to(kind)
        if not isinstance(self.loss, PolicyLoss) or not self.loss.advantage.critic:
            return made, made
        targets = self.loss.replace(value_coef=1.0, mismatch="none").credit(batch).returns
        return made, made if targets is None else targets.to(kind)

    def policy_loss(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any = None,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The sum over the tokens of a micro-batch, [bs, T] each, under advantages that carry 1/Z: (loss, metrics)."""
        mask = torch.ones_like(log_probs, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
        fields = {"logp": log_probs, "old_logp": old_log_probs, "advantage": advantages}
        if rollout_logprobs is not None:
            fields["behavior_logp"] = rollout_logprobs
        found = objective(self.half, Batch(mask=mask, **{name: wide(x) for name, x in fields.items()}))
        return found.loss, {f"lossmith/{key}": value for key, value in found.metrics.items()}


def _reduction(config: Any, batch: Batch) -> Tensor:
    """1/Z of each token by SkyRL's trainer.algorithm.loss_reduction, [N, 1]. It counts rows without tokens too."""
    how, n, lengths = getattr(config, "loss_reduction", "token_mean"), len(batch), batch.lengths.clamp(min=1).double()
    if how == "token_mean":
        return torch.full((n, 1), 1 / max(batch.tokens, 1), dtype=torch.float64)
    if how == "sequence_mean":
        return 1 / (n * lengths)[:, None]
    if how == "seq_mean_token_sum_norm":
        return torch.full((n, 1), 1 / (n * config.max_seq_len), dtype=torch.float64)
    if how == "prompt_mean" and batch.group is not None:
        prompts, where = batch.group.unique(return_inverse=True)
        tokens = torch.zeros(len(prompts), dtype=torch.float64).index_add(0, where, batch.lengths.double())
        return 1 / (len(prompts) * tokens.clamp(min=1))[where][:, None]
    raise LossError(
        f"trainer.algorithm.loss_reduction = {how!r} depends on how the batch is cut; use token_mean, sequence_mean, "
        "prompt_mean or seq_mean_token_sum_norm."
    )


def register(loss: Any, name: str = "lossmith") -> SkyRLLoss:
    """Put both halves into SkyRL's registries under this name. LossError: its hook does not carry the loss."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import register_advantage_estimator, register_policy_loss

    made = SkyRLLoss(loss)
    register_advantage_estimator(name)(made.advantages)
    register_policy_loss(name)(made.policy_loss)
    return made
