"""TRL's `GRPOConfig` -> the loss of its `GRPOTrainer`, read in `grpo_config.py` and `grpo_trainer.py` of 1.16.0."""

from __future__ import annotations

import math
from typing import Any

from lossmith.adapters.configurations.reading import Settings, Trainer, ours
from lossmith.adapters.configurations.source import Source, from_object
from lossmith.errors import LossError, quiet_traps
from lossmith.losses import Loss, get_loss
from lossmith.losses.composition.foreign import FOREIGN

__all__ = ["TRAINER", "loss_of"]

DEFAULTS: dict[str, Any] = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "sapo_temperature_neg": 1.05,
    "sapo_temperature_pos": 1.0,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "reward_weights": None,
    "mask_truncated_completions": False,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "entropy_coef_min": 0.0,
    "entropy_coef_max": 1.0,
    "entropy_coef_delta": 0.005,
    "entropy_target": 0.2,
    "router_aux_loss_coef": None,
    "max_completion_length": 512,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_cap": None,
}

# Of GRPOConfig and the arguments of `trl grpo`, what does not choose the loss.
_ELSEWHERE = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm
    label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval tf32 gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
    liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy
    logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
    hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor remove_unused_columns label_names train_sampling_strategy length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint logging_dir
    local_rank model_init_kwargs trust_remote_code disable_dropout cast_lm_head_to_fp32 num_generations
    num_generations_eval ds3_gather_for_generation shuffle_dataset pad_to_multiple_of generation_batch_size
    steps_per_generation temperature top_p top_k min_p generation_kwargs chat_template_kwargs repetition_penalty
    cache_implementation vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size num_iterations max_completion_length
    max_tool_calling_iterations log_completions log_multimodal num_completions_to_print log_unique_prompts
    log_completions_hub_repo use_transformers_continuous_batching transformers_continuous_batching_config
    use_transformers_paged dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming
    ignore_bias_buffers model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha
    lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora
    load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
    reward_model_name_or_path reward_funcs env datasets
"""
ELSEWHERE = frozenset(_ELSEWHERE.split())

# What this trainer's configuration has and others' have not; `beta` alone could be anyone's.
OWN = (DEFAULTS.keys() - {"beta", "delta"}) | {"num_generations", "max_tool_calling_iterations", "vllm_mode"}

TOKEN_MEAN = ("dapo", "bnpo", "cispo", "vespo")
MICRO_BATCHES = (
    "{setting}: in TRL {version} this loss depends on the micro-batch size. Four updates on the same data in "
    "micro-batches of 4 and of 16 ended max|dθ| {gap} apart, where the parameters moved 0.09 to 0.13 and loss_type "
    "'dapo' differed by 2.4e-7. The loss below is the one of a whole update as one micro-batch."
)
GAPS = {"entropy_coef": "1.5e-2", "top_entropy_quantile": "7.4e-2", "loss_type 'bnpo'": "6.9e-2"}


def loss_of(config: Any, rewards: int | None = None) -> Loss:
    """The loss that a `GRPOConfig` (or a mapping of its settings) trains with.

    rewards: how many reward functions there are, to be compared with the weights. LossError: a setting is not
    understood or cannot be expressed, and which.
    """
    settings = Settings(from_object(config), TRAINER)
    loss = _loss(settings)
    weights = settings.numbers("reward_weights")
    if rewards is not None and weights is not None and len(weights) != rewards:
        raise LossError(f"reward_weights has {len(weights)} numbers, and there are {rewards} reward functions.")
    return settings.reading(loss, "").sure


def _spelled(source: Source) -> Source:
    """On the command line an underscore may be a dash."""
    return source.renamed({name: name.replace("-", "_") for name in source.settings})


def _loss(s: Settings) -> Loss:
    written = FOREIGN["loss_type"].write
    kind = s.word("loss_type", written)
    with quiet_traps():
        start = get_loss(written[kind].removeprefix("the loss "))
    changes: dict[str, Any] = {"ratio_level": start.to_dict()["ratio_level"]}
    if kind != "vespo":
        changes |= ours("importance_sampling_level", s.word("importance_sampling_level", ("token", "sequence")))
    changes |= (
        _bounds(s, kind) | _advantage(s) | _kl(s, kind) | _left_out(s, kind) | _entropy(s, kind) | _mismatch(s, kind)
    )
    if kind == "dr_grpo":
        changes["max_length"] = s.must("max_completion_length")
    if kind == "bnpo":
        _micro_batches(s, "loss_type 'bnpo'")
    if s.number("router_aux_loss_coef"):
        s.note("router_aux_loss_coef adds the load-balancing loss of a mixture of experts, which is not shown here.")
    if kind in TOKEN_MEAN:
        _generations(s)
    return s.build(start, changes)


def _micro_batches(s: Settings, setting: str) -> None:
    s.note(MICRO_BATCHES.format(setting=setting, version=TRAINER.version, gap=GAPS[setting]))


def _bounds(s: Settings, kind: str) -> dict[str, Any]:
    """What bounds the ratio."""
    if kind == "sapo":
        return {"tau_pos": s.must("sapo_temperature_pos"), "tau_neg": s.must("sapo_temperature_neg")}
    if kind == "vespo":
        return {
            "k_pos": s.must("vespo_k_pos"),
            "lam_pos": s.must("vespo_lambda_pos"),
            "k_neg": s.must("vespo_k_neg"),
            "lam_neg": s.must("vespo_lambda_neg"),
        }
    high = s.number("epsilon_high")
    if kind == "cispo":  # no lower bound, and the upper one is the cap itself
        high = s.must("epsilon") if high is None else high
        if high < 1:
            s.note(f"The cap of CISPO's weights is {high:g} itself, not 1 + {high:g}: every weight is held below 1.")
        return {"clip_low": 1.0, "cap": high}
    low = s.must("epsilon")
    bounds = {"clip_low": low, "clip_high": low if high is None else high, "dual_clip": s.number("delta")}
    if bounds["dual_clip"] is None or bounds["dual_clip"] >= 1 + bounds["clip_high"]:
        return bounds
    if bounds["dual_clip"] < 1:
        s.refuse("delta", "below 1 it also cuts ratios that good completions start from, which no loss here does")
        return bounds | {"dual_clip": None}
    s.note(
        f"delta={bounds['dual_clip']:g} is below 1 + epsilon_high, so in TRL it is good completions that it bounds, "
        "and bad ones are bounded at 1 + epsilon_high."
    )
    return bounds | {"clip_high": bounds["dual_clip"] - 1, "dual_clip": 1 + bounds["clip_high"]}


def _advantage(s: Settings) -> dict[str, Any]:
    weights = s.numbers("reward_weights")
    how = s.word("multi_objective_aggregation", ("sum_then_normalize", "normalize_then_sum"))
    if how == "normalize_then_sum":
        return {"advantage": "gdpo", "advantage_scale": "none", "eps": 1e-4, "score_weights": weights or ()}
    summed = {"shaping": ["weighted_sum"], "score_weights": weights} if weights and set(weights) != {1} else {}
    scale = s.raw("scale_rewards")
    if isinstance(scale, str) and scale.lower() in ("true", "false"):  # as the command line gives it
        scale = scale.lower() == "true"
    if not isinstance(scale, (bool, str)):
        scale = s.word("scale_rewards", FOREIGN["scale_rewards"].write)
    try:
        return summed | {"advantage": "group", "eps": 1e-4} | ours("scale_rewards", scale)
    except LossError as error:
        raise LossError(f"{s.source.where}: {error}") from None


def _kl(s: Settings, kind: str) -> dict[str, Any]:
    beta = s.must("beta")
    if beta == 0:
        return {"beta": 0.0}
    weighted = s.flag("use_bias_correction_kl")
    if s.flag("sync_ref_model"):
        s.asked |= dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"))
        s.note("sync_ref_model moves the reference policy during training; the loss at each step is the one shown.")
    if kind == "vespo" and weighted:
        s.refuse(
            "use_bias_correction_kl",
            "TRL multiplies VESPO's KL term by the ratio of each token, and its weight is of the product of them; a "
            "loss here has one ratio for both. Set it to false, or beta to 0",
        )
        weighted = False
    return {"beta": beta, "kl_estimator": "k3", "kl_place": "loss", "kl_ratio_weight": weighted}


def _left_out(s: Settings, kind: str) -> dict[str, Any]:
    """Completions and tokens without a policy term."""
    changes = ours("mask_truncated_completions", s.flag("mask_truncated_completions"))
    if changes["truncated"] == "mask" and kind in TOKEN_MEAN:
        s.note(
            "mask_truncated_completions: TRL empties the mask of a truncated completion before it counts tokens, so "
            "that a token mean divides by the tokens of the others alone; here truncated completions are counted."
        )
    threshold = s.number("off_policy_mask_threshold")
    if threshold is not None:
        changes |= {"sequence_mask": "opsm", "opsm_delta": threshold}
    share = s.must("top_entropy_quantile")
    if share >= 1:
        return changes
    if share <= 0:
        s.refuse("top_entropy_quantile", "0 keeps the one token of highest entropy, which is no share of them")
        return changes
    if changes["truncated"] == "mask":
        why = (
            "with mask_truncated_completions the quantile is over the tokens of the completions that ended, here of all"
        )
        s.refuse("top_entropy_quantile", why)
    _micro_batches(s, "top_entropy_quantile")
    return changes | {"token_mask": "top_entropy", "top_entropy": share}


def _entropy(s: Settings, kind: str) -> dict[str, Any]:
    coefficient = s.must("entropy_coef")
    if s.flag("use_adaptive_entropy"):
        why = "the coefficient moves with the entropy from update to update; here it is constant"
        s.asked |= dict.fromkeys(name for name in DEFAULTS if name.startswith("entropy_"))
        s.refuse("use_adaptive_entropy", why)
    if coefficient == 0:
        return {"entropy_coef": 0.0}
    if s.must("top_entropy_quantile") < 1:
        s.refuse("entropy_coef", "with top_entropy_quantile the bonus is of the tokens that are kept, here of all")
    _micro_batches(s, "entropy_coef")
    return {"entropy_coef": coefficient, "entropy_aggregate": "same" if kind in TOKEN_MEAN else "token_mean"}


def _mismatch(s: Settings, kind: str) -> dict[str, Any]:
    """The weight of a completion that vLLM sampled."""
    if not s.flag("use_vllm") or not s.flag("vllm_importance_sampling_correction"):
        return {"mismatch": "none"}
    modes = FOREIGN["vllm_importance_sampling_mode"].write
    mode = s.word("vllm_importance_sampling_mode", modes)
    low, high = s.number("vllm_importance_sampling_clip_min"), s.number("vllm_importance_sampling_clip_max")
    cap = s.number("vllm_importance_sampling_cap")  # its former name, which wins
    high = high if cap is None else cap
    if kind == "vespo":
        s.refuse(
            "vllm_importance_sampling_mode",
            "in VESPO the bounded weights of the sampler multiply the completion's ratio inside its gamma function; "
            "set vllm_importance_sampling_correction to false",
        )
        return {"mismatch": "none"}
    bounds = {"mismatch_low": 0.0 if low is None else low, "mismatch_high": math.inf if high is None else high}
    return ours("vllm_importance_sampling_mode", mode) | bounds


def _generations(s: Settings) -> None:
    """One generation batch may serve several updates."""
    steps, accumulated = (
        s.source.settings.get("steps_per_generation"),
        s.source.settings.get("gradient_accumulation_steps"),
    )
    if isinstance(steps, int) and isinstance(accumulated, int) and steps > accumulated:
        s.note(
            f"One generation batch serves {steps / accumulated:g} updates: a token mean divides each by the mean "
            "number of tokens of an update, not by its own."
        )


TRAINER = Trainer(
    name="trl",
    version="1.16.0",
    title="TRL",
    defaults=DEFAULTS,
    elsewhere=lambda name: name.partition(".")[0] in ELSEWHERE,
    own=OWN.__contains__,
    programs=("GRPOConfig",),
    loss=_loss,
    settings=_spelled,
)
