"""What the keys of metrics.jsonl mean, and in which unit.

docs/metrics.md is this list; a test holds it against what losses and runs write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["METRICS", "SECTIONS", "aliases", "documented", "in_completions"]

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
            "scorer/*": ("what the scorer logged under that name, averaged over the completions", "of the scorer"),
            "watch_variance": ("variance of that mean", "squared"),
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
            "kl_coefficient": ("the β that was in force", ""),
            "sampler_gap": ("mean |log p of the learner - log p of the sampler| of the sampled tokens", "nats a token"),
        },
    ),
    "update": (
        "The update",
        {
            "loss": ("the loss. Not the performance: about 0 for a policy gradient at ratio 1", ""),
            "loss_*": ("its terms by name, before they are added (policy, kl, value, entropy, ...)", ""),
            "grad_norm": ("length of the gradient before it is scaled down to max_grad_norm", ""),
            "learning_rate": ("of the last optimiser step", ""),
            "skipped_updates": ("optimiser steps not taken, as the gradient was not finite", "updates"),
            "tokens": ("response tokens that the loss saw", "tokens"),
            "completions": ("completions that the loss saw", "completions"),
            "performance_loss": ("-(mean reward that the loss saw)", "of the scorer"),
            "advantage_abs": ("mean |advantage| of a token", ""),
            "groups": ("prompts whose completions were compared", "prompts"),
            "constant_groups": ("those of them whose completions all had one score, which teach nothing", "prompts"),
            "ratio": ("mean π_θ/π_old of the tokens", ""),
            "clip_fraction": ("share of tokens whose policy gradient was cut off", "0 to 1"),
            "entropy": ("the policy's entropy over the whole vocabulary, where the loss asks for it", "nats a token"),
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
    "time": (
        "Time",
        {
            "tokens_per_second": ("response tokens over the whole step's seconds", "1/s"),
            "seconds_*": ("by part of the step: sample, score, watch, update", "s"),
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


