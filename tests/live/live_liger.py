"""Liger's chunked loss in plain torch: the function that its fused linear layer calls on log-probabilities."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from live_case import Case, Fields, Params, value_and_gradients
from live_ranges import clip, dual, either, kl, narrow, nothing, uniform

LOSS_TYPE = {"token_mean": "dapo", "seq_mean_token_mean": "grpo", "seq_mean_token_sum_norm": "dr_grpo"}
NAMES = {
    "clip_low": "epsilon_low", "clip_high": "epsilon_high", "dual_clip": "delta", "beta": "beta",
    "kl_ratio_weight": "use_bias_correction_kl", "max_length": "max_completion_length",
    "tau_pos": "sapo_temperature_pos", "tau_neg": "sapo_temperature_neg",
    "k_pos": "vespo_k_pos", "lam_pos": "vespo_lambda_pos", "k_neg": "vespo_k_neg", "lam_neg": "vespo_lambda_neg",
}  # fmt: skip


@functools.cache
def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

        return LigerFusedLinearGRPOFunction


def call(fields: Fields, params: Params, **changes: Any) -> dict[str, torch.Tensor]:
    logp = fields["logp"].clone().requires_grad_()
    mask = fields["mask"].double()
    settings = {NAMES[key]: value for key, value in params.items() if key in NAMES}
    if "aggregate" in params:
        settings["loss_type"] = LOSS_TYPE.get(params["aggregate"])
    loss, _ = library().ppo_loss_fn(
        per_token_logps=logp,
        attention_mask=mask,
        advantages=fields["advantage"],
        full_attention_mask=mask,
        ref_per_token_logps=fields.get("ref_logp"),
        old_per_token_logps=fields["old_logp"],
        **(settings | changes),
    )
    return value_and_gradients(loss, {"logp": logp})


def of_type(**changes: Any) -> Any:
    return lambda fields, params: call(fields, params, **changes)


def case(name: str, loss: str, params: Any, run: Any = call, **more: Any) -> Case:
    return Case("liger", name, loss, params, run, **more)


STM, TOKENS = {"aggregate": "seq_mean_token_mean"}, {"aggregate": "token_mean"}
NORM = {"aggregate": "seq_mean_token_sum_norm", "max_length": either(16, 33, 100)}
TAUS = {"tau_pos": uniform(0.5, 3), "tau_neg": uniform(0.5, 3)}
GAMMAS = {"k_pos": uniform(1, 3), "lam_pos": uniform(1, 3), "k_neg": uniform(1, 3), "lam_neg": uniform(1, 3)}
SEQUENCE = of_type(importance_sampling_level="sequence")


def capped(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    """CISPO: epsilon_high is the absolute cap, and there is no lower bound."""
    return call(fields, params, loss_type="cispo", epsilon_high=params["cap"])


CASES = [
    case("dapo", "dapo", nothing | clip | TOKENS, empty_rows=True),
    case("dapo_kl", "dapo", clip | kl | TOKENS, fields=("ref_logp",)),
    case("grpo", "grpo", nothing | clip | STM),
    case("dr_grpo", "dr_grpo", nothing | clip | NORM),
    case("dual_clip", "grpo", nothing | dual | STM),
    case("bnpo", "bnpo", nothing | clip | TOKENS, of_type(loss_type="bnpo"), data="dapo"),
    case("cispo_cap", "cispo", nothing | TOKENS | {"clip_low": 1.0, "cap": uniform(0.5, 5)}, capped),
    case("sapo", "sapo", nothing | TAUS | STM, of_type(loss_type="sapo")),
    case("vespo", "vespo", nothing | GAMMAS | TOKENS, of_type(loss_type="vespo")),
    case("gspo", "gspo", nothing | narrow | STM, SEQUENCE),
    case("gspo_kl", "gspo", narrow | kl | STM, SEQUENCE, fields=("ref_logp",)),
]
