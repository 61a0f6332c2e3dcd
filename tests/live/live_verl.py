"""verl's loss functions, KL penalties, value loss and mismatch weights."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace
from typing import Any

import torch

from live_case import Case, Fields, Params, value_and_gradients
from live_ranges import Ranges, clip, either, narrow, nothing, uniform

KL_NAMES = {"k1": "kl", "k2": "mse", "k3": "low_var_kl", "abs": "abs"}


@functools.cache
def library() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from verl.trainer.config import AlgoConfig
        from verl.trainer.ppo import core_algos, rollout_corr_helper
        from verl.workers.config import ActorConfig
        from verl.workers.config.actor import PolicyLossConfig

        return SimpleNamespace(
            core=core_algos, helper=rollout_corr_helper, Actor=ActorConfig, Policy=PolicyLossConfig, Algo=AlgoConfig
        )


def config(**changes: Any) -> Any:
    """An actor configuration; all but the changes is verl's default."""
    it = library()
    policy = {k: changes.pop(k) for k in list(changes) if k in it.Policy.__dataclass_fields__}
    policy_loss = it.Policy(**policy)
    return it.Actor(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss, **changes)


def settings(params: Params) -> dict[str, Any]:
    """verl's names for Lossmith's parameters."""
    names = {
        "clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high", "dual_clip": "clip_ratio_c",
        "delta_low": "clip_ratio_low", "delta_high": "clip_ratio_high", "tau_pos": "tau_pos", "tau_neg": "tau_neg",
        "tau": "dro_beta", "coef": "ppo_kl_coef", "cov_low": "clip_cov_lb", "cov_high": "clip_cov_ub",
    }  # fmt: skip
    found = {names[key]: value for key, value in params.items() if key in names}
    if "cap" in params:  # the bound of cispo is 1 + clip_ratio_high, that of dppo is clip_ratio_c
        found |= {"clip_ratio_c": params["cap"]} if "delta_low" in params else {"clip_ratio_high": params["cap"] - 1}
    if "fraction" in params:
        found["clip_cov_ratio" if "cov_low" in params else "kl_cov_ratio"] = params["fraction"]
    if "max_length" in params:
        found["global_batch_info"] = {"loss_scale_factor": params["max_length"]}
    return found


def policy_loss(name: str, fields: Fields, params: Params, cfg: Any = None) -> dict[str, torch.Tensor]:
    """Value and gradient of a registered policy loss."""
    logp = fields["logp"].clone().requires_grad_()
    mask = fields["mask"].double()
    advantage = fields["advantage"]
    advantage = (advantage[:, None] if advantage.ndim == 1 else advantage).expand_as(mask).contiguous()
    loss, _ = library().core.get_policy_loss_fn(name)(
        old_log_prob=fields.get("old_logp", fields["logp"]),
        log_prob=logp,
        advantages=advantage,
        response_mask=mask,
        loss_agg_mode=params.get("aggregate", "token_mean").replace("_", "-"),
        config=cfg or config(**settings(params)),
        rollout_is_weights=mismatch_weights(fields, params),
    )
    return value_and_gradients(loss, {"logp": logp})


def mismatch_weights(fields: Fields, params: Params) -> torch.Tensor | None:
    if params.get("mismatch", "none") == "none":
        return None
    low, high = params.get("mismatch_low"), params["mismatch_high"]
    weights, _ = library().helper.compute_rollout_correction_weights(
        fields["old_logp"] - fields["behavior_logp"],
        fields["mask"].double(),
        rollout_is=params["mismatch_level"],
        rollout_is_threshold=f"{low}_{high}" if params["mismatch"] == "icepop" else high,
        rollout_is_batch_normalize=params.get("mismatch_batch_normalize", False),
    )
    return weights


def kl_term(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    logp = fields["logp"].clone().requires_grad_()
    name = KL_NAMES[params["kl_estimator"]] + ("+" if params["kl_straight_through"] else "")
    term = library().core.kl_penalty(logp, fields["ref_logp"], name)
    loss = library().core.agg_loss(term, fields["mask"].double(), params["aggregate"].replace("_", "-"))
    return value_and_gradients(params["beta"] * loss, {"logp": logp})


def value_loss(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    value = fields["value"].clone().requires_grad_()
    loss, _ = library().core.compute_value_loss(
        value,
        fields["returns"],
        fields["old_value"],
        fields["mask"].double(),
        params["value_clip"],
        loss_agg_mode=params["aggregate"].replace("_", "-"),
    )
    return value_and_gradients(loss, {"value": value})


def case(name: str, loss: str, params: Ranges, registered: str, **more: Any) -> Case:
    return Case("verl", name, loss, params, lambda f, p: policy_loss(registered, f, p), **more)


TOKENS, STM = {"aggregate": "token_mean"}, {"aggregate": "seq_mean_token_mean"}
ANY = {"aggregate": either("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum")}
NORM = {"aggregate": "seq_mean_token_sum_norm", "max_length": either(16, 33, 100)}
PPO = nothing | clip | {"dual_clip": uniform(1.2, 3.5)}
TIS = {"mismatch": "tis", "mismatch_high": uniform(1.05, 2.5)}
ICEPOP = {"mismatch": "icepop", "mismatch_low": uniform(0.5, 0.9), "mismatch_high": uniform(1.1, 2.5)}
WIDE = {"mismatch_low": uniform(0.02, 0.5), "mismatch_high": uniform(2, 50)}  # products of ratios spread further
TOKEN, SEQUENCE = {"mismatch_level": "token"}, {"mismatch_level": "sequence"}
DELTAS = {"delta_low": uniform(0.02, 0.2), "delta_high": uniform(0.02, 0.2), "cap": uniform(1.2, 4)}
KL_DELTAS = {"delta_low": uniform(0.005, 0.05), "delta_high": uniform(0.005, 0.05), "cap": uniform(1.2, 4)}
TAUS = {"tau_pos": uniform(0.5, 3), "tau_neg": uniform(0.5, 3)}
COV = {"fraction": 1.0, "cov_low": uniform(0.01, 0.1), "cov_high": uniform(0.2, 1)}
KL = Ranges({"kl_place": "loss", "beta": uniform(0.01, 1), "kl_straight_through": either(False, True)})
BEHAVIOR = ("behavior_logp",)

CASES = [
    case("ppo", "ppo", PPO | ANY, "vanilla", empty_rows=True),
    case("ppo_norm", "ppo", PPO | NORM, "vanilla", data="ppo", empty_rows=True),
    case("ppo_token_advantage", "ppo", PPO | ANY, "vanilla", token_advantage=True),
    case("ppo_tis_token", "ppo", PPO | TOKENS | TIS | TOKEN, "vanilla", fields=BEHAVIOR),
    case("ppo_tis_sequence", "ppo", PPO | TOKENS | TIS | SEQUENCE, "vanilla", fields=BEHAVIOR),
    case("ppo_icepop", "ppo", PPO | TOKENS | ICEPOP | TOKEN, "vanilla", fields=BEHAVIOR),
    case(
        "ppo_icepop_sequence", "ppo", PPO | TOKENS | ICEPOP | WIDE | SEQUENCE, "vanilla",
        fields=BEHAVIOR, data="ppo_icepop",
    ),
    case(
        "ppo_tis_normalized", "ppo", PPO | TOKENS | TIS | TOKEN | {"mismatch_batch_normalize": True}, "vanilla",
        fields=BEHAVIOR, data="ppo_tis_token",
    ),
    case("reinforce", "reinforce", nothing | ANY, "gpg", empty_rows=True),
    case("reinforce_tis", "reinforce", nothing | ANY | TIS | TOKEN, "gpg", fields=BEHAVIOR),
    case("gspo_token", "gspo_token", nothing | narrow | ANY, "gspo", empty_rows=True),
    case("gspo_token_advantage", "gspo_token", nothing | narrow | STM, "gspo", data="gspo_token", token_advantage=True),
    case("sapo", "sapo", nothing | TAUS | STM, "sapo", token_advantage=True, empty_rows=True),
    case("cispo", "cispo", nothing | ANY | {"clip_low": uniform(0.1, 1), "cap": uniform(1.05, 5)}, "cispo"),
    case("dppo_tv", "dppo_tv", nothing | DELTAS | ANY, "dppo_tv", token_advantage=True),
    case("dppo_kl", "dppo_kl", nothing | KL_DELTAS | ANY, "dppo_kl", token_advantage=True),
    case("gmpo", "gmpo", nothing | clip, "geo_mean"),
    case("dro", "dro", nothing | ANY | {"tau": uniform(0.02, 1)}, "dro", token_advantage=True),
    case("clip_cov", "clip_cov", nothing | clip | TOKENS | COV, "clip_cov"),
    case("kl_cov", "kl_cov", nothing | TOKENS | {"fraction": uniform(0.02, 0.5), "coef": uniform(0.1, 1)}, "kl_cov"),
    *[
        Case("verl", f"kl_{name}", "kl_only", KL | ANY | {"kl_estimator": name}, kl_term, "kl_term", ("ref_logp",))
        for name in KL_NAMES
    ],
    Case(
        "verl", "value_loss", "value_clipped", Ranges({"value_clip": uniform(0.05, 1)}) | ANY, value_loss,
        fields=("value", "old_value", "returns"),
    ),
]  # fmt: skip
