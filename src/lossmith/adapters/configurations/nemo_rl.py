"""NeMo-RL's YAML -> the loss of its GRPO, read in `loss/loss_functions.py`, `advantage_estimator.py` and `grpo.py` at
commit 7ea279a.
"""

from __future__ import annotations

import math
from typing import Any

from lossmith.adapters.configurations.reading import Settings, Trainer, ours
from lossmith.errors import LossError, quiet_traps
from lossmith.losses import Loss, get_loss

__all__ = ["TRAINER"]

DEFAULTS: dict[str, Any] = {
    "grpo.normalize_rewards": True,
    "grpo.use_leave_one_out_baseline": True,
    "grpo.adv_estimator.name": "grpo",
    "grpo.adv_estimator.normalize_rewards": None,  # as grpo.normalize_rewards
    "grpo.adv_estimator.use_leave_one_out_baseline": None,  # as grpo.use_leave_one_out_baseline
    "grpo.adv_estimator.minus_baseline": True,
    "grpo.adv_estimator.reward_weights": None,
    "grpo.advantage_clip_low": None,
    "grpo.advantage_clip_high": None,
    "grpo.overlong_filtering": False,
    "grpo.use_dynamic_sampling": False,
    "grpo.seq_logprob_error_threshold": None,
    "grpo.invalid_tool_call_advantage": None,
    "grpo.malformed_thinking_advantage": None,
    "grpo.reward_scaling.enabled": False,
    "grpo.reward_shaping.enabled": False,
    "loss_fn.disable_ppo_ratio": False,
    "loss_fn.force_on_policy_ratio": False,
    "loss_fn.use_cispo": False,
    "loss_fn.sequence_level_importance_ratios": False,
    "loss_fn.token_level_loss": True,
    "loss_fn.ratio_clip_min": 0.2,
    "loss_fn.ratio_clip_max": 0.2,
    "loss_fn.ratio_clip_c": None,
    "loss_fn.reference_policy_kl_penalty": 0.01,
    "loss_fn.reference_policy_kl_type": "k3",
    "loss_fn.kl_input_clamp_value": 20.0,
    "loss_fn.kl_output_clamp_value": 10.0,
    "loss_fn.use_kl_in_reward": False,
    "loss_fn.use_on_policy_kl_approximation": False,
    "loss_fn.use_importance_sampling_correction": False,
    "loss_fn.truncated_importance_sampling_type": None,
    "loss_fn.truncated_importance_sampling_ratio": None,
    "loss_fn.truncated_importance_sampling_ratio_min": None,
    "loss_fn.positive_example_nll_weight": 0.0,
}
_OF_GRPO = """
    num_prompts_per_step num_generations_per_prompt max_rollout_turns max_num_epochs max_num_steps val_period
    val_start_at val_at_start val_at_end max_val_samples val_num_generations_per_prompt stop_at_validation_metric
    stop_at_validation_threshold val_batch_size seed dynamic_sampling_max_gen_batches batch_multiplier reward_shaping
    reward_scaling async_grpo calculate_advantages_on_gpu skip_reference_policy_logprobs_calculation
"""
ELSEWHERE = {"grpo": frozenset(_OF_GRPO.split()), "loss_fn": frozenset()}
TABLES = ("policy", "data", "env", "logger", "cluster", "checkpointing", "reward_penalties", "teacher")


def _loss(s: Settings) -> Loss:
    _base(s)
    with quiet_traps():
        start = get_loss("grpo@nemo_rl")
    changes = _advantage(s) | _bounds(s) | _kl(s) | _mismatch(s)
    changes["aggregate"] = ours("token_level_loss", s.flag("loss_fn.token_level_loss"))["aggregate"]
    changes |= ours("overlong_filtering", s.flag("grpo.overlong_filtering"))
    if s.flag("grpo.use_dynamic_sampling"):
        s.note("use_dynamic_sampling: groups of equal rewards are left out, and others are sampled in their place.")
        changes["group_filter"] = "zero_variance"
    for name in ("grpo.reward_scaling.enabled", "grpo.reward_shaping.enabled"):
        if s.flag(name):
            s.note(f"{name.removesuffix('.enabled')} changes the rewards before the loss sees them.")
    if s.must("loss_fn.positive_example_nll_weight"):
        why = "the likelihood of completions with a reward above 0 is a mean of its own, and here of those with A > 0"
        s.refuse("loss_fn.positive_example_nll_weight", why)
    return s.build(start, changes)


def _base(s: Settings) -> None:
    base = s.source.settings.get("defaults")
    s.asked["defaults"] = None
    if base is not None and str(base).rpartition("/")[2] != "grpo_math_1B.yaml":
        s.refuse("defaults", f"what {base} sets is not in this file")


def _advantage(s: Settings) -> dict[str, Any]:
    for name in ("invalid_tool_call_advantage", "malformed_thinking_advantage", "seq_logprob_error_threshold"):
        if s.number(f"grpo.{name}") is not None:
            s.refuse(f"grpo.{name}", "it gives single tokens or completions another advantage or none")
    low, high = s.number("grpo.advantage_clip_low"), s.number("grpo.advantage_clip_high")
    if (low is None) != (high is None) or (low is not None and low != -high):
        s.refuse("grpo.advantage_clip_low", "an advantage is clipped symmetrically here, or not at all")
        high = None
    changes = {"advantage_clip": high} if high is not None else {}
    estimators = ("grpo", "gdpo", "reinforce_plus_plus", "raw_reward", "gae", "opd")
    name = s.word("grpo.adv_estimator.name", estimators)
    if name == "reinforce_plus_plus":
        centered = s.flag("grpo.adv_estimator.minus_baseline")
        s.note("Advantages are whitened with the biased variance; of n tokens that is a factor of √((n - 1)/n).")
        return changes | {"advantage": "group" if centered else "raw", "advantage_scale": "whiten"}
    if name != "grpo":
        s.refuse("grpo.adv_estimator.name", f"{name} is an estimator that no loss here has in that form")
        return changes
    divided = _either(s, "normalize_rewards")
    if _either(s, "use_leave_one_out_baseline"):
        return changes | {"advantage": "nemo_loo" if divided else "loo"}
    scale = {"advantage_scale": "group_std", "eps": 1e-6} if divided else {"advantage_scale": "none"}
    return changes | {"advantage": "group"} | scale


def _either(s: Settings, name: str) -> bool:
    """A setting of the estimator, which is that of grpo where it has none of its own."""
    own = s.raw(f"grpo.adv_estimator.{name}")
    return s.flag(f"grpo.{name}") if own is None else s.flag(f"grpo.adv_estimator.{name}")


def _bounds(s: Settings) -> dict[str, Any]:
    dual = s.number("loss_fn.ratio_clip_c")
    if s.flag("loss_fn.force_on_policy_ratio"):
        return {"trust": "none", "denominator": "self"}
    if s.flag("loss_fn.disable_ppo_ratio"):
        if dual is not None:
            s.refuse("loss_fn.ratio_clip_c", "with disable_ppo_ratio it bounds a log-probability")
        return {"trust": "logp"}
    low, high = s.must("loss_fn.ratio_clip_min"), s.must("loss_fn.ratio_clip_max")
    if s.flag("loss_fn.use_cispo"):
        return {"trust": "sg_clip", "clip_low": low, "cap": 1 + high}
    level = "sequence" if s.flag("loss_fn.sequence_level_importance_ratios") else "token"
    return {"clip_low": low, "clip_high": high, "dual_clip": dual, "ratio_level": level}


def _kl(s: Settings) -> dict[str, Any]:
    beta = s.must("loss_fn.reference_policy_kl_penalty")
    if beta == 0:
        return {"beta": 0.0, "kl_straight_through": False}
    s.asked |= dict.fromkeys(("loss_fn.kl_input_clamp_value", "loss_fn.kl_output_clamp_value"))
    kind = s.word("loss_fn.reference_policy_kl_type", ("k1", "k2", "k3"))
    if s.flag("loss_fn.use_kl_in_reward"):
        s.refuse("loss_fn.use_kl_in_reward", "KL is taken off the advantage of its own token alone, after the baseline")
    if s.flag("loss_fn.use_on_policy_kl_approximation"):
        why = "the KL term is weighted by the ratio to the sampler, and the policy term by that to the old policy"
        s.refuse("loss_fn.use_on_policy_kl_approximation", why)
    if kind != "k3":
        s.refuse("loss_fn.reference_policy_kl_type", f"{kind} times a ratio of 1 with gradient is no estimator here")
    # k3 times exp(logp - sg(logp)): the value of k3, and as gradient κ, which is that of k2
    return {"beta": beta, "kl_estimator": "k3", "kl_place": "loss", "kl_straight_through": True}


def _mismatch(s: Settings) -> dict[str, Any]:
    where = "loss_fn.truncated_importance_sampling_"
    if not s.flag("loss_fn.use_importance_sampling_correction"):
        return {"mismatch": "none"}
    kind = s.word(f"{where}type", ("tis", "icepop", "seq-mask-tis"), none=True)
    low, high = s.number(f"{where}ratio_min"), s.number(f"{where}ratio")
    if kind is not None and (high is None or (low is None and kind != "tis")):
        raise LossError(f"{s.place(f'{where}type')} is {kind}: NeMo-RL needs its bounds with it, ratio_min and ratio.")
    bounds = {"mismatch_low": low or 0.0, "mismatch_high": math.inf if high is None or kind is None else high}
    if kind == "seq-mask-tis":
        return bounds | {"mismatch": "gate", "mismatch_level": "geometric", "mismatch_stat": "ratio"}
    level = "sequence" if s.flag("loss_fn.sequence_level_importance_ratios") else "token"
    return bounds | {"mismatch": "icepop" if kind == "icepop" else "tis", "mismatch_level": level}


def _elsewhere(name: str) -> bool:
    table, _, rest = name.partition(".")
    return table in TABLES or rest.partition(".")[0] in ELSEWHERE.get(table, ())


TRAINER = Trainer(
    name="nemo_rl",
    version="7ea279a",
    title="NeMo-RL",
    defaults=DEFAULTS,
    elsewhere=_elsewhere,
    own=lambda name: name.startswith(("grpo.", "loss_fn.")),
    programs=(),
    loss=_loss,
)
