"""Lossmith's losses inside NeMo-RL: a LossFunction for `grpo_train(..., loss_fn=...)`.

    from lossmith.adapters.nemo_rl import LossmithLossFn
    loss_fn = LossmithLossFn("dppo_tv", estimator="grpo_mean")

NeMo-RL samples, scores, makes the advantages (grpo.adv_estimator) and steps; KL is the loss's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lossmith.adapters.hooks import HOOKS
from lossmith.adapters.rows import check_estimator, given_loss, objective, objective_half, wide
from lossmith.losses import Batch, Normalizer

__all__ = ["ESTIMATORS", "LossmithLossFn"]

HOOK = HOOKS["nemo_rl"]
ESTIMATORS = {  # grpo.adv_estimator "grpo" with these settings -> (advantage, advantage_scale)
    "grpo_mean": ("group", "none"),  # neither of the two below
    "grpo_mean_std": ("group", "group_std"),  # normalize_rewards
    "grpo_loo": ("nemo_loo", "none"),  # normalize_rewards and use_leave_one_out_baseline
}


class LossmithLossFn:
    """A loss of Lossmith as NeMo-RL's Protocol LossFunction.

    loss: as everywhere. estimator: what grpo.adv_estimator makes, by the names of ESTIMATORS.
    LossError: the hook does not carry the loss, or the advantages are not those that it wants.
    """

    def __init__(self, loss: Any, estimator: str) -> None:
        self.loss = given_loss(loss)
        HOOK.check(self.loss, at_once=True)
        check_estimator(HOOK, self.loss, estimator, ESTIMATORS)
        self.half = objective_half(HOOK, self.loss)

    @property
    def loss_type(self) -> Any:
        """Which count divides the loss, for trainers that divide once an update."""
        from nemo_rl.algorithms.loss.interfaces import LossType

        by_tokens = getattr(getattr(self.loss, "aggregate", None), "option", "") == "token_mean"
        return LossType.TOKEN_LEVEL if by_tokens else LossType.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        """It is given log-probabilities."""
        from nemo_rl.algorithms.loss.interfaces import LossInputType

        return LossInputType.LOGPROB

    def __call__(
        self,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        next_token_logprobs: Tensor,
        **_: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """next_token_logprobs [bs, T - 1], data's tensors [bs, T]: (loss, metrics), which add up over micro-batches."""
        mask = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).bool()
        names = {
            "prev_logprobs": "old_logp", "generation_logprobs": "behavior_logp",
            "reference_policy_logprobs": "ref_logp", "advantages": "advantage",
        }  # fmt: skip
        fields = {ours: wide(data[theirs][:, 1:]) for theirs, ours in names.items() if theirs in data}
        batch = Batch(logp=wide(next_token_logprobs), mask=mask, **fields)
        norm = Normalizer(float(global_valid_toks), float(global_valid_seqs), 0)
        if norm.tokens != batch.tokens:
            HOOK.check(self.loss)  # not all rows of the update at once
        found = objective(self.half, batch, norm)
        told = {"loss": found.loss.item(), "num_valid_samples": float(data["sample_mask"].sum())}
        return found.loss, told | {f"lossmith/{key}": value for key, value in found.metrics.items()}
