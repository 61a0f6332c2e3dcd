"""verl's advantage estimators."""

from __future__ import annotations

from typing import Any

import torch

from live_case import Case, Fields, Params
from live_ranges import Ranges, uniform
from live_verl import library


def token_rewards(fields: Fields) -> torch.Tensor:
    """Rewards as verl has them: one a token, that of a completion on its last valid token."""
    mask, reward = fields["mask"], fields["reward"]
    if reward.ndim == 2:
        return reward * mask
    place = torch.arange(mask.shape[1]).expand_as(mask)
    last = torch.where(mask, place, -1).amax(1, keepdim=True)
    return reward[:, None] * (place == last)


def estimate(function: str, fields: Fields, params: Params, **more: Any) -> dict[str, torch.Tensor]:
    if "group" in fields:
        more["index"] = fields["group"].numpy()
    advantage, _ = getattr(library().core, f"compute_{function}_advantage")(
        token_level_rewards=token_rewards(fields), response_mask=fields["mask"].double(), **more
    )
    return {"advantage": advantage}


def gae(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    advantage, _ = library().core.compute_gae_advantage_return(
        token_rewards(fields), fields["value"], fields["mask"].double(), params["gamma"], params["lam"]
    )
    return {"advantage": advantage}


def grpo(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    scaled = params["advantage_scale"] == "group_std"
    more = {"epsilon": params["eps"]} if scaled else {}
    return estimate("grpo_outcome", fields, params, norm_adv_by_std_in_grpo=scaled, **more)


def with_config(function: str) -> Any:
    def run(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
        config = library().Algo(
            gamma=params.get("gamma", 1.0), norm_adv_by_std_in_grpo=params["advantage_scale"] == "group_std"
        )
        return estimate(function, fields, params, config=config)

    return run


def remax(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    return estimate(
        "remax_outcome", {k: v for k, v in fields.items() if k != "group"}, params,
        reward_baselines=fields["reward_greedy"],
    )  # fmt: skip


def case(name: str, params: dict[str, Any], run: Any = None, function: str = "", **more: Any) -> Case:
    run = run or (lambda fields, params: estimate(function, fields, params))
    more.setdefault("fields", ("reward", "group"))
    return Case("verl", f"adv_{name}", "advantage", Ranges(params), run, **more)


GAMMA = {"gamma": uniform(0.8, 1.0)}
PLAIN = {"advantage_scale": "none"}
RAW = {"singleton": "raw"}  # verl's value for a group of one; Lossmith's own is zero

CASES = [
    case("grpo", {"advantage": "group", "advantage_scale": "group_std", "eps": 1e-6} | RAW, grpo),
    case("dr_grpo", {"advantage": "group"} | PLAIN | RAW, grpo),
    case("rloo", {"advantage": "loo"} | PLAIN, function="rloo_vectorized_outcome"),
    case("opo", {"advantage": "opo"} | PLAIN | RAW, function="opo_outcome"),
    case("gpg", {"advantage": "gpg"} | PLAIN | RAW, function="gpg_outcome"),
    case(
        "pass_at_k", {"advantage": "pass_at_k", "advantage_scale": "group_std", "eps": 1e-6},
        with_config("grpo_passk_outcome"), singletons=False,
    ),
    case(
        "reinforce_pp_baseline", {"advantage": "group", "advantage_scale": "whiten"} | RAW,
        function="reinforce_plus_plus_baseline_outcome",
    ),
    case(
        "reinforce_pp", {"advantage": "return", "advantage_scale": "whiten"} | GAMMA,
        with_config("reinforce_plus_plus_outcome"), fields=("token_reward",),
    ),
    case(
        "gae_whiten", {"advantage": "gae", "advantage_scale": "whiten", "lam": uniform(0.5, 1.0)} | GAMMA,
        gae, fields=("token_reward", "value"),
    ),
    case(
        "remax", {"advantage": "remax"} | PLAIN, remax, fields=("token_reward", "reward_greedy"),
        data="adv_reinforce_pp",
    ),
]  # fmt: skip
