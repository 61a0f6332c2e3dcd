"""Lossmith's losses inside OpenRLHF (0.11 or newer): in place of its `PolicyLoss`, the actor trainer's `actor_loss_fn`.

    import openrlhf.trainer.ray.ppo_actor as ppo_actor
    from lossmith.adapters.openrlhf import ActorLoss
    ppo_actor.PolicyLoss = lambda **settings: ActorLoss("dppo_tv", estimator="dr_grpo")

in the file that starts training, and in what Ray's actors import. OpenRLHF samples, scores, makes the advantages
(--algo.advantage.estimator), adds its own KL and entropy terms and steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossmith.adapters.hooks import HOOKS
from lossmith.adapters.rows import check_estimator, given_loss, objective, objective_half, wide
from lossmith.losses import Batch, Normalizer

__all__ = ["ESTIMATORS", "ActorLoss"]

HOOK = HOOKS["openrlhf"]
ESTIMATORS = {  # --algo.advantage.estimator -> (advantage, advantage_scale)
    "gae": ("gae", "whiten"),
    "reinforce": ("return", "whiten"),
    "reinforce_baseline": ("group", "whiten"),
    "rloo": ("loo", "none"),
    "group_norm": ("group", "group_std"),
    "dr_grpo": ("group", "none"),
    "flash_reinforce": ("batch_mean", "none"),
}


class ActorLoss(torch.nn.Module):
    """OpenRLHF's PolicyLoss with a loss of Lossmith.

    loss: as everywhere. estimator: what --algo.advantage.estimator is set to; checked against the loss's own.
    LossError: the hook does not carry the loss, or the advantages are not those that it wants.
    """

    def __init__(self, loss: Any, estimator: str) -> None:
        super().__init__()
        self.formulated = given_loss(loss)
        HOOK.check(self.formulated, at_once=True)
        check_estimator(HOOK, self.formulated, estimator, ESTIMATORS)
        self.rows_half = objective_half(HOOK, self.formulated)

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """[bs, T] each. Returns (loss, share of clipped tokens, KL to the old policy, None, None).

        batch_num_tokens, global_batch_size: OpenRLHF's counts over the update and all ranks (divided by its number of
        accumulation steps, which it multiplies again).
        """
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        fields = {"logp": log_probs, "old_logp": old_log_probs, "advantage": advantages}
        if rollout_log_probs is not None:
            fields["behavior_logp"] = rollout_log_probs
        batch = Batch(mask=mask, **{name: wide(x) for name, x in fields.items()})
        here = Normalizer.of(batch.valid)
        tokens = here.tokens if batch_num_tokens is None else float(batch_num_tokens)
        rows = here.sequences if global_batch_size is None else float(global_batch_size)
        if tokens != here.tokens or dp_size != 1:
            HOOK.check(self.formulated)  # not all rows of the update at once
        found = objective(self.rows_half, batch, Normalizer(tokens, rows, here.groups))
        told = [torch.tensor(found.metrics.get(key, 0.0)) for key in ("clip_fraction", "kl_old")]
        return found.loss * dp_size, told[0], told[1], None, None
