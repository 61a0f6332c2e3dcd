"""What the keys of metrics.jsonl mean, and in which unit.

docs/metrics.md is this list; a test holds it against what losses and runs write.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lossmith.losses import Batch
from lossmith.rollouts import Rollout

__all__ = ["METRICS", "SECTIONS", "aliases", "documented", "in_completions", "of_lag", "of_scorer", "of_watch"]

SECTIONS: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "sampling": (
        "What was sampled and scored (`lossmith train`)",
        {
            "step": ("number of the step, from 0; people are told it from 1", ""),
            "reward": ("mean score of the completions that have one", "of the scorer"),
            "reward_std": ("standard deviation of those scores over the whole step", "of the scorer"),
            "length": ("mean length of the completions", "tokens"),
            "sampled_entropy": ("mean -log p of the sampled tokens: unbiased for the policy's entropy", "nats a token"),
            "ended": ("share of completions that ended within max_tokens", "0 to 1"),
            "dropped": ("completions without a score, left out of the update", "completions"),
            "watch": ("mean over the prompts of what the watching scorer says", "of that scorer"),
            "held_out": ("mean score of the held-out prompts before the step's update", "of the scorer"),
            "held_out_n": ("held-out prompts with a score both then and before training", "prompts"),
            "held_out_change": ("mean of their paired differences to before training", "of the scorer"),
            "held_out_change_low": ("lower end of its 95% interval", "of the scorer"),
            "held_out_change_high": ("upper end of it", "of the scorer"),
            "score_least": ("lowest score of a completion", "of the scorer"),
            "score_most": ("highest score of a completion", "of the scorer"),
            "score_at_least": ("share of the completions with a score that have the lowest one", "0 to 1"),
            "score_at_most": ("share of the completions with a score that have the highest one", "0 to 1"),
            "score_outlier": ("how far the score furthest from the mean lies from the others", "their std"),
            "pairs_compared": ("pairs of completions of one prompt with different scores and advantages", "pairs"),
            "discordant": ("share of them whose better side has the smaller advantage", "0 to 1"),
            "length_correlation": ("correlation of score and length over the step", "-1 to 1"),
            "empty": ("share of completions without a visible character", "0 to 1"),
            "same_text": ("share of completions that equal another one of their prompt", "0 to 1"),
            "one_text": ("share of the step's completions that are its commonest text", "0 to 1"),
            "repetitive": ("share of completions of 12 tokens or more whose 4-grams repeat by half", "0 to 1"),
            "odd_prompts": ("prompts with control characters, or with U+FFFD", "prompts"),
            "scorer/*": ("what the scorer logged under that name, averaged over the completions", "of the scorer"),
            "watch_variance": ("variance of that mean", "squared"),
            "lag": (
                "optimizer steps between the weights that wrote a completion and those that learn from it, on average "
                "(where samplers run ahead: docs/cluster.md)", "steps",
            ),
            "lag_most": ("the largest of them", "steps"),
        },
    ),
    "distance": (
        "How far the policy has moved",
        {
            "kl": (
                "KL(policy ‖ reference), estimated by k3 at the sampled tokens: the distance that `--kl-budget` "
                "limits and `lossmith plot` shows the root of",
                "nats a completion",
            ),
            "kl_update": ("the same from the policy that the step began with", "nats a completion"),
            "kl_teacher": (
                "mean log π_θ - log π_teacher of the sampled tokens: unbiased for KL(policy ‖ teacher) where the "
                "policy sampled them", "nats a token",
            ),
            "divergence": ("the loss's own divergence from the teacher over the vocabulary", "nats a token"),
            "kl_coefficient": ("the β that was in force", ""),
            "sampler_gap": (
                "mean |log p of the learner - log p of the sampler| of the sampled tokens, before the first update",
                "nats a token",
            ),
            "sampler_outside": ("share of those tokens whose ratio lies outside [0.9, 1.1]", "0 to 1"),
            "ess": ("(Σw)²/(nΣw²) of the tokens' ratios π_learner/π_sampler at the last update", "0 to 1"),
            "push_gap": (
                "mean |log p of the learner - log p of the vLLM server| of a short text, after the weights were sent; "
                "of several servers, the largest",
                "nats a token",
            ),
            "push_gap_most": ("the largest of them", "nats a token"),
            "push_tokens": ("tokens of that text; of several servers, all", "tokens"),
            "push_tensors": ("tensors whose checksum there is ours: of the server, or a cluster's samplers", "tensors"),
            "push_tensors_unknown": ("those that it keeps in a form that cannot be told", "tensors"),
            "push_samplers": ("a cluster's samplers that proved so, for the weights that wrote the round", "samplers"),
            "push_restarts": ("servers of theirs that had died, and were started again", "servers"),
            "weights_moved": ("share of weights that bfloat16 tells from those at the start", "0 to 1"),
            "reference_moved": ("share of the reference's weights that are not what they were", "0 to 1"),
        },
    ),
    "update": (
        "The update",
        {
            "loss": ("the loss. Not the performance: about 0 for a policy gradient at ratio 1", ""),
            "loss_*": ("its terms by name, before they are added (policy, kl, value, entropy, ...)", ""),
            "grad_norm": ("length of the gradient before it is scaled down to max_grad_norm", ""),
            "learning_rate": ("of the last optimizer step", ""),
            "weight_step": ("length of the step's change of the weights over their own", ""),
            "skipped_updates": ("optimizer steps not taken, as the gradient was not finite", "updates"),
            "tokens": ("response tokens that the loss saw", "tokens"),
            "completions": ("completions that the loss saw", "completions"),
            "performance_loss": ("-(mean reward that the loss saw)", "of the scorer"),
            "advantage_abs": ("mean |advantage| of a token", ""),
            "groups": ("prompts whose completions were compared", "prompts"),
            "constant_groups": ("those of them whose completions all had one score, which teach nothing", "prompts"),
            "ratio": ("mean π_θ/π_old of the tokens", ""),
            "clip_fraction": ("share of tokens whose policy gradient was cut off", "0 to 1"),
            "clipped_above": ("share of tokens that the trust region cuts off at ratios above 1", "0 to 1"),
            "clipped_below": ("share of tokens that the trust region cuts off at ratios below 1", "0 to 1"),
            "entropy": (
                "the policy's entropy over the whole vocabulary, where the loss asks for it; else sampled_entropy",
                "nats a token",
            ),
        },
    ),
    "pairs": (
        "Losses of whole completions and of preferences (DPO, KTO and their kin; `lossmith prefer`)",
        {
            "units": ("what the loss averages over: pairs, groups or completions", ""),
            "log_ratio": ("mean log π_θ(y) - log π_ref(y), or what the loss takes its place", "nats a completion"),
            "margin": ("mean score of the better side minus that of the worse", "nats a completion"),
            "accuracy": ("share of pairs whose better side has the greater score; a tie counts half", "0 to 1"),
            "chosen_log_ratio": ("log_ratio of the better sides", "nats a completion"),
            "rejected_log_ratio": ("log_ratio of the worse sides", "nats a completion"),
            "chosen_logp": ("mean log π_θ(y) of the better sides", "nats a completion"),
            "reference_point": ("KTO's z: the log-ratio that good is told from bad at", "nats a completion"),
        },
    ),
    "aliases": (
        "The same under names that other tools read",
        {
            "frac_reward_zero_std": ("constant_groups / groups", "0 to 1"),
            "completions/mean_length": ("length", "tokens"),
            "completions/clipped_ratio": ("1 - ended", "0 to 1"),
            "clip_ratio/region_mean": ("clip_fraction", "0 to 1"),
        },
    ),
    "time": (
        "Time",
        {
            "tokens_per_second": ("response tokens over the whole step's seconds", "1/s"),
            "seconds_*": ("by part of the step: evaluate, sample, score, watch, update", "s"),
            "seconds_update_*": (
                "by part of the update: log_probs (old and reference), credit, forward, loss, backward, optimizer",
                "s",
            ),
        },
    ),
}  # fmt: skip
METRICS = {name: what for _, part in SECTIONS.values() for name, what in part.items()}


def documented(key: str) -> bool:
    """Whether a key of metrics.jsonl is in the list, a pattern (`seconds_*`) included."""
    return any(re.fullmatch(re.escape(name).replace(r"\*", ".+"), key) for name in METRICS)


def in_completions(metrics: Mapping[str, float]) -> dict[str, float]:
    """A loss's metrics as a run writes them: its KLs, which are nats a token, in nats a completion."""
    tokens, completions = metrics.get("tokens", 0.0), metrics.get("completions", 0.0)
    found = dict(metrics)
    for name, said in (("kl_ref", "kl"), ("kl_old", "kl_update")):
        if name in found:
            value = found.pop(name)
            if completions:
                found[said] = value * tokens / completions
    return found


def aliases(record: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a step under the names that other tools read."""
    found: dict[str, float] = {}
    if "entropy" not in record and "sampled_entropy" in record:
        found["entropy"] = record["sampled_entropy"]
    if record.get("groups"):
        found["frac_reward_zero_std"] = record["constant_groups"] / record["groups"]
    for name, ours in (("completions/mean_length", "length"), ("clip_ratio/region_mean", "clip_fraction")):
        if ours in record:
            found[name] = record[ours]
    if "ended" in record:
        found["completions/clipped_ratio"] = 1 - record["ended"]
    return found


def of_watch(means: Sequence[float]) -> dict[str, float]:
    """The mean of the prompts' means, and the variance of that mean."""
    if not means:
        return {}
    variance = statistics.variance(means) / len(means) if len(means) > 1 else 0.0
    return {"watch": statistics.fmean(means), "watch_variance": variance}


def of_scorer(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The numbers that the scorer logged beside its scores, averaged: `scorer/NAME`."""
    numbers: dict[str, list[float]] = {}
    for r in rollouts:
        for name, value in (r.score.logged if r.score else {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                numbers.setdefault(f"scorer/{name}", []).append(value)
    return {name: statistics.fmean(values) for name, values in numbers.items()}


def of_lag(batch: Batch | None) -> dict[str, float]:
    """Mean and largest lag of the completions; nothing where the policy itself wrote all of them."""
    if batch is None or batch.lag is None or not bool(batch.lag.any()):
        return {}
    return {"lag": float(batch.lag.double().mean()), "lag_most": float(batch.lag.max())}
