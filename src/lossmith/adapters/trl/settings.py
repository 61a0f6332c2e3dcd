"""Which settings of a GRPOConfig a loss of Lossmith takes the place of, and what it asks of the others."""

from __future__ import annotations

import dataclasses
from typing import Any

from lossmith.adapters.configurations.trl import loss_of
from lossmith.adapters.hooks import HOOKS
from lossmith.errors import LossError, quiet_traps
from lossmith.losses import Loss, PolicyLoss, parse_loss
from lossmith.losses.catalogue.user import from_function
from lossmith.losses.composition.foreign import FOREIGN

__all__ = ["beta_of", "check_needs", "check_settings", "loss_for"]

# Settings that only TRL's own loss reads.
REPLACED = (
    "loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "scale_rewards",
    "multi_objective_aggregation", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos",
    "vespo_k_neg", "vespo_lambda_neg", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy",
    "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target", "off_policy_mask_threshold",
    "use_bias_correction_kl", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)  # fmt: skip


def loss_for(spec: Any, args: Any) -> Loss:
    """The loss that was asked for, with what the GRPOConfig says of lengths and of the weights of the rewards.

    spec: a Loss, a name, "name@library", "name(parameter=value)", "file.py:function", a table, or a function of the
    user's own, as `register_loss` takes it. LossError: it is none of these, or cannot be trained in TRL's GRPOTrainer.
    """
    loss = from_function(spec).build() if callable(spec) and not isinstance(spec, Loss) else parse_loss(spec)
    if "max_length" in loss.needs:
        loss = loss.replace(max_length=args.max_completion_length)
    weights = None if args.reward_weights is None else tuple(map(float, args.reward_weights))
    if weights is not None and "reward_parts" in loss.needs:
        own = tuple(loss.to_dict().get("score_weights") or ())
        if own not in ((), weights):
            raise LossError(
                f"{loss.name} has score_weights={list(own)}, and GRPOConfig has reward_weights={list(weights)}. Give "
                "the weights of the reward functions once."
            )
        loss = loss.replace(score_weights=weights)
    check_needs(loss)
    return loss


def check_needs(loss: Loss) -> None:
    """LossError: the loss needs something that TRL's GRPOTrainer does not have."""
    HOOKS["trl"].check(loss, at_once=True)  # whether it is at once follows from the settings
    if loss.kl.active and loss.kl.control == "adaptive":
        raise LossError(
            f"{loss.name} moves its coefficient between updates (kl_control='adaptive'), which it does not in TRL's "
            "GRPOTrainer: write kl_control='fixed', or use `lossmith train`."
        )


def check_settings(loss: Loss, args: Any) -> None:
    """LossError: a setting of the GRPOConfig that would not be used, or that the loss cannot be trained with."""
    default = {f.name: f.default for f in dataclasses.fields(args)}
    changed = {name: x for name in REPLACED if name in default and (x := getattr(args, name)) != default[name]}
    if changed and not _describes(args, loss):
        given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        owned = loss.to_dict().keys()
        advice = " ".join(FOREIGN[name].said(name, x, owned) for name, x in changed.items() if name in FOREIGN)
        raise LossError(
            f"GRPOConfig({given}) is of TRL's own loss, and is not used where loss={loss.name!r} takes its place: "
            f"leave it out, and say it in the loss. {advice}".rstrip()
        )
    if args.beta and args.beta != _beta(loss):
        known = "beta" in loss.to_dict()
        write = f"write loss={loss.name + f'(beta={args.beta:g})'!r}" if known else "take a loss that has one"
        raise LossError(
            f"GRPOConfig(beta={args.beta:g}) is not used: the KL term is the loss's own, and {loss.name} has "
            f"beta={_beta(loss):g}. Leave it out, or {write}."
        )
    if not loss.separable:
        _check_whole(loss, args)


def _describes(args: Any, loss: Loss) -> bool:
    """Whether TRL's own loss under these settings is this one, whatever it is called."""
    try:
        with quiet_traps():
            theirs = loss_of(args)
    except LossError:  # a setting that no loss here has
        return False
    return theirs.replace(name=loss.name).to_dict() == loss.to_dict()


def _check_whole(loss: Loss, args: Any) -> None:
    """A loss that is no sum over rows must have all rows of an update in one micro-batch, of one process."""
    # One that compares the completions of a prompt must have the whole generation batch, which TRL shuffles.
    update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = update if isinstance(loss, PolicyLoss) else args.generation_batch_size
    wanted = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": args.generation_batch_size // rows,
    }
    if args.world_size == 1 and all(getattr(args, name) == value for name, value in wanted.items()):
        return
    have = [f"{name}={getattr(args, name)}" for name, value in wanted.items() if getattr(args, name) != value]
    have += [f"{args.world_size} processes"] if args.world_size > 1 else []
    raise LossError(
        f"{loss.name} looks at all completions of an update at once, and here they come in parts ({', '.join(have)}). "
        f"Set {', '.join(f'{name}={value}' for name, value in wanted.items())}"
        + (", and train in one process." if args.world_size > 1 else ".")
    )


def _beta(loss: Loss) -> float:
    return float(loss.to_dict().get("beta") or 0.0)


def beta_of(loss: Loss) -> float:
    """What TRL's own beta must be: it has a reference exactly where that is not 0, and nothing else reads it here."""
    return (_beta(loss) or 1.0) if "ref_logp" in loss.needs else 0.0
