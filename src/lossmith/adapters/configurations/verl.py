"""verl's configuration -> the loss of its PPO trainer, read in 0.9.1: `core_algos.py`, `workers/utils/losses.py`."""

from __future__ import annotations

import math
from typing import Any

from lossmith.adapters.configurations.reading import CRITIC, Settings, Trainer, ours
from lossmith.adapters.configurations.source import Source, from_object
from lossmith.errors import LossError, quiet_traps
from lossmith.losses import Loss, get_loss
from lossmith.losses.composition.foreign import FOREIGN
from lossmith.losses.piece import shown

__all__ = ["TRAINER", "loss_of"]

ACTOR, ALGORITHM = "actor_rollout_ref.actor.", "algorithm."

DEFAULTS: dict[str, Any] = {
    "algorithm.adv_estimator": "gae",
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.gdpo_reward_keys": None,
    "algorithm.gdpo_reward_weights": None,
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_penalty": "kl",
    "algorithm.kl_ctrl.type": "fixed",
    "algorithm.kl_ctrl.kl_coef": 0.001,
    "algorithm.kl_ctrl.horizon": 10000,
    "algorithm.kl_ctrl.target_kl": 0.1,
    "algorithm.use_pf_ppo": False,
    "algorithm.pf_ppo.reweight_method": "pow",
    "algorithm.pf_ppo.weight_pow": 2.0,
    "algorithm.filter_groups.enable": False,
    "algorithm.filter_groups.metric": "reward",
    "algorithm.filter_groups.max_num_gen_batches": 0,
    "algorithm.filter_groups.max_inflight_gen_batches": 1,
    "algorithm.rollout_correction.rollout_is": None,
    "algorithm.rollout_correction.rollout_is_threshold": 2.0,
    "algorithm.rollout_correction.rollout_is_batch_normalize": False,
    "algorithm.rollout_correction.rollout_rs": None,
    "algorithm.rollout_correction.rollout_rs_threshold": None,
    "algorithm.rollout_correction.bypass_mode": False,
    "algorithm.rollout_correction.loss_type": "ppo_clip",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla",
    "actor_rollout_ref.actor.policy_loss.clip_cov_ratio": 0.0002,
    "actor_rollout_ref.actor.policy_loss.clip_cov_lb": 1.0,
    "actor_rollout_ref.actor.policy_loss.clip_cov_ub": 5.0,
    "actor_rollout_ref.actor.policy_loss.kl_cov_ratio": 0.0002,
    "actor_rollout_ref.actor.policy_loss.ppo_kl_coef": 0.1,
    "actor_rollout_ref.actor.policy_loss.dro_beta": None,
    "actor_rollout_ref.actor.clip_ratio": 0.2,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.2,
    "actor_rollout_ref.actor.clip_ratio_c": 3.0,
    "actor_rollout_ref.actor.tau_pos": 1.0,
    "actor_rollout_ref.actor.tau_neg": 1.05,
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.loss_scale_factor": None,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.kl_loss_coef": 0.001,
    "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
    "critic.cliprange_value": 0.5,
    "critic.loss_agg_mode": None,  # as the actor's
    "critic.loss_scale_factor": None,  # as the actor's
    "data.max_response_length": 512,
    "distillation.enabled": False,
}

# Whole tables that do not choose the loss, and in the actor's table what does not.
_TABLES = """
    data trainer reward reward_model custom_reward_function sandbox_fusion ray_kwargs global_profiler transfer_queue
    skip critic distillation model_engine hydra async_training rollout actor_rollout_ref.rollout actor_rollout_ref.ref
    actor_rollout_ref.model actor_rollout_ref.hybrid_engine actor_rollout_ref.nccl_timeout config-path config-name
    config-dir
"""
_OF_ACTOR = """
    optim fsdp_config megatron veomni torchtitan engine model_config checkpoint profiler profile qat router_replay
    rollout_n strategy ppo_mini_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu
    ppo_infer_micro_batch_size_per_gpu ppo_infer_max_token_len_per_gpu use_dynamic_bsz ppo_max_token_len_per_gpu
    freeze_vision_tower calculate_entropy calculate_sum_pi_squared use_prefix_grouper use_torch_compile ppo_epochs
    shuffle data_loader_seed use_fused_kernels grad_clip ulysses_sequence_parallel_size use_remove_padding
    entropy_from_logits_with_chunking entropy_from_logits_chunk_size entropy_checkpointing pad_to_length
    use_rollout_log_probs global_batch_info load_weight
"""
TABLES = (*_TABLES.split(), *(f"{ACTOR}{name}" for name in _OF_ACTOR.split()))
CONFIGS = ("ppo_trainer", "ppo_megatron_trainer", "ppo_torchtitan_trainer", "ppo_veomni_trainer", "dapo_trainer")

PRESET = {
    "vanilla": "grpo@verl",
    "gspo": "gspo@verl",
    "sapo": "sapo@verl",
    "cispo": "cispo@verl",
    "dppo_tv": "dppo_tv@verl",
    "dppo_kl": "dppo_kl@verl",
    "geo_mean": "gmpo@verl",
    "gpg": "reinforce@verl",
    "dro": "dro@verl",
    "clip_cov": "clip_cov@verl",
    "kl_cov": "kl_cov@verl",
}
SCALE = {  # what divides the advantages of an estimator; `grpo` and `grpo_passk` are asked about it
    "gae": "whiten",
    "reinforce_plus_plus": "whiten",
    "reinforce_plus_plus_baseline": "whiten",
    "gdpo": "whiten",
    "grpo_vectorized": "group_std",
    "rloo": "none",
    "rloo_vectorized": "none",
    "opo": "none",
    "gpg": "none",
    "remax": "none",
}
SINGLETON = {"grpo", "grpo_vectorized", "opo", "gpg", "reinforce_plus_plus_baseline"}  # keep a lone reward as it is
WHOLE = "seq_mean_token_mean"  # of losses that are aggregated so whatever loss_agg_mode says


def loss_of(config: Any) -> Loss:
    """The loss that verl's whole configuration (OmegaConf, or a mapping of its settings) trains with.

    LossError: a setting is not understood or cannot be expressed, and which.
    """
    settings = Settings(_spelled(from_object(config)), TRAINER)
    return settings.reading(_loss(settings), "").sure


def _spelled(source: Source) -> Source:
    """An object of verl names the class of each of its tables, which says nothing."""
    kept = {k: v for k, v in source.settings.items() if k.rpartition(".")[2] != "_target_"}
    return source.only(kept)


def _loss(s: Settings) -> Loss:
    _base(s)
    mode, bypass = _mode(s)
    estimator = s.word("algorithm.adv_estimator", [*SCALE, "grpo", "grpo_passk"])
    preset = PRESET[mode]
    if mode == "vanilla" and estimator == "gae":
        preset = "ppo@verl"
    with quiet_traps():
        start = get_loss(preset)
    changes = _advantage(s, estimator) | _bounds(s, mode) | _aggregation(s, mode) | _kl(s) | bypass
    changes |= _filter(s) | {"entropy_coef": s.must(f"{ACTOR}entropy_coeff")}
    changes |= _critic(s) if estimator == "gae" else {}
    changes |= {} if bypass else _mismatch(s, mode)
    _rewards(s)
    if s.flag("distillation.enabled"):
        s.refuse("distillation.enabled", "a teacher's term is added to this loss, or takes its place")
    return s.build(start, changes)


def _base(s: Settings) -> None:
    """Which of verl's own configurations the settings are written over."""
    names = {"config-name": s.source.settings.get("config-name")}
    listed = s.source.settings.get("defaults")
    for entry in listed if isinstance(listed, list) else []:
        name = next(iter(entry.values())) if isinstance(entry, dict) and len(entry) == 1 else entry
        names["defaults"] = name if name != "_self_" else names.get("defaults")
    if "defaults" in s.source.settings:
        s.asked["defaults"] = None
    for setting, name in names.items():
        if name is not None and str(name).removesuffix(".yaml") not in CONFIGS:
            s.refuse(setting, f"{name} is no configuration of verl's own, and what it sets is not in this file")


def _mode(s: Settings) -> tuple[str, dict[str, Any]]:
    """(the registered policy loss, what bypass_mode makes of it)."""
    where = "algorithm.rollout_correction."
    if s.raw(f"{where}rollout_rs") not in (None, "null", "None", ""):
        s.asked[f"{where}rollout_rs_threshold"] = None
        s.refuse(f"{where}rollout_rs", "it takes tokens out of the mask by the sampler's ratio, normalizers included")
    if not s.flag(f"{where}bypass_mode"):
        return s.word(f"{ACTOR}policy_loss.loss_mode", PRESET), {}
    if s.given(f"{ACTOR}policy_loss.loss_mode"):
        s.note("bypass_mode takes the place of policy_loss.loss_mode.")
    if s.word(f"{where}loss_type", ("ppo_clip", "reinforce")) == "ppo_clip":
        return "vanilla", {"denominator": "behavior"}
    level = s.word(f"{where}rollout_is", ("token", "sequence"), none=True)
    if level is None:
        return "gpg", {"trust": "logp"}
    low, high = _threshold(s)
    if s.flag(f"{where}rollout_is_batch_normalize"):
        s.refuse(f"{where}rollout_is_batch_normalize", "the weights of the policy itself have no such mean here")
    trust = {"trust": "truncate", "cap": high} if low is None else {"trust": "band", "clip_low": 1 - low}
    trust |= {} if low is None else {"clip_high": high - 1}
    ratio = "token" if level == "token" else "sequence_sum"
    return "gpg", trust | {"ratio_level": ratio, "denominator": "behavior"}


def _threshold(s: Settings) -> tuple[float | None, float]:
    """(lower, upper) of the sampler's weights: "0.5_5.0" drops what is outside, a number alone is an upper bound."""
    name = "algorithm.rollout_correction.rollout_is_threshold"
    value = s.raw(name)
    parts = str(value).split("_")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if isinstance(value, bool) or not 1 <= len(numbers) <= 2 or not all(0 < x < math.inf for x in numbers):
        raise LossError(f"{s.place(name)} is {shown(value)}: verl takes an upper bound, or two as in '0.5_5.0'.")
    return (None, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def _mismatch(s: Settings, mode: str) -> dict[str, Any]:
    """The weight π_old/μ, where the old policy is not what sampled."""
    where = "algorithm.rollout_correction."
    level = s.word(f"{where}rollout_is", ("token", "sequence"), none=True)
    if level is None:
        return {"mismatch": "none"}
    if mode == "geo_mean" and level == "token":
        why = "geo_mean takes the geometric mean of the weights of a completion, and here each token has its own"
        s.refuse(f"{where}rollout_is", why)
    low, high = _threshold(s)
    changes = {"mismatch": "tis" if low is None else "icepop", "mismatch_level": level}
    changes |= {"mismatch_low": 0.0 if low is None else low, "mismatch_high": high}
    if s.flag(f"{where}rollout_is_batch_normalize"):
        if level == "sequence":
            s.refuse(f"{where}rollout_is_batch_normalize", "the mean is over completions, and here over tokens")
        changes["mismatch_batch_normalize"] = level == "token"
    return changes


def _advantage(s: Settings, estimator: str) -> dict[str, Any]:
    scale = SCALE.get(estimator)
    std = "algorithm.norm_adv_by_std_in_grpo"
    if scale is None:
        scale = ours("norm_adv_by_std_in_grpo", s.flag(std))["advantage_scale"]
    elif s.given(std) and estimator in ("grpo_vectorized", "gdpo") and not s.flag(std):
        s.note(f"norm_adv_by_std_in_grpo has no effect with {estimator}: verl 0.9.1 does not hand it on.")
    changes = ours("adv_estimator", estimator) | {"advantage_scale": scale}
    changes |= {"singleton": "raw"} if estimator in SINGLETON else {}
    if scale == "group_std":
        changes["eps"] = 1e-6
    if estimator == "gae":
        changes |= {"gamma": s.must("algorithm.gamma"), "lam": s.must("algorithm.lam")}
    if estimator == "reinforce_plus_plus":
        changes["gamma"] = s.must("algorithm.gamma")
    if estimator == "gdpo":
        s.asked["algorithm.gdpo_reward_keys"] = None
        changes |= {"eps": 1e-6, "score_weights": s.numbers("algorithm.gdpo_reward_weights") or ()}
    if s.flag("algorithm.use_pf_ppo") and estimator == "gae":
        s.refuse("algorithm.use_pf_ppo", "it draws the batch anew by its rewards before the update")
    return changes


def _clip(s: Settings) -> tuple[Any, Any]:
    """(low, high): clip_ratio stands in only where one of them is null."""
    low, high = s.number(f"{ACTOR}clip_ratio_low"), s.number(f"{ACTOR}clip_ratio_high")
    if low is None or high is None:
        both = s.must(f"{ACTOR}clip_ratio")
        return both if low is None else low, both if high is None else high
    if s.given(f"{ACTOR}clip_ratio") and s.must(f"{ACTOR}clip_ratio") not in (low, high):
        s.note(
            "clip_ratio alone changes nothing in verl 0.9.1: clip_ratio_low and clip_ratio_high are 0.2 unless set, "
            "and they are what is read."
        )
    return low, high


def _bounds(s: Settings, mode: str) -> dict[str, Any]:
    policy = f"{ACTOR}policy_loss."
    if mode == "vanilla":
        return dict(zip(("clip_low", "clip_high"), _clip(s), strict=True)) | {
            "dual_clip": s.must(f"{ACTOR}clip_ratio_c")
        }
    if mode in ("gspo", "geo_mean"):
        return dict(zip(("clip_low", "clip_high"), _clip(s), strict=True))
    if mode == "cispo":
        low, high = _clip(s)
        return {"clip_low": low, "cap": 1 + high}
    if mode == "sapo":
        return {"tau_pos": s.must(f"{ACTOR}tau_pos"), "tau_neg": s.must(f"{ACTOR}tau_neg")}
    if mode in ("dppo_tv", "dppo_kl"):
        bounds = dict(zip(("delta_low", "delta_high"), _clip(s), strict=True))
        return bounds | {"cap": s.must(f"{ACTOR}clip_ratio_c")}
    if mode == "dro":
        return {"tau": s.must(f"{policy}dro_beta")}
    if mode == "clip_cov":
        s.note("Clip-Cov draws its tokens at random: verl from the global generator, Lossmith from a seed of the loss.")
        bounds = dict(zip(("clip_low", "clip_high"), _clip(s), strict=True))
        bounds |= {"cov_low": s.must(f"{policy}clip_cov_lb"), "cov_high": s.must(f"{policy}clip_cov_ub")}
        return bounds | {"fraction": s.must(f"{policy}clip_cov_ratio")}
    if mode == "kl_cov":
        return {"fraction": s.must(f"{policy}kl_cov_ratio"), "coef": s.must(f"{policy}ppo_kl_coef")}
    return {}


def _aggregation(s: Settings, mode: str) -> dict[str, Any]:
    name = f"{ACTOR}loss_agg_mode"
    written = [x for x in FOREIGN["loss_agg_mode"].write if "-" in x]
    mean = s.word(name, written)
    changes = ours("loss_agg_mode", mean)
    if mean == "seq-mean-token-sum-norm":
        changes["max_length"] = _scale_factor(s)
    if mode == "geo_mean":
        s.note(
            "geo_mean: verl 0.9.1 takes the mean over the rows of each micro-batch and does not divide by their "
            "number, so that 4 micro-batches make its gradient 4.00 times as large; the loss below is that of one."
        )
    if mode not in ("sapo", "geo_mean") or mean == "seq-mean-token-mean":
        return changes
    others = s.flag(f"{ACTOR}use_kl_loss") or s.must(f"{ACTOR}entropy_coeff")
    s.note(f"{mode} is aggregated as {WHOLE} whatever loss_agg_mode says; terms of KL and entropy follow it.")
    if "max_length" in changes and others:
        s.refuse(name, f"with {mode} it is that of the KL and entropy terms alone, which cannot have a length here")
        return {"aggregate": WHOLE}
    other = changes["aggregate"] if others else "same"
    return {"aggregate": WHOLE, "kl_aggregate": other, "entropy_aggregate": other}


def _scale_factor(s: Settings) -> Any:
    factor = s.number(f"{ACTOR}loss_scale_factor")
    if factor is not None:
        return factor
    s.note(
        "loss_scale_factor is not set: verl 0.9.1 then divides by the padded length of the micro-batch at hand, which "
        "is data.max_response_length at most and changes from one to the next. Set it to have the loss below."
    )
    return s.must("data.max_response_length")


def _kl(s: Settings) -> dict[str, Any]:
    in_loss, in_reward = s.flag(f"{ACTOR}use_kl_loss"), s.flag("algorithm.use_kl_in_reward")
    types = [x for x in FOREIGN["kl_penalty"].write if x not in ("full", "square")]
    types += [f"{x}+" for x in types]
    changes: dict[str, Any] = {"beta": 0.0}
    if in_reward:
        if s.flag("algorithm.rollout_correction.bypass_mode"):
            why = "with bypass_mode the KL penalty is that of the sampler, and here that of the old policy"
            s.refuse("algorithm.use_kl_in_reward", why)
        kind = s.word("algorithm.kl_penalty", types)
        changes = ours("kl_penalty", kind.removesuffix("+"))
        changes |= {"beta": s.must("algorithm.kl_ctrl.kl_coef"), "kl_place": "reward", "kl_ratio_weight": False}
        if s.word("algorithm.kl_ctrl.type", ("fixed", "adaptive")) == "adaptive":
            s.asked |= dict.fromkeys(("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"))
            s.refuse(
                "algorithm.kl_ctrl.type",
                "target_kl is of the mean token there and of a completion here, so the coefficient moves otherwise",
            )
    if in_loss:
        if in_reward:
            s.refuse(f"{ACTOR}use_kl_loss", "KL is already taken off the reward, and a loss here has one KL term")
            return changes
        kind = s.word(f"{ACTOR}kl_loss_type", types)
        changes = ours("kl_loss_type", kind.removesuffix("+")) | {"beta": s.must(f"{ACTOR}kl_loss_coef")}
        straight = kind.endswith("+") and kind not in ("mse+", "k2+")
        changes |= {"kl_place": "loss", "kl_straight_through": straight}
    return changes


def _filter(s: Settings) -> dict[str, Any]:
    if not s.flag("algorithm.filter_groups.enable"):
        return {"group_filter": "none"}
    s.asked |= dict.fromkeys(n for n in DEFAULTS if n.startswith("algorithm.filter_groups."))
    metric = s.raw("algorithm.filter_groups.metric")
    s.note(
        f"filter_groups: groups in which every {metric} is the same are left out, and verl samples other prompts in "
        "their place. Here they are judged by the raw reward."
    )
    return {"group_filter": "zero_variance"}


def _rewards(s: Settings) -> None:
    """What verl takes off a reward before any of this."""
    name = next(
        (n for n in s.source.settings if n.endswith(("overlong_buffer_cfg.enable", "overlong_buffer.enable"))), ""
    )
    if name and str(s.source.settings[name]).lower() == "true":
        table = name.removesuffix("enable")
        length, factor = (s.source.settings.get(f"{table}{x}", "?") for x in ("len", "penalty_factor"))
        s.note(
            f"{table.rstrip('.')}: verl's reward function takes up to {factor} off the reward within the last {length} "
            "tokens of the limit, before the loss sees it. In a loss here that would be shaping=['overlong']."
        )


def _critic(s: Settings) -> dict[str, Any]:
    actor = {f"critic.{x}": s.raw(f"{ACTOR}{x}") for x in ("loss_agg_mode", "loss_scale_factor")}
    for name, value in actor.items():
        if s.raw(name) not in (None, value):
            s.refuse(name, "the critic is aggregated in another way than the policy, and here both in one")
    s.note(CRITIC)
    return {"value_coef": 1.0, "value_clip": s.must("critic.cliprange_value")}


def _elsewhere(name: str) -> bool:
    return any(name == table or name.startswith(f"{table}.") for table in TABLES)


TRAINER = Trainer(
    name="verl",
    version="0.9.1",
    title="verl",
    defaults=DEFAULTS,
    elsewhere=_elsewhere,
    own=lambda name: name.startswith(("actor_rollout_ref.", "algorithm.")),
    programs=("verl.trainer.main_ppo", "recipe.dapo.main_dapo"),
    loss=_loss,
    settings=_spelled,
)
