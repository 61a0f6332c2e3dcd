"""Lossmith's losses inside slime: two functions in a module of your own, which slime loads by their paths.

    from lossmith.adapters.slime import functions
    rewards, loss = functions("gspo")          # in my_loss.py

    --custom-reward-post-process-path my_loss.rewards --loss-type custom_loss --custom-loss-function-path my_loss.loss
    --advantage-estimator grpo --disable-rewards-normalization

The first sees all samples of a rollout and makes one advantage of each; slime spreads it over the tokens. KL and
entropy are the loss's own. Losses that average over tokens need --calculate-per-token-loss, others must not have it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lossmith.adapters.hooks import HOOKS
from lossmith.adapters.rows import advantages, given_loss, groups, objective, objective_half, padded, wide
from lossmith.errors import LossError
from lossmith.losses import Batch, Loss, Normalizer

__all__ = ["functions", "of_log_probs"]

HOOK = HOOKS["slime"]


def functions(loss: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(reward post-process, loss function) of a loss, as slime calls them. LossError: the hook does not carry it."""
    made = given_loss(loss)
    HOOK.check(made)
    return functools.partial(_rewards, made), functools.partial(_loss, made, objective_half(HOOK, made))


def _rewards(loss: Loss, args: Any, samples: list[Any]) -> tuple[list[float], list[float]]:
    """(rewards as scored, advantages), one a sample of the rollout."""
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    masks = [torch.ones(s.response_length) if s.loss_mask is None else torch.tensor(s.loss_mask) for s in samples]
    mask = padded([m * (not sample.remove_sample) for m, sample in zip(masks, samples, strict=True)]) > 0
    group = groups(sample.group_index for sample in samples)
    cut = torch.tensor([sample.status.value == "truncated" for sample in samples])
    batch = Batch(mask=mask, reward=torch.tensor(raw, dtype=torch.float64), group=group, truncated=cut)
    made = advantages(HOOK, loss, batch)
    first = mask.to(torch.int8).argmax(1, keepdim=True)
    return raw, made.gather(1, first)[:, 0].tolist()


def _loss(
    loss: Loss, half: Loss, args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """What slime calls on each micro-batch: (loss before slime's division, metrics)."""
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy

    if getattr(args, "context_parallel_size", 1) > 1:
        raise LossError(f"{loss.name}: completions are cut by context parallelism; use --context-parallel-size 1.")
    _, made = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
    )
    return of_log_probs(loss, half, args, batch, made["log_probs"], made["entropy"])


def of_log_probs(
    loss: Loss, half: Loss, args: Any, batch: dict[str, Any], log_probs: list[Tensor], entropy: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of completions whose log-probabilities [T_i] are known, before slime divides by their number."""
    by_token = getattr(getattr(half, "aggregate", None), "option", "") == "token_mean"
    if by_token != bool(args.calculate_per_token_loss):
        word = "needs" if by_token else "must not have"
        raise LossError(f"{loss.name} is {half.aggregate.option}: it {word} --calculate-per-token-loss.")  # type: ignore[attr-defined]
    names = {"advantages": "advantage", "rollout_log_probs": "behavior_logp", "ref_log_probs": "ref_logp"}
    lists = {ours: batch[theirs] for theirs, ours in names.items() if batch.get(theirs)}
    old = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    lists |= {"logp": log_probs, "entropy": entropy, **({"old_logp": old} if old else {})}
    given = {name: wide(padded(rows)) for name, rows in lists.items()}
    rows = Batch(mask=padded(batch["loss_masks"]) > 0, **given | {"entropy": given["entropy"].clamp(min=0)})
    found = objective(half, rows, Normalizer(1, 1, 1))  # slime divides by the number of tokens, or of completions
    metrics = {f"lossmith/{key}": found.loss.new_tensor(value) for key, value in found.metrics.items()}
    return found.loss, {"loss": found.loss.detach(), **metrics}
