"""TRL's way from rewards to the loss, its own methods on a trainer without a model; and random configurations."""

from __future__ import annotations

import random
import warnings
from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

import torch

from live_case import value_and_gradients
from live_trl import library

GROUPS, SIZE, LENGTH = 3, 4, 7
ROWS = GROUPS * SIZE


def draw_trl(rng: random.Random) -> dict[str, Any]:
    """Settings of a GRPOConfig that are of the loss, as somebody might choose them."""
    kind = rng.choice(["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo", "luspo"])
    drawn: dict[str, Any] = {
        "loss_type": kind,
        "importance_sampling_level": rng.choice(["token", "token", "sequence"]),
        "epsilon": rng.choice([0.02, 0.1, 0.2]),
        "epsilon_high": rng.choice([None, 0.05, 0.28]) if kind != "cispo" else rng.choice([1.1, 5.0, None]),
        "delta": rng.choice([None, None, 1.1, 1.4, 4.0]),
        "beta": rng.choice([0.0, 0.04, 0.3]),
        "use_bias_correction_kl": rng.choice([False, True]),
        "scale_rewards": rng.choice(["group", "batch", "none", True, False]),
        "multi_objective_aggregation": rng.choice(["sum_then_normalize", "sum_then_normalize", "normalize_then_sum"]),
        "reward_weights": rng.choice([None, [0.5, 2.0], [1.0, 1.0]]),
        "mask_truncated_completions": rng.choice([False, False, True]),
        "off_policy_mask_threshold": rng.choice([None, None, 0.01]),
        "top_entropy_quantile": rng.choice([1.0, 1.0, 1.0, 0.5]),
        "entropy_coef": rng.choice([0.0, 0.0, 0.01]),
        "sapo_temperature_pos": rng.choice([1.0, 1.5]),
        "sapo_temperature_neg": rng.choice([1.05, 2.0]),
        "vespo_k_pos": rng.choice([2.0, 1.5]),
        "use_vllm": rng.choice([False, False, True]),
        "vllm_importance_sampling_correction": rng.choice([True, True, False]),
        "vllm_importance_sampling_mode": rng.choice(
            ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
        ),
        "vllm_importance_sampling_clip_max": rng.choice([1.2, 3.0]),
        "vllm_importance_sampling_clip_min": rng.choice([None, 0.8]),
    }
    return {name: value for name, value in drawn.items() if rng.random() < 0.75 or name == "loss_type"}


def trl_config(**settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from accelerate import Accelerator
        from trl import GRPOConfig

        made = GRPOConfig(
            output_dir="unused", use_cpu=True, bf16=False, report_to=[], num_generations=SIZE, num_iterations=2,
            per_device_train_batch_size=ROWS, max_completion_length=LENGTH, **settings,
        )  # fmt: skip
        Accelerator(cpu=True)  # the configuration has just reset what every accelerator of the process shares
        return made


def fields(seed: int) -> dict[str, torch.Tensor]:
    """What a generation batch holds: ragged completions, two of which were cut at the token limit."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LENGTH + 1, (ROWS,), generator=g)
    truncated = torch.zeros(ROWS, dtype=torch.bool)
    truncated[[1, 6]] = True
    lengths[truncated] = LENGTH
    mask = torch.arange(LENGTH) < lengths[:, None]
    normal = lambda scale: torch.randn(ROWS, LENGTH, generator=g, dtype=torch.float64) * scale  # noqa: E731
    old = -1.5 + normal(0.3)
    return {
        "mask": mask,
        "truncated": truncated,
        "group": torch.arange(GROUPS).repeat_interleave(SIZE),
        "parts": torch.randn(ROWS, 2, generator=g, dtype=torch.float64),
        "old_logp": old,
        "logp": old + normal(0.15),
        "ref_logp": old + normal(0.2),
        "behavior_logp": old + normal(0.1),
        "value": normal(0.5),
        "greedy": torch.randn(ROWS, generator=g, dtype=torch.float64),
        "entropy": normal(1.0).abs().float().double(),  # TRL takes its quantile in single precision
    }


def run_trl(config: Any, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Value and gradient of TRL's loss on one generation batch: its advantages, masks and weights are its own."""
    trainer, logp = _trainer(config, data), data["logp"].clone().requires_grad_()
    torch.set_default_dtype(torch.float64)  # TRL makes tensors of the sampler's numbers
    try:
        inputs = trainer._generate_and_score_completions([{"prompt": "x"}] * ROWS)
        object.__setattr__(
            trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (logp, data["entropy"], None)
        )
        loss = trainer._compute_loss(trainer.model, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    return value_and_gradients(loss, {"logp": logp})


READ = """
    loss_type multi_objective_aggregation scale_rewards importance_sampling_level off_policy_mask_threshold
    mask_truncated_completions top_entropy_quantile entropy_coef use_adaptive_entropy use_vllm beta
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min max_completion_length num_generations num_iterations pad_to_multiple_of
"""


def _trainer(config: Any, data: dict[str, torch.Tensor]) -> Any:
    """TRL's trainer with what its methods read; the model, the sampler and the reward functions are given."""
    it = library().grpo.__new__(library().grpo)
    model, reference = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.is_gradient_checkpointing = False
    eos, lengths = 2, data["mask"].sum(1).tolist()
    ids = [[5] * (n - 1) + [5 if cut else eos] for n, cut in zip(lengths, data["truncated"].tolist(), strict=True)]
    sampled = [row[:n].tolist() for row, n in zip(data["behavior_logp"], lengths, strict=True)]

    def log_probs(which: Any, *_: Any, **__: Any) -> Any:
        return data["ref_logp" if which is reference else "old_logp"], None, None

    settings = {name: getattr(config, name) for name in READ.split()} | dict(
        args=config, model=model, ref_model=reference, accelerator=library().accelerator,
        current_gradient_accumulation_steps=1, aux_loss_enabled=False, log_multimodal=False,
        epsilon_low=config.epsilon, epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        _entropy_bonus_enabled=config.entropy_coef != 0 or config.use_adaptive_entropy,
        _metrics={"train": defaultdict(list)}, _pending_extra_logs={}, _pending_metrics={},
        _logs={"prompt": deque(), "completion": deque(), "rewards": defaultdict(deque), "advantages": deque(),
               "extra": defaultdict(deque), "images": deque()},
        environment_factories=None, environments=None, tools=None, _is_vlm=False, chat_template_kwargs={},
        eos_token_ids=[eos], _tokenizer=SimpleNamespace(pad_token_id=0), processing_class=None,
        reward_funcs=[None, None], reward_func_names=["a", "b"],
        reward_weights=torch.tensor(config.reward_weights or [1.0, 1.0]),
        _generate=lambda prompts: ([[5]] * ROWS, ids, None, ["y"] * ROWS, sampled if config.use_vllm else None, {},
                                   None, None),
        _calculate_rewards=lambda *_: data["parts"], _get_per_token_logps_and_entropies=log_probs,
    )  # fmt: skip
    for name, value in settings.items():
        object.__setattr__(it, name, value)
    return it
