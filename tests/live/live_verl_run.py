"""verl's way from rewards to the loss: its configuration, `apply_kl_penalty`, `compute_advantage` and `ppo_loss`."""

from __future__ import annotations

import os
import random
import warnings
from typing import Any

import torch

from live_case import value_and_gradients
from live_verl_advantages import token_rewards

ACTOR, ALGORITHM, CORRECTION = "actor_rollout_ref.actor.", "algorithm.", "algorithm.rollout_correction."
MODES = ["vanilla", "vanilla", "gspo", "sapo", "cispo", "dppo_tv", "dppo_kl", "geo_mean", "gpg", "dro", "kl_cov"]
ESTIMATORS = [
    "grpo", "grpo", "grpo_vectorized", "gae", "rloo", "rloo_vectorized", "opo", "gpg", "grpo_passk", "remax",
    "reinforce_plus_plus", "reinforce_plus_plus_baseline",
]  # fmt: skip
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def draw(rng: random.Random) -> dict[str, Any]:
    """Settings of verl that are of the loss, as somebody might choose them."""
    mode, kl = rng.choice(MODES), ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
    drawn: dict[str, Any] = {
        f"{ALGORITHM}adv_estimator": rng.choice(ESTIMATORS),
        f"{ALGORITHM}norm_adv_by_std_in_grpo": rng.choice([True, False]),
        f"{ALGORITHM}gamma": rng.choice([1.0, 0.95]),
        f"{ALGORITHM}lam": rng.choice([1.0, 0.9]),
        f"{ALGORITHM}use_kl_in_reward": rng.choice([False, False, True]),
        f"{ALGORITHM}kl_penalty": rng.choice(kl),
        f"{ALGORITHM}kl_ctrl.kl_coef": rng.choice([0.001, 0.1]),
        f"{ACTOR}policy_loss.loss_mode": mode,
        f"{ACTOR}clip_ratio": rng.choice([0.2, 0.1]),
        f"{ACTOR}clip_ratio_low": rng.choice([0.2, 0.1, 0.003, "null"]),
        f"{ACTOR}clip_ratio_high": rng.choice([0.2, 0.28, 0.004, "null"]),
        f"{ACTOR}clip_ratio_c": rng.choice([3.0, 10.0, 1.3]),
        f"{ACTOR}loss_agg_mode": rng.choice(AGGREGATIONS),
        f"{ACTOR}loss_scale_factor": 50,
        f"{ACTOR}entropy_coeff": rng.choice([0, 0, 0.01]),
        f"{ACTOR}use_kl_loss": rng.choice([False, True]),
        f"{ACTOR}kl_loss_coef": rng.choice([0.001, 0.1]),
        f"{ACTOR}kl_loss_type": rng.choice([*kl, "k1+", "k3+", "abs+", "mse+"]),
        f"{ACTOR}tau_pos": rng.choice([1.0, 1.5]),
        f"{ACTOR}tau_neg": rng.choice([1.05, 2.0]),
        f"{CORRECTION}rollout_is": rng.choice(["null", "null", "token", "sequence"]),
        f"{CORRECTION}rollout_is_threshold": rng.choice([2.0, 1.1, "0.8_1.2"]),
        f"{CORRECTION}bypass_mode": rng.choice([False, False, False, True]),
        f"{CORRECTION}loss_type": rng.choice(["ppo_clip", "reinforce"]),
    }
    always = {f"{ALGORITHM}adv_estimator", f"{ACTOR}policy_loss.loss_mode", f"{ACTOR}loss_scale_factor"}
    kept = {name: value for name, value in drawn.items() if rng.random() < 0.75 or name in always}
    more = {"dro": {f"{ACTOR}policy_loss.dro_beta": 0.1}, "kl_cov": {f"{ACTOR}policy_loss.kl_cov_ratio": 0.2}}
    return kept | more.get(mode, {})


def composed(settings: dict[str, Any]) -> Any:
    """verl's own configuration with these settings written over it."""
    import verl
    from hydra import compose, initialize_config_dir

    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    overrides = [f"++{name}={value}" for name, value in settings.items()]
    with initialize_config_dir(folder, version_base=None):
        return compose("ppo_trainer", overrides=[*overrides, f"{ACTOR}ppo_micro_batch_size_per_gpu=1"])


def run(config: Any, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Value and gradient of verl's loss on one batch, from the rewards of completions on."""
    logp = data["logp"].clone().requires_grad_()
    bypass = config.algorithm.rollout_correction.bypass_mode
    batch = _credited(config, data, bypass)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from omegaconf import open_dict
        from verl.trainer.ppo.rollout_corr_helper import apply_bypass_mode
        from verl.utils.config import omega_conf_to_dataclass
        from verl.workers.utils.losses import ppo_loss

    if bypass:
        with open_dict(config):
            policy = config.actor_rollout_ref.actor.policy_loss
            apply_bypass_mode(batch, config.algorithm.rollout_correction, policy)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    output = {"log_probs": _packed(logp, data["mask"])}
    if actor.entropy_coeff:
        output["entropy"] = _packed(data["entropy"], data["mask"])
    loss, _ = ppo_loss(actor, output, _for_loss(batch.batch, data))
    return value_and_gradients(loss, {"logp": logp})


def _credited(config: Any, data: dict[str, torch.Tensor], bypass: bool) -> Any:
    """A batch with verl's advantages and its weights for the sampler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from verl import DataProto
        from verl.trainer.ppo.core_algos import get_kl_controller
        from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
        from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

    scores = token_rewards(data | {"reward": data["parts"].sum(1)})
    tensors = {
        "response_mask": data["mask"].double(),
        "token_level_scores": scores,
        "token_level_rewards": scores.clone(),
        "old_log_probs": data["behavior_logp" if bypass else "old_logp"],
        "rollout_log_probs": data["behavior_logp"],
        "ref_log_prob": data["ref_logp"],
        "values": data["value"] * data["mask"],
    }
    if config.algorithm.adv_estimator == "remax":
        tensors["reward_baselines"] = data["greedy"]
    batch = DataProto.from_dict(tensors=tensors, non_tensors={"uid": data["group"].numpy().astype(str).astype(object)})
    algorithm = config.algorithm
    if algorithm.use_kl_in_reward:
        batch, _ = apply_kl_penalty(batch, get_kl_controller(algorithm.kl_ctrl), algorithm.kl_penalty)
    if not bypass:
        batch, _ = compute_rollout_correction_and_add_to_batch(batch, algorithm.rollout_correction)
    return compute_advantage(
        batch, adv_estimator=algorithm.adv_estimator, gamma=algorithm.gamma, lam=algorithm.lam,
        norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo, config=algorithm,
    )  # fmt: skip


def _packed(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows without padding, as verl's models give them: prompts of one token, everything one place to the left."""
    return torch.cat([torch.cat([row[keep], row.new_zeros(1)]) for row, keep in zip(x, mask, strict=True)])


def _for_loss(tensors: Any, data: dict[str, torch.Tensor]) -> Any:
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    mask, one = data["mask"].long(), torch.ones(len(data["mask"]), 1, dtype=torch.long)
    kept = ["response_mask", "old_log_probs", "advantages", "ref_log_prob", "rollout_is_weights"]
    made = {name: tensors[name] for name in kept if name in tensors.keys()}  # noqa: SIM118
    made |= {"prompts": one, "responses": torch.ones_like(mask), "attention_mask": torch.cat([one, mask], 1)}
    found = TensorDict(made, batch_size=[len(mask)])
    counts = {"batch_num_tokens": int(mask.sum()), "global_batch_size": len(mask)}
    tensordict_utils.assign_non_tensor(found, dp_size=1, **counts)
    return found
