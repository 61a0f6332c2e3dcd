"""What other libraries call the parameters of a loss, and what it is called here.

A word of theirs is answered with ours, never with the nearest spelling: TRL's `epsilon` is clip_low and clip_high, not
`eps`, which is added to a standard deviation. Versions as in `catalogue/presets.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lossmith.losses.piece import is_number

__all__ = ["FOREIGN", "Word", "nearest_word"]


@dataclass(frozen=True)
class Word:
    """One parameter of other libraries."""

    whose: str
    ours: tuple[str, ...] = ()  # our parameters that take its value as it is; where several fit, all that a loss has
    write: Mapping[Any, str] = field(default_factory=dict)  # what to write for each of its values, or "" for any
    note: str = ""  # what else there is to know; where our own parameter of that name is another thing, what that is
    setting: str = ""  # the recipe's setting that it is, where it is no parameter of a loss

    def said(self, name: str, value: Any, owned: Iterable[str]) -> str:
        """One sentence or two: what the word means, and what to write instead."""
        if self.setting:
            return f"{name} is {self.whose}'s name for {self.setting}, a setting of the recipe and not of the loss."
        owned = set(owned)
        mine = [x for x in self.ours if x in owned] or list(self.ours)
        means = f" for {' and '.join(mine)} here" if mine else ""
        known = value if isinstance(value, (str, bool)) or value is None else None
        if known in self.write:
            advice = f"write {self.write[known]}"
        elif mine and is_number(value):
            advice = "write " + ", ".join(f"{x}={value}" for x in mine)
        elif "" in self.write:
            advice = f"write {self.write['']}"
        elif self.write:
            advice = "write " + ", ".join(f"{ours} for {name}={theirs!r}" for theirs, ours in self.write.items())
        elif mine:
            advice = "write " + ", ".join(f"{x}=..." for x in mine)
        else:
            advice = ""
        what = f"{name} is {self.whose}'s {'name' if mine else 'word'}{means}" + (f": {advice}." if advice else ".")
        return f"{what} {self.note}".rstrip()


_CLIP = ("clip_low", "clip_high")
_HIGH = ("clip_high", "cap")  # the upper bound of a clipped ratio, or of a weight without gradient
_LEVEL = {"token": "ratio_level='token'", "sequence": "ratio_level='sequence'"}
_LEVEL |= {"sequence_token": "ratio_level='sequence_token'"}
_STD: dict[Any, str] = {True: "advantage_scale='group_std'", False: "advantage_scale='none'"}
_SCALE: dict[Any, str] = {"group": "advantage_scale='group_std'", "batch": "advantage_scale='batch_std'"}
_SCALE |= {"none": "advantage_scale='none'", **_STD}
_AGGREGATE = {
    "token-mean": "aggregate='token_mean'",
    "token-sum": "aggregate='token_sum'",
    "seq-mean-token-sum": "aggregate='seq_mean_token_sum'",
    "seq-mean-token-mean": "aggregate='seq_mean_token_mean'",
    "seq-mean-token-sum-norm": "aggregate='seq_mean_token_sum_norm'",
}
_AGGREGATE |= {theirs.replace("-", "_"): ours for theirs, ours in _AGGREGATE.items()}
_AGGREGATE |= {"token_mean_legacy": "aggregate='token_mean'", "sequence_mean": "aggregate='seq_mean_token_mean'"}
_TRL_LOSSES = {"grpo": "the loss grpo_classic@trl"}
_TRL_LOSSES |= {x: f"the loss {x}@trl" for x in ("dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo", "luspo")}
_KL = {"kl": "'k1'", "k1": "'k1'", "mse": "'k2'", "k2": "'k2'", "low_var_kl": "'k3'", "k3": "'k3'", "abs": "'abs'"}
_ESTIMATOR = {theirs: f"kl_estimator={ours}" for theirs, ours in {**_KL, "full": "'full'"}.items()}
_IN_LOSS = {True: "kl_place='loss' with beta above 0", False: "beta=0, or kl_place='reward'"}
_IN_REWARD = {True: "kl_place='reward' with beta above 0", False: "beta=0, or kl_place='loss'"}
_BONUS = "It is subtracted from the loss, times the mean entropy."
_TRUNCATED = {True: "truncated='mask'", False: "truncated='keep'"}
_VLLM = {True: "mismatch='icepop' or 'tis', as the presets @trl_vllm do", False: "mismatch='none'"}
_TRL_MODES = {
    "token_truncate": "mismatch='tis', mismatch_level='token'",
    "token_mask": "mismatch='icepop', mismatch_level='token'",
    "sequence_truncate": "mismatch='tis', mismatch_level='sequence'",
    "sequence_mask": "mismatch='icepop', mismatch_level='sequence'",
}
_ESTIMATORS = {
    "gae": "advantage='gae'",
    "grpo": "advantage='group'",
    "rloo": "advantage='loo'",
    "opo": "advantage='opo'",
    "gpg": "advantage='gpg'",
    "remax": "advantage='remax'",
    "reinforce": "advantage='batch_mean'",
    "reinforce_plus_plus": "advantage='return'",
    "grpo_vectorized": "advantage='group'",
    "rloo_vectorized": "advantage='loo'",
    "grpo_passk": "advantage='pass_at_k'",
    "gdpo": "advantage='gdpo'",
    "reinforce_plus_plus_baseline": "advantage='group', advantage_scale='whiten'",
    "reinforce_baseline": "advantage='group', advantage_scale='whiten'",
    "group_norm": "advantage='group', advantage_scale='group_std'",
    "dr_grpo": "advantage='group', advantage_scale='none'",
}


def _of_recipe(whose: str, setting: str) -> Word:
    return Word(whose, setting=setting)


# by what they mean
FOREIGN: dict[str, Word] = {
    # -- bounds of the ratio
    "epsilon": Word("TRL", _CLIP, note="`eps` here is another thing: what is added to a standard deviation."),
    "epsilon_low": Word("TRL", ("clip_low",)),
    "epsilon_high": Word("TRL", _HIGH),
    "clip_epsilon": Word("torchrl", _CLIP),
    "clip_eps": Word("Trinity", _CLIP),
    "clip_ratio": Word("verl", _CLIP, note="The metric clip_fraction is how many tokens were clipped."),
    "clip_ratio_low": Word("verl", ("clip_low",)),
    "clip_ratio_high": Word("verl", _HIGH),
    "clip_ratio_c": Word("verl", ("dual_clip",)),
    "cliprange": Word("TRL's PPO", _CLIP),
    "clip_range": Word("Stable-Baselines", _CLIP),
    "cliprange_low": Word("verl", ("clip_low",)),
    "cliprange_high": Word("verl", _HIGH),
    "eps_clip": Word("OpenRLHF, AReaL and SkyRL", _CLIP),
    "eps_clip_low": Word("SkyRL", ("clip_low",)),
    "eps_clip_high": Word("SkyRL and slime", _HIGH),
    "eps_clip_higher": Word("AReaL", _HIGH),
    "eps_clip_c": Word("slime", ("dual_clip",)),
    "eps_clip_low_high": Word("OpenRLHF", _CLIP),
    "ratio_clip_min": Word("NeMo-RL", ("clip_low",)),
    "ratio_clip_max": Word("NeMo-RL", _HIGH),
    "ratio_clip_c": Word("NeMo-RL", ("dual_clip",)),
    "clip_ratio_dual": Word("verl", ("dual_clip",)),
    "c_clip": Word("AReaL", ("dual_clip",)),
    "delta": Word(
        "TRL", ("dual_clip",),
        note="`delta` here is another thing: how far a token's probability may move, of trust='tv_mask_symmetric'.",
    ),
    "importance_sampling_level": Word("TRL", write=_LEVEL),
    "use_dual_clip": Word("other libraries", write={True: "dual_clip=3.0", False: 'dual_clip="none"'}),
    # -- advantages
    "scale_rewards": Word("TRL", write=_SCALE),
    "norm_adv_by_std_in_grpo": Word("verl", write=_STD),
    "grpo_norm_by_std": Word("SkyRL", write=_STD),
    "grpo_std_normalization": Word("slime", write=_STD),
    "normalize_rewards": Word("NeMo-RL", write=_STD),
    "normalize_advantages": Word("TRL's RLOO", write={True: "advantage_scale='batch_std'", False: _STD[False]}),
    "whiten_advantages": Word("TRL's PPO", write={True: "advantage_scale='whiten'", False: _STD[False]}),
    "adv_estimator": Word("verl", write=_ESTIMATORS),
    "advantage_estimator": Word("OpenRLHF", write=_ESTIMATORS),
    "use_leave_one_out_baseline": Word("NeMo-RL", write={True: "advantage='loo'", False: "advantage='group'"}),
    "lambd": Word("OpenRLHF", ("lam",)),
    "gae_lambda": Word("AReaL and others", ("lam",)),
    "lmbda": Word("other libraries", ("lam",)),
    "discount": Word("AReaL", ("gamma",)),
    "reward_clip_range": Word("OpenRLHF", write={"": "shaping=['clip'], reward_low=..., reward_high=..."}),
    # -- which loss, and how it is aggregated
    "loss_type": Word("TRL", write=_TRL_LOSSES, note="It chooses the loss, which is its name here."),
    "loss_mode": Word("verl", note="It chooses the loss, which is its name here: gspo@verl, clip_cov@verl, ..."),
    "policy_loss_type": Word("SkyRL and OpenRLHF", note="It chooses the loss, which is its name here."),
    "loss_agg_mode": Word("verl", write=_AGGREGATE),
    "loss_reduction": Word("SkyRL", write=_AGGREGATE),
    "loss_aggregation": Word("other libraries", write=_AGGREGATE),
    "token_level_loss": Word(
        "NeMo-RL", write={True: "aggregate='token_mean'", False: "aggregate='seq_mean_token_mean'"}
    ),
    # -- the reference
    "kl_coef": Word("verl and others", ("beta",)),
    "kl_loss_coef": Word("verl and SkyRL", ("beta",), note="It goes with kl_place='loss'."),
    "init_kl_coef": Word("OpenRLHF", ("beta",), note="It goes with kl_place='reward'."),
    "kl_ctl": Word("AReaL", ("beta",), note="It goes with kl_place='reward'."),
    "kl_beta": Word("other libraries", ("beta",)),
    "reference_policy_kl_penalty": Word("NeMo-RL", ("beta",)),
    "use_kl_loss": Word("verl", write=_IN_LOSS),
    "use_kl_in_reward": Word("verl and SkyRL", write=_IN_REWARD),
    "kl_in_reward": Word("other libraries", write=_IN_REWARD),
    "kl_loss_type": Word("verl", write=_ESTIMATOR, note="It goes with kl_place='loss'."),
    "kl_penalty": Word("verl", write=_ESTIMATOR, note="It goes with kl_place='reward'; its coefficient is beta."),
    "kl_estimator_type": Word("SkyRL", write=_ESTIMATOR),
    "use_bias_correction_kl": Word("TRL", write={True: "kl_ratio_weight=true", False: "kl_ratio_weight=false"}),
    "horizon": Word("TRL's PPO", ("kl_horizon",)),
    "kl_target": Word(
        "OpenRLHF", ("kl_control_target",),
        note="`kl_target` here is another thing: the policy that is pulled to, ref or behavior.",
    ),
    "target_kl": Word("other libraries", ("kl_control_target",), note="It goes with kl_control='adaptive'."),
    # -- entropy, critic
    "entropy_coeff": Word("verl", ("entropy_coef",), note=_BONUS),
    "entropy_loss_coef": Word("OpenRLHF and SkyRL", ("entropy_coef",), note=_BONUS),
    "ent_coef": Word("Stable-Baselines", ("entropy_coef",), note=_BONUS),
    "entropy_beta": Word("other libraries", ("entropy_coef",), note=_BONUS),
    "vf_coef": Word("TRL's PPO", ("value_coef",)),
    "value_loss_coef": Word("other libraries", ("value_coef",)),
    "cliprange_value": Word("TRL's PPO and verl", ("value_clip",)),
    "value_eps_clip": Word("AReaL", ("value_clip",)),
    "value_clip_range": Word("other libraries", ("value_clip",)),
    # -- what is left out
    "mask_truncated_completions": Word("TRL", write=_TRUNCATED),
    "overlong_filter": Word("ms-swift", write=_TRUNCATED),
    "overlong_filtering": Word("NeMo-RL", write=_TRUNCATED),
    "apply_overlong_filtering": Word("SkyRL", write=_TRUNCATED),
    "top_entropy_quantile": Word("TRL", ("top_entropy",), note="It goes with token_mask='top_entropy'."),
    "off_policy_mask_threshold": Word("TRL", ("opsm_delta",), note="It goes with sequence_mask='opsm'."),
    "dynamic_sampling": Word(
        "other libraries", write={True: "group_filter='zero_variance'", False: "group_filter='none'"},
        note="Groups of equal rewards are left out; no others are sampled in their place.",
    ),
    # -- the sampler's mismatch
    "vllm_importance_sampling_correction": Word("TRL", write=_VLLM),
    "vllm_importance_sampling_mode": Word("TRL", write=_TRL_MODES),
    "vllm_importance_sampling_cap": Word("TRL", ("mismatch_high",)),
    "vllm_importance_sampling_clip_max": Word("TRL", ("mismatch_high",)),
    "vllm_importance_sampling_clip_min": Word("TRL", ("mismatch_low",)),
    "rollout_is": Word(
        "verl", write={x: f"mismatch='tis', mismatch_level='{x}'" for x in ("token", "sequence")}
    ),
    "rollout_is_threshold": Word("verl", ("mismatch_high",), note="It goes with mismatch='tis'."),
    "tis_imp_ratio_cap": Word("verl and SkyRL", ("mismatch_high",), note="It goes with mismatch='tis'."),
    "use_tis": Word("slime and SkyRL", write={True: "mismatch='tis'", False: "mismatch='none'"}),
    "tis_clip": Word("slime", ("mismatch_high",), note="It goes with mismatch='tis'."),
    "behav_imp_weight_cap": Word("AReaL", ("mismatch_high",), note="It goes with mismatch='tis'."),
    "use_importance_sampling_correction": Word("NeMo-RL", write={True: "mismatch='tis'", False: "mismatch='none'"}),
    # -- single losses
    "sapo_temperature_pos": Word("TRL", ("tau_pos",)),
    "sapo_temperature_neg": Word("TRL", ("tau_neg",)),
    "simpo_gamma": Word("TRL", ("target_margin",)),
    "gamma_beta_ratio": Word("SimPO", ("target_margin",), note="target_margin is γ itself: that ratio times beta."),
    "cpo_alpha": Word("TRL", ("nll_coef",)),
    "desirable_weight": Word("TRL's KTO", ("lam_d",)),
    "undesirable_weight": Word("TRL's KTO", ("lam_u",)),
    "dppo_clip_ratio": Word("SkyRL", ("delta_low", "delta_high")),
    # -- not of the loss
    "num_iterations": _of_recipe("TRL", "epochs"),
    "ppo_epochs": _of_recipe("verl", "epochs"),
    "num_ppo_epochs": _of_recipe("TRL", "epochs"),
    "update_epochs": _of_recipe("other libraries", "epochs"),
    "steps_per_generation": _of_recipe("TRL", "updates_per_step"),
    "ppo_n_minibatches": _of_recipe("AReaL", "updates_per_step"),
    "num_generations": _of_recipe("TRL", "samples_per_prompt"),
    "n_samples_per_prompt": _of_recipe("OpenRLHF and SkyRL", "samples_per_prompt"),
    "num_generations_per_prompt": _of_recipe("NeMo-RL", "samples_per_prompt"),
    "rollout_n": _of_recipe("verl", "samples_per_prompt"),
    "group_size": _of_recipe("AReaL", "samples_per_prompt"),
    "max_completion_length": _of_recipe("TRL", "max_tokens"),
    "max_response_length": _of_recipe("verl", "max_tokens"),
    "max_new_tokens": _of_recipe("other libraries", "max_tokens"),
    "max_steps": _of_recipe("TRL", "steps"),
    "lr": _of_recipe("other libraries", "learning_rate"),
    "actor_learning_rate": _of_recipe("OpenRLHF", "learning_rate"),
    "max_norm": _of_recipe("other libraries", "max_grad_norm"),
    "grad_clip": _of_recipe("verl", "max_grad_norm"),
    "lr_scheduler_type": _of_recipe("TRL", "schedule"),
    "num_train_epochs": _of_recipe("TRL", "steps"),
    "lora_r": _of_recipe("TRL", "lora_rank"),
    "lora_target_modules": _of_recipe("TRL", "lora_targets"),
    "load_in_4bit": _of_recipe("TRL", "quantize"),
    "quantization_bit": _of_recipe("LLaMA-Factory", "quantize"),
    "target_modules": _of_recipe("peft and verl", "lora_targets"),
}  # fmt: skip


def nearest_word(name: str, owned: Iterable[str]) -> str | None:
    """The word of another library that a misspelt one comes close to, if no parameter in `owned` is closer."""
    close = difflib.get_close_matches(name, [*owned, *FOREIGN], n=1, cutoff=0.8)
    return close[0] if close and close[0] in FOREIGN else None
