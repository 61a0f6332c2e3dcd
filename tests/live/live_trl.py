"""TRL's own loss methods, run on given log-probabilities."""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

from live_case import Case, Fields, Params, value_and_gradients
from live_ranges import clip, dual, either, kl, narrow, nothing, uniform

LOSS_TYPE = {
    "token_mean": "dapo",
    "seq_mean_token_mean": "grpo",
    "seq_mean_token_sum_norm": "dr_grpo",
    "seq_mean_token_sum": "luspo",
}


@functools.cache
def library() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from accelerate import Accelerator
        from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
        from trl.trainer.grpo_trainer import GRPOTrainer
        from trl.trainer.rloo_trainer import RLOOTrainer

        return SimpleNamespace(grpo=GRPOTrainer, rloo=RLOOTrainer, gmpo=GMPOTrainer, accelerator=Accelerator(cpu=True))


def trainer(kind: str, logp: torch.Tensor, entropy: torch.Tensor, params: Params, **changes: Any) -> Any:
    """A trainer with what its loss method reads, and given log-probabilities in place of a model's."""
    get = params.get
    it = getattr(library(), kind).__new__(getattr(library(), kind))
    settings = dict(
        aux_loss_enabled=False,
        top_entropy_quantile=get("top_entropy", 1.0),
        off_policy_mask_threshold=get("opsm_delta"),
        importance_sampling_level="token",
        beta=get("beta", 0.0),
        loss_type="dapo",
        epsilon_low=get("clip_low", 0.2),
        epsilon_high=get("clip_high", 0.2),
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=get("max_length"),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=library().accelerator,
        _entropy_bonus_enabled=bool(get("entropy_coef")),
        use_adaptive_entropy=False,
        entropy_coef=get("entropy_coef", 0.0),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, entropy, None),
        args=SimpleNamespace(
            delta=get("dual_clip"),
            use_bias_correction_kl=get("kl_ratio_weight", False),
            sapo_temperature_pos=get("tau_pos"),
            sapo_temperature_neg=get("tau_neg"),
            vespo_k_pos=get("k_pos"),
            vespo_lambda_pos=get("lam_pos"),
            vespo_k_neg=get("k_neg"),
            vespo_lambda_neg=get("lam_neg"),
            steps_per_generation=1,
        ),
    )
    for name, value in (settings | changes).items():
        object.__setattr__(it, name, value)
    return it


def call(fields: Fields, params: Params, kind: str = "grpo", **changes: Any) -> dict[str, torch.Tensor]:
    """Value and gradient of the trainer's loss."""
    logp = fields["logp"].clone().requires_grad_()
    mask = fields["mask"].long()
    old = fields.get("old_logp", fields["logp"])
    entropy = fields.get("entropy", torch.zeros_like(old))
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": fields["advantage"],
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "num_items_in_batch": mask.sum(),
    }
    for ours, theirs in (("ref_logp", "ref_per_token_logps"), ("behavior_logp", "sampling_per_token_logps")):
        if ours in fields:
            inputs[theirs] = fields[ours]
    loss = trainer(kind, logp, entropy, params, **changes)._compute_loss(None, inputs)
    return value_and_gradients(loss, {"logp": logp})


def by_aggregate(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    return call(fields, params, loss_type=LOSS_TYPE[params["aggregate"]])


def of_type(loss_type: str, **changes: Any) -> Any:
    return lambda fields, params: call(fields, params, loss_type=loss_type, **changes)


def capped(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    """CISPO: epsilon_high is the absolute cap, and there is no lower bound."""
    return call(fields, params, loss_type="cispo", epsilon_high=params["cap"])


def case(name: str, loss: str, params: Any, run: Any, **more: Any) -> Case:
    return Case("trl", name, loss, params, run, **more)


STM, TOKENS = {"aggregate": "seq_mean_token_mean"}, {"aggregate": "token_mean"}
TAUS = {"tau_pos": uniform(0.5, 3), "tau_neg": uniform(0.5, 3)}
GAMMAS = {"k_pos": uniform(1, 3), "lam_pos": uniform(1, 3), "k_neg": uniform(1, 3), "lam_neg": uniform(1, 3)}
SEQUENCE = {"importance_sampling_level": "sequence"}

COEF = {"entropy_coef": uniform(0.001, 0.1)}
TOP = {"token_mask": "top_entropy", "top_entropy": uniform(0.1, 0.9)}
OPSM = {"sequence_mask": "opsm", "opsm_delta": uniform(-0.1, 0.2)}
NORM = {"aggregate": "seq_mean_token_sum_norm", "max_length": either(16, 33, 100)}

CASES = [
    case("grpo", "grpo", nothing | clip | STM, by_aggregate),
    case("grpo_kl", "grpo", clip | kl | STM, by_aggregate, fields=("ref_logp",)),
    case("dapo", "dapo", nothing | clip | TOKENS, by_aggregate, empty_rows=True),
    case("dapo_dual_clip", "dapo", nothing | dual | TOKENS, by_aggregate),
    case("token_advantage", "dapo", nothing | clip | TOKENS, by_aggregate, token_advantage=True),
    case("entropy_bonus", "dapo", nothing | clip | TOKENS | COEF, by_aggregate, fields=("entropy",)),
    case("top_entropy", "dapo", nothing | clip | TOKENS | TOP, by_aggregate, fields=("entropy",)),
    case("opsm", "grpo", nothing | clip | STM | OPSM, by_aggregate, fields=("behavior_logp",)),
    case("dr_grpo", "dr_grpo", nothing | clip | NORM, by_aggregate),
    case("bnpo", "bnpo", nothing | clip | TOKENS, of_type("bnpo"), data="dapo"),
    case("cispo_cap", "cispo", nothing | TOKENS | {"clip_low": 1.0, "cap": uniform(0.5, 5)}, capped),
    case("sapo", "sapo", nothing | TAUS | STM, of_type("sapo")),
    case("vespo", "vespo", nothing | GAMMAS | TOKENS, of_type("vespo")),
    case("gspo", "gspo", nothing | narrow | STM, of_type("grpo", **SEQUENCE)),
    case("luspo", "luspo", nothing | narrow | {"aggregate": "seq_mean_token_sum"}, of_type("luspo", **SEQUENCE)),
    case("gmpo", "gmpo", nothing | clip, lambda fields, params: call(fields, params, "gmpo")),
    case("rloo", "rloo", nothing | clip, lambda fields, params: call(fields, params, "rloo")),
]  # fmt: skip
