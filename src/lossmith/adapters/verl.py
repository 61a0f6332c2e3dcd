"""Lossmith's losses inside verl (0.9 or newer), through its two registries, or through `set_loss_fn`.

    VERL_USE_EXTERNAL_MODULES=lossmith.adapters.verl python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=lossmith/dppo_tv actor_rollout_ref.actor.policy_loss.loss_mode=lossmith/dppo_tv

Every name of the catalogue is registered so. A loss with parameters is named once:

        algorithm.adv_estimator=lossmith actor_rollout_ref.actor.policy_loss.loss_mode=lossmith \\
        actor_rollout_ref.actor.policy_loss._target_=lossmith.adapters.verl.PolicyLossConfig \\
        "+actor_rollout_ref.actor.policy_loss.loss='dapo(clip_high=0.3)'"

verl samples, scores, adds its own KL and entropy terms and steps. The loss takes the place of clip_ratio*, tau_*,
clip_ratio_c and norm_adv_by_std_in_grpo, and of loss_agg_mode for the policy term.

`loss_of(config)` is the loss that a configuration of verl trains with by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lossmith.adapters.configurations.verl import loss_of
from lossmith.adapters.hooks import HOOKS, Hook
from lossmith.adapters.rows import advantages, credit_of, given_loss, groups, objective, objective_half, wide
from lossmith.errors import LossError
from lossmith.losses import CATALOGUE, Batch, Loss, Normalizer
from lossmith.losses.batch import FIELDS

__all__ = ["LossFn", "adv_est", "loss_of", "policy_loss", "register", "register_loss"]

NAME = "lossmith"
_IN_CONFIG = "actor_rollout_ref.actor.policy_loss.loss"


@functools.lru_cache(maxsize=64)
def _prepared(spec: Any, length: int | None, which: str) -> tuple[Loss, Loss, Hook]:
    """(loss, its objective half, hook), checked. LossError: it does not come through."""
    loss, hook = given_loss(spec), HOOKS[which]
    if "max_length" in loss.needs and length is not None:
        loss = loss.replace(max_length=length)
    if "max_length" in loss.needs:
        raise LossError(
            f"{loss.name} divides by the longest allowed length: set actor_rollout_ref.actor.loss_scale_factor, or "
            f"write {loss.name}(max_length=...)."
        )
    hook.check(loss, at_once=True)  # whether it is at once is seen when rows come
    return loss, objective_half(hook, loss), hook


# -- the credit half: on the driver, the whole batch -----------------------------------------------------------------


def adv_est(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Any = None,
    *,
    spec: Any = None,
    which: str = "verl",
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Rewards [N, T] of the whole batch -> (advantages, returns) [N, T] each, as verl's register_adv_est asks.

    index: [N] what names the prompt of each row. spec: the loss; if not given, the configuration names it.
    which: "verl", or "verl_loss_fn", where the returns are 1/Z of each token times the number of tokens.
    LossError: no loss is named, or verl's hook does not carry it.
    """
    loss, _half, hook = _prepared(spec or _named(config), _length(config), which)
    mask, kind = response_mask.bool(), token_level_rewards.dtype
    # by token where the estimator looks at that: verl takes its KL penalty off each token's reward
    per_token = getattr(getattr(loss, "advantage", None), "per_token", False)
    reward = (token_level_rewards if per_token else token_level_rewards.sum(1)).double()
    batch = Batch(mask=mask, reward=reward, group=None if index is None else groups(index).to(mask.device))
    if hook.carries == "weights":
        advantage, weight = credit_of(loss, batch)
        return advantage.to(kind), (weight * batch.tokens).to(kind)
    made = advantages(hook, loss, batch).to(kind)
    return made, made


def _named(config: Any) -> str:
    """The loss that a configuration names: the actor's policy loss, or the algorithm beside it."""
    for at in (getattr(config, "policy_loss", None), config):
        own = None if at is None else at.get("loss")
        if own:
            return str(own)
    beside = _above(config, _IN_CONFIG)
    if beside:
        return str(beside)
    raise LossError(
        f"verl is told to use {NAME!r}, and no loss is named: +{_IN_CONFIG}=NAME (with ._target_ of policy_loss set to "
        f"lossmith.adapters.verl.PolicyLossConfig), or use the name itself, {NAME}/NAME, in both places."
    )


def _above(config: Any, key: str) -> Any:
    """A value of the whole configuration, as seen from its algorithm section; None if it is not part of one."""
    if importlib.util.find_spec("omegaconf") is None:
        return None
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError

    try:
        return OmegaConf.select(config, f"..{key}") if OmegaConf.is_config(config) else None
    except ConfigKeyError:  # nothing is above it
        return None


def _length(config: Any) -> int | None:
    """The constant length that verl's seq-mean-token-sum-norm divides by, where it is set."""
    own = None if config is None else config.get("loss_scale_factor")
    found = own or _above(config, "actor_rollout_ref.actor.loss_scale_factor")
    return int(found) if found else None


# -- the objective half: in the workers, one micro-batch of one rank ---------------------------------------------------


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    spec: Any = None,
) -> tuple[Tensor, dict[str, float]]:
    """The policy term on one micro-batch, [bs, T] each, as verl's register_policy_loss asks: (loss, metrics).

    loss_agg_mode: of verl's own terms; the loss has its own. rollout_is_weights: verl's correction, of this term too.
    LossError: the loss looks at all rows of an update, and here are some of them.
    """
    loss, half, _hook = _prepared(spec or _named(config), _length(config), "verl")
    batch = Batch(
        logp=wide(log_prob), old_logp=wide(old_log_prob), mask=response_mask.bool(), advantage=wide(advantages)
    )
    info = getattr(config, "global_batch_info", None) or {}
    found = objective(half, batch, _counts(loss, batch, info), mismatch=rollout_is_weights)
    return found.loss * info.get("dp_size", 1), _metrics(found.metrics, batch)


def _counts(loss: Loss, batch: Batch, info: Any) -> Normalizer:
    """verl's counts, over the mini-batch and all ranks; it counts rows whose tokens are all masked."""
    here = Normalizer.of(batch.valid)
    tokens = here.tokens if info.get("batch_num_tokens") is None else int(info["batch_num_tokens"])
    rows = here.sequences if info.get("global_batch_size") is None else int(info["global_batch_size"])
    if not loss.separable and (tokens != here.tokens or info.get("dp_size", 1) != 1):
        raise LossError(
            f"{loss.name} looks at all rows of an update at once, and was given {here.tokens} of its {tokens} tokens. "
            f"It needs {HOOKS['verl'].at_once}."
        )
    return Normalizer(tokens, rows, here.groups)


def _metrics(found: dict[str, float], batch: Batch) -> dict[str, float]:
    return {f"actor/{NAME}/{key}": value for key, value in found.items()}


class LossFn:
    """The whole loss, KL, entropy and correction of its own, for `set_loss_fn` of verl's actor workers.

        trainer.actor_rollout_wg.set_loss_fn(LossFn("grpo", config=actor_config))     # after trainer.init_workers()

    with algorithm.adv_estimator=lossmith_rows (or lossmith_rows/grpo). verl then adds nothing: entropy_coeff and
    kl_loss_coef have to be 0. The loss may read the reference (use_kl_loss=True computes it), the sampler's
    log-probabilities (rollout.calculate_log_probs=True), the entropy (calculate_entropy=True), rewards and prompts.

    loss: as everywhere. config: verl's actor configuration. LossError: the hook does not carry it, or verl would be
    asked for a term that nothing adds.
    """

    def __init__(self, loss: Any, config: Any = None) -> None:
        self.loss, self.half, _ = _prepared(given_loss(loss), _length(config), "verl_loss_fn")
        added = ["entropy_coeff", *(["kl_loss_coef"] if getattr(config, "use_kl_loss", False) else [])]
        for name in added:
            if getattr(config, name, 0):
                raise LossError(
                    f"actor.{name} = {getattr(config, name)} has no effect under set_loss_fn: set it to 0, and give "
                    f"{self.loss.name} the term itself ({'beta' if 'kl' in name else 'entropy_coef'}=...)."
                )

    def __call__(self, model_output: Any, data: Any, dp_group: Any = None, **_: Any) -> tuple[Tensor, dict[str, Any]]:
        """model_output, data: verl's, of one micro-batch. Returns (loss, metrics)."""
        from verl.utils import tensordict_utils
        from verl.workers.utils.padding import no_padding_2_padding

        names = {
            "old_log_probs": "old_logp", "rollout_log_probs": "behavior_logp", "ref_log_prob": "ref_logp",
            "advantages": "advantage",
        }  # fmt: skip
        wanted = ("response_mask", "returns", "token_level_rewards", "rollout_is_weights", *names)
        there = data.select(*(name for name in wanted if name in data)).to_padded_tensor()
        fields = {ours: wide(there[theirs]) for theirs, ours in names.items() if theirs in there}
        fields["logp"] = wide(no_padding_2_padding(model_output["log_probs"], data))
        if model_output.get("entropy") is not None:
            fields["entropy"] = wide(no_padding_2_padding(model_output["entropy"], data)).clamp(min=0)
        if "token_level_rewards" in there:
            fields["reward"] = wide(there["token_level_rewards"]).sum(1)
        if "uid" in data:
            fields["group"] = groups(tensordict_utils.get(data, "uid")).to(fields["logp"].device)
        info = {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
        weight, u = there.get("returns", None), there.get("rollout_is_weights", None)
        return self.on(fields, there["response_mask"].bool(), info, weight, u)

    def on(
        self, fields: dict[str, Tensor], mask: Tensor, info: dict[str, Any], weight: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of rows as tensors. weight: 1/Z times the tokens of the whole batch, as the estimator gave it."""
        read = self.half.credit_reads | self.half.objective_reads | {"logp", "advantage"}
        batch = Batch(mask=mask, **{name: x for name, x in fields.items() if name in read})
        norm = _counts(self.loss, batch, info)
        if weight is not None:
            weight = torch.where(mask, wide(weight), 0.0) / norm.tokens
        carried = None if getattr(self.loss, "counted", True) else weight
        found = objective(self.half, batch, norm, carried, u)
        return found.loss * (info.get("dp_size") or 1), _metrics(found.metrics, batch)


# -- verl's side -------------------------------------------------------------------------------------------------------


def register() -> None:
    """Put `lossmith`, `lossmith_rows` and, for every name of the catalogue, `lossmith/NAME` into verl's registries."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est, register_policy_loss

    for spec in (None, *CATALOGUE):
        end = "" if spec is None else f"/{spec}"
        for name, which in ((NAME, "verl"), (f"{NAME}_rows", "verl_loss_fn")):
            if f"{name}{end}" not in ADV_ESTIMATOR_REGISTRY:
                register_adv_est(f"{name}{end}")(functools.partial(adv_est, spec=spec, which=which))
        register_policy_loss(f"{NAME}{end}")(functools.partial(policy_loss, spec=spec))


def register_loss(name: str, loss: Any) -> None:
    """Put a loss of your own into verl's registries, as `lossmith/NAME`. LossError: its hook does not carry it."""
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    made = given_loss(loss)
    if not made.needs - FIELDS.keys():
        HOOKS["verl"].check(made, at_once=True)
    register_adv_est(f"{NAME}/{name}")(functools.partial(adv_est, spec=made))
    register_policy_loss(f"{NAME}/{name}")(functools.partial(policy_loss, spec=made))


@functools.cache
def _policy_loss_config() -> Callable[..., Any]:
    """verl's PolicyLossConfig with one field more: `loss`, what parse_loss reads."""
    from verl.workers.config.actor import PolicyLossConfig

    more = [("loss", str | None, dataclasses.field(default=None))]
    made = dataclasses.make_dataclass("PolicyLossConfig", more, bases=(PolicyLossConfig,))
    made.__module__ = __name__
    return made


def __getattr__(name: str) -> Any:
    if name == "PolicyLossConfig":
        return _policy_loss_config()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if importlib.util.find_spec("verl") is not None:
    register()
