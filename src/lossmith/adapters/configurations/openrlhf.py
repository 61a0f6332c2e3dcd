"""OpenRLHF's flags -> the loss of `train_ppo_ray`, read in `cli/train_ppo_ray.py`, `models/loss.py` and
`trainer/ppo_utils/experience_maker.py` of 0.11.2.
"""

from __future__ import annotations

import math
from typing import Any

from lossmith.adapters.configurations.reading import CRITIC, Settings, Trainer, ours
from lossmith.adapters.configurations.source import Source
from lossmith.errors import LossError, quiet_traps
from lossmith.losses import Loss, get_loss
from lossmith.losses.composition.foreign import FOREIGN

__all__ = ["TRAINER"]

DEFAULTS: dict[str, Any] = {
    "algo.advantage.estimator": "gae",
    "algo.advantage.gamma": 1,
    "algo.advantage.lambd": 1,
    "algo.advantage.no_std_norm": False,
    "algo.advantage.is_correction_level": "off",
    "algo.advantage.is_correction_mode": "mask",
    "algo.advantage.is_correction_gating": "ratio",
    "algo.advantage.is_correction_threshold": (0.5, 5.0),
    "algo.kl.init_coef": 0.01,
    "algo.kl.estimator": "k1",
    "algo.kl.use_loss": False,
    "algo.kl.unbiased_gradient": False,
    "algo.kl.target": None,
    "algo.kl.horizon": 10000,
    "algo.dynamic_filtering_enable": False,
    "algo.dynamic_filtering_range": (0, 1),
    "actor.policy_loss_type": "ppo",
    "actor.eps_clip": 0.2,
    "actor.eps_clip_low_high": None,
    "actor.dual_clip": None,
    "actor.loss_agg_mode": "token-mean",
    "actor.entropy_coef": None,
    "actor.aux_loss_coef": 0,
    "critic.value_clip": 0.5,
    "reward.clip_range": (-10, 10),
    "reward.overlong_buffer_len": None,
    "reward.overlong_penalty_factor": 1,
    "reward.stop_properly_penalty_coef": None,
}
TABLES = ("ref", "vllm", "ds", "ckpt", "logger", "eval", "data", "train", "rollout", "critic", "use_ms", "local_rank")
_OF_ACTOR = """
    num_nodes num_gpus_per_node gradient_checkpointing_enable gradient_checkpointing_reentrant optim muon adam
    lr_scheduler lr_warmup_ratio min_lr_ratio max_norm model_name_or_path freeze_visual_encoder
"""
_OF_REWARD = "num_nodes num_gpus_per_node normalize_enable model_name_or_path remote_url offload"
ELSEWHERE = (*TABLES, *(f"actor.{x}" for x in _OF_ACTOR.split()), *(f"reward.{x}" for x in _OF_REWARD.split()))

FORMER = {  # how flags were spelled before they had tables
    "advantage_estimator": "algo.advantage.estimator",
    "gamma": "algo.advantage.gamma",
    "lambd": "algo.advantage.lambd",
    "no_advantage_std_norm": "algo.advantage.no_std_norm",
    "init_kl_coef": "algo.kl.init_coef",
    "kl_estimator": "algo.kl.estimator",
    "use_kl_loss": "algo.kl.use_loss",
    "kl_target": "algo.kl.target",
    "kl_horizon": "algo.kl.horizon",
    "dynamic_filtering": "algo.dynamic_filtering_enable",
    "dynamic_filtering_reward_range": "algo.dynamic_filtering_range",
    "policy_loss_type": "actor.policy_loss_type",
    "eps_clip": "actor.eps_clip",
    "eps_clip_low_high": "actor.eps_clip_low_high",
    "dual_clip": "actor.dual_clip",
    "entropy_loss_coef": "actor.entropy_coef",
    "aux_loss_coef": "actor.aux_loss_coef",
    "value_clip": "critic.value_clip",
    "reward_clip_range": "reward.clip_range",
    "overlong_buffer_len": "reward.overlong_buffer_len",
    "overlong_penalty_factor": "reward.overlong_penalty_factor",
}
_FORMER_ELSEWHERE = """
    ref_num_nodes ref_num_gpus_per_node reward_num_nodes reward_num_gpus_per_node critic_num_nodes
    critic_num_gpus_per_node actor_num_nodes actor_num_gpus_per_node vllm_num_engines vllm_tensor_parallel_size
    vllm_sync_backend vllm_sync_with_ray vllm_enable_sleep vllm_gpu_memory_utilization vllm_generate_batch_size
    enforce_eager enable_prefix_caching colocate_actor_ref colocate_critic_reward colocate_all_models async_train
    async_queue_size pretrain reward_pretrain critic_pretrain remote_rm_url save_path ckpt_path save_hf_ckpt save_steps
    load_checkpoint max_ckpt_num logging_steps eval_steps eval_dataset micro_train_batch_size train_batch_size
    micro_rollout_batch_size rollout_batch_size n_samples_per_prompt max_epochs num_episodes prompt_max_len
    generate_max_len max_len max_new_tokens max_samples zero_stage deepspeed_enable_sleep bf16 param_dtype
    actor_learning_rate critic_learning_rate prompt_data prompt_split input_key label_key input_template
    apply_chat_template normalize_reward gradient_checkpointing packing_samples flash_attn attn_implementation
    adam_offload use_wandb wandb_project wandb_run_name use_tensorboard use_dynamic_batch temperature top_p seed
    ring_attn_size ring_head_stride lr_warmup_ratio lr_scheduler l2 adam_betas max_norm freezing_actor_steps
    save_value_network agent_func_path
"""
FORMER_ELSEWHERE = frozenset(_FORMER_ELSEWHERE.split())

PRESET = {
    "gae": "ppo@openrlhf",
    "reinforce": "reinforce@openrlhf",
    "rloo": "rloo@openrlhf",
    "reinforce_baseline": "reinforce_baseline@openrlhf",
    "group_norm": "grpo@openrlhf",
    "dr_grpo": "dr_grpo@openrlhf",
    "flash_reinforce": "flash_reinforce@openrlhf",
}
WHITENED = ("gae", "reinforce", "reinforce_baseline")
KL_WEIGHT_CAP = 10.0  # of the weight of an unbiased KL gradient


def _spelled(source: Source) -> Source:
    return source.renamed(FORMER)


def _loss(s: Settings) -> Loss:
    estimator = s.word("algo.advantage.estimator", PRESET)
    with quiet_traps():
        start = get_loss(PRESET[estimator])
    kind = s.word("actor.policy_loss_type", ("ppo", "gspo"))
    changes = _advantage(s, estimator) | _bounds(s, kind) | _aggregation(s, kind) | _kl(s, estimator)
    changes |= _mismatch(s, kind) | _filter(s)
    changes["entropy_coef"] = s.number("actor.entropy_coef") or 0.0
    _shaping(s)
    if s.must("actor.aux_loss_coef"):
        s.note("actor.aux_loss_coef adds the load-balancing loss of a mixture of experts, which is not shown here.")
    return s.build(start, changes)


def _advantage(s: Settings, estimator: str) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if estimator in WHITENED:
        changes["advantage_scale"] = "whiten"
        s.note("Advantages are whitened with the biased variance; of n tokens that is a factor of √((n - 1)/n).")
        if s.flag("algo.advantage.no_std_norm"):
            s.refuse("algo.advantage.no_std_norm", "it takes the mean over tokens off and does not divide")
    if estimator in ("gae", "reinforce"):
        changes["gamma"] = s.must("algo.advantage.gamma")
    elif s.must("algo.advantage.gamma") != 1:
        s.note(f"gamma is set back to 1 by OpenRLHF for {estimator}.")
    if estimator == "gae":
        s.note(CRITIC)
        changes |= {
            "lam": s.must("algo.advantage.lambd"),
            "value_coef": 1.0,
            "value_clip": s.number("critic.value_clip"),
        }
    return changes


def _bounds(s: Settings, kind: str) -> dict[str, Any]:
    both = s.numbers("actor.eps_clip_low_high")
    low, high = both if both is not None and len(both) == 2 else (s.must("actor.eps_clip"),) * 2
    if both is not None and len(both) != 2:
        raise LossError(f"{s.place('actor.eps_clip_low_high')} takes two numbers, the lower and the upper bound.")
    bounds = {"clip_low": low, "clip_high": high, "dual_clip": s.number("actor.dual_clip")}
    if kind == "gspo":
        off = s.word("algo.advantage.is_correction_level", ("off", "token", "seq")) == "off"
        bounds |= {"ratio_level": "sequence", "denominator": "old" if off else "behavior"}
    return bounds


def _aggregation(s: Settings, kind: str) -> dict[str, Any]:
    written = {x: y for x, y in FOREIGN["loss_agg_mode"].write.items() if x in ("token-mean", "seq-mean-token-mean")}
    changes = ours("loss_agg_mode", s.word("actor.loss_agg_mode", written))
    if kind == "gspo":
        changes = {"aggregate": "seq_mean_token_mean"}
    if changes["aggregate"] == "token_mean":
        return changes
    s.note("KL, entropy and critic are token means, whatever the aggregation of the policy term.")
    return changes | {"kl_aggregate": "token_mean", "entropy_aggregate": "token_mean"}


def _kl(s: Settings, estimator: str) -> dict[str, Any]:
    beta = s.must("algo.kl.init_coef")
    if beta <= 0:
        return {"beta": 0.0, "kl_aggregate": "same"}
    changes = ours("kl_estimator_type", s.word("algo.kl.estimator", ("k1", "k2", "k3"))) | {"beta": beta}
    if s.number("algo.kl.target") is not None:
        s.asked["algo.kl.horizon"] = None
        s.refuse("algo.kl.target", "the coefficient follows the KL of the mean token, and here that of a completion")
    if s.flag("algo.kl.use_loss"):
        changes["kl_place"] = "loss"
        if s.flag("algo.kl.unbiased_gradient"):
            changes |= {"kl_straight_through": True, "kl_is_cap": KL_WEIGHT_CAP}
        return changes
    if estimator not in ("gae", "reinforce"):
        s.refuse(
            "algo.kl.use_loss",
            "without it KL is taken off after the baseline, from each token on, and here off the reward that the "
            "baseline sees. Set it, or algo.kl.init_coef to 0",
        )
    return changes | {"kl_place": "reward", "kl_aggregate": "same"}


def _mismatch(s: Settings, kind: str) -> dict[str, Any]:
    where = "algo.advantage.is_correction_"
    level = s.word(f"{where}level", ("off", "token", "seq"))
    if level == "off" or kind == "gspo":
        return {"mismatch": "none"}
    mode, gating = s.word(f"{where}mode", ("mask", "clip")), s.word(f"{where}gating", ("ratio", "binary_kl", "tv"))
    bounds = s.numbers(f"{where}threshold") or ()
    if not 1 <= len(bounds) <= 2:
        raise LossError(f"{s.place(f'{where}threshold')} takes an upper bound, or two numbers.")
    low, high = (0.0, bounds[0]) if len(bounds) == 1 else bounds
    limits = {"mismatch_low": low, "mismatch_high": high}
    if mode == "clip":
        if level != "token" or gating != "ratio":
            raise LossError(f"{s.place(f'{where}mode')}: OpenRLHF clips the ratio of tokens alone.")
        return limits | {"mismatch": "tis", "mismatch_level": "token"}
    if level == "token" and gating == "ratio":
        return limits | {"mismatch": "icepop", "mismatch_level": "token"}
    over = "token" if level == "token" else "geometric"
    return limits | {"mismatch": "gate", "mismatch_level": over, "mismatch_stat": gating, "mismatch_weighted": True}


def _filter(s: Settings) -> dict[str, Any]:
    if not s.flag("algo.dynamic_filtering_enable"):
        return {"group_filter": "none"}
    low, high = s.numbers("algo.dynamic_filtering_range") or (-math.inf, math.inf)
    s.note(
        f"dynamic filtering: only groups whose mean score is inside ({low:g}, {high:g}) are used, others take their "
        "place. Here that is groups of equal rewards, which is the same for rewards of 0 and 1."
    )
    return {"group_filter": "zero_variance"}


def _shaping(s: Settings) -> None:
    """What is done to a reward, or to what the baseline leaves of it."""
    low, high = s.numbers("reward.clip_range") or (-math.inf, math.inf)
    s.note(
        f"reward.clip_range: what the baseline leaves of a reward is held within [{low:g}, {high:g}], not shown here."
    )
    for name in ("reward.overlong_buffer_len", "reward.stop_properly_penalty_coef"):
        if s.number(name) is not None:
            s.asked["reward.overlong_penalty_factor"] = None
            s.note(f"{name}: a penalty is taken off the reward before the loss sees it.")


def _elsewhere(name: str) -> bool:
    return name in FORMER_ELSEWHERE or any(name == table or name.startswith(f"{table}.") for table in ELSEWHERE)


TRAINER = Trainer(
    name="openrlhf",
    version="0.11.2",
    title="OpenRLHF",
    defaults=DEFAULTS,
    elsewhere=_elsewhere,
    own=lambda name: name.startswith(("algo.advantage.", "algo.kl.", "algo.dynamic", "actor.")),
    programs=("openrlhf.cli",),
    loss=_loss,
    settings=_spelled,
)
