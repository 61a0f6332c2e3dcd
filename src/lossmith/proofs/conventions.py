"""How trainers call a loss function: which tensors under which names, and what they do with what comes back.

Signatures as of TRL 1.16, verl 0.9.1, OpenRLHF 0.11.2, SkyRL 0.4.0, prime-rl and NeMo-RL of November 2026, tinker 0.38.
slime's hook is not among them: it hands over raw logits of Megatron, split over ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import ProofError
from lossmith.losses import Normalizer, PolicyLoss

__all__ = ["CONVENTIONS", "Convention", "Given"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Given:
    """What a trainer holds of some rows when it calls the loss function."""

    loss: PolicyLoss  # the named one, for the settings that a trainer passes along
    fields: Mapping[str, Tensor]  # by field of Batch; logp carries the gradient
    weight: Tensor  # [N, T], 1/Z of each token over the whole batch
    mismatch: Tensor  # [N, T], what a trainer multiplies for the sampler's mismatch
    counts: Normalizer  # of the whole batch
    config: Any  # the trainer's configuration, where the user gave one

    def __getattr__(self, name: str) -> Tensor:
        return self.fields[name]

    def get(self, name: str) -> Tensor | None:
        return self.fields.get(name)


@dataclass(frozen=True)
class Convention:
    """One trainer's way to call a loss function.

    call: (function, given) -> the share of the loss that these rows have, a scalar
    per_completion: advantages are [N]; else [N, T]
    outside: the terms that the trainer adds by itself, so that the function has none of them
    aggregate: the aggregation, where it is the trainer's
    whole: it always hands over all rows of an update, or gives no counts of them; micro-batches are not compared
    """

    name: str
    call: Callable[[Function, Given], Any]
    per_completion: bool = False
    outside: tuple[str, ...] = ()
    aggregate: str | None = None
    whole: bool = False


# What the tensors of a batch are called in loss functions; the first word of a policy's name may be anything below.
_NAMES = {
    "logp": ("log_prob", "log_probs", "logprobs", "logps", "per_token_logps", "next_token_logprobs", "curr_logprobs"),
    "mask": ("response_mask", "completion_mask", "action_mask", "loss_mask", "token_mask"),
    "advantage": ("advantages", "adv", "advs"),
    "entropy": ("entropies", "token_entropy"),
    "group": ("groups", "index", "uid", "group_ids"),
    "reward": ("rewards",),
    "truncated": ("is_truncated", "truncations"),
}
_POLICIES = {
    "old_logp": ("old", "prev"),
    "ref_logp": ("ref", "reference"),
    "behavior_logp": ("behavior", "rollout", "sampling", "inference", "generation"),
}


def _field_of(name: str) -> str | None:
    """The field of Batch that a parameter of this name asks for."""
    if name in (*_NAMES, *_POLICIES):
        return name
    for field, words in _NAMES.items():
        if name in words:
            return field
    for field, words in _POLICIES.items():
        first, _, rest = name.partition("_")
        if first in words and (rest in _NAMES["logp"] or rest == "logp"):
            return field
    return None


def _by_name(function: Function, given: Given) -> Any:
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        field = _field_of(parameter.name)
        if field is not None and field in given.fields:
            arguments[parameter.name] = given.fields[field]
        elif parameter.name == "config" and given.config is not None:
            arguments["config"] = given.config
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            known = ", ".join(f"{field} ({words[0]}, ...)" for field, words in _NAMES.items())
            raise ProofError(
                f"parameter {parameter.name!r} of {_name(function)} is none that a batch for {given.loss.name} holds. "
                f"Known names: {known}, and those of log-probabilities after old_, ref_ or rollout_. Rename it, give "
                "it a default, or bind it: functools.partial(function, name=...)."
            )
    return _first(function(**arguments))


def _verl(function: Function, given: Given) -> Any:
    counts: dict[str, Any] = {
        "dp_size": 1,
        "batch_num_tokens": given.counts.tokens,
        "global_batch_size": given.counts.sequences,
    }
    counts["loss_scale_factor"] = getattr(given.loss.aggregate, "max_length", None)
    config = given.config or SimpleNamespace(global_batch_info={}, clip_ratio=0.2, clip_ratio_low=0.2)
    config.global_batch_info.update(counts)
    return _first(
        function(
            old_log_prob=given.old_logp,
            log_prob=given.logp,
            advantages=given.advantage,
            response_mask=given.mask.to(given.logp.dtype),
            loss_agg_mode=given.loss.aggregate.option.replace("_", "-"),
            config=config,
            rollout_is_weights=given.mismatch if given.loss.mismatch.acts else None,
        )
    )


def _openrlhf(function: Function, given: Given) -> Any:
    return _first(
        function(
            given.logp,
            given.old_logp,
            given.advantage,
            action_mask=given.mask.to(given.logp.dtype),
            rollout_log_probs=given.get("behavior_logp"),
            dp_size=1,
            batch_num_tokens=given.counts.tokens,
            global_batch_size=given.counts.sequences,
        )
    )


def _skyrl(function: Function, given: Given) -> Any:
    """Advantages come multiplied with 1/Z, and what the function gives is a sum."""
    return _first(
        function(
            given.logp,
            given.old_logp,
            given.advantage * given.weight,
            given.config,
            given.mask.to(given.logp.dtype),
            given.get("behavior_logp"),
        )
    )


def _prime_rl(function: Function, given: Given) -> Any:
    """One completion a call, a sum of its tokens; the trainer divides by the tokens of the batch. No old policy."""
    total = torch.zeros((), dtype=given.logp.dtype)
    for row in range(len(given.logp)):
        inputs = SimpleNamespace(
            trainer_logprobs=given.logp[row],
            inference_logprobs=given.old_logp[row],
            ref_logprobs=None if (ref := given.get("ref_logp")) is None else ref[row],
            advantages=given.advantage[row],
            loss_mask=given.mask[row],
            loss_weights=None,
        )
        total = total + function(inputs).loss
    return total / given.counts.tokens


def _nemo_rl(function: Function, given: Given) -> Any:
    def shifted(x: Tensor) -> Tensor:  # the prompt's last token has no log-probability of its own
        return torch.cat([torch.zeros_like(x[:, :1]), x], 1)

    mask = given.mask.to(given.logp.dtype)
    data = {
        "token_mask": shifted(mask),
        "sample_mask": (mask.sum(1) > 0).to(mask.dtype),
        "advantages": shifted(given.advantage),
        "prev_logprobs": shifted(given.old_logp),
        "generation_logprobs": shifted(given.fields.get("behavior_logp", given.old_logp)),
        "reference_policy_logprobs": shifted(given.fields.get("ref_logp", given.old_logp)),
    }
    return _first(
        function(
            next_token_logprobs=given.logp,
            data=data,
            global_valid_seqs=torch.tensor(given.counts.sequences),
            global_valid_toks=torch.tensor(given.counts.tokens),
        )
    )


def _tinker(function: Function, given: Given) -> Any:
    """Lists of one-dimensional tensors of the whole batch, without padding. `data` has what tinker's Datum holds."""
    names = {"logprobs": "old_logp", "advantages": "advantage", "ref_logprobs": "ref_logp"}
    data, logprobs = [], []
    for row, mask in enumerate(given.mask):
        inputs = {
            theirs: _Data(given.fields[ours][row][mask]) for theirs, ours in names.items() if ours in given.fields
        }
        inputs["mask"] = _Data(torch.ones(int(mask.sum()), dtype=given.logp.dtype))
        data.append(SimpleNamespace(loss_fn_inputs=inputs))
        logprobs.append(given.logp[row][mask])
    return _first(function(data, logprobs))


@dataclass(frozen=True)
class _Data:
    """tinker's TensorData, as far as a loss reads it."""

    tensor: Tensor

    def to_torch(self) -> Tensor:
        return self.tensor

    @property
    def data(self) -> list[float]:
        return self.tensor.tolist()


def _first(made: Any) -> Any:
    return made[0] if isinstance(made, (tuple, list)) and made else made


def _name(function: Function) -> str:
    return getattr(function, "__name__", type(function).__name__)


_ADDED = ("kl", "entropy", "value")

CONVENTIONS: dict[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention("tensors", _by_name, whole=True),
        Convention("trl", _by_name, per_completion=True, whole=True),
        Convention("verl", _verl, outside=_ADDED),
        Convention("openrlhf", _openrlhf, outside=_ADDED),
        Convention("skyrl", _skyrl, outside=_ADDED),
        Convention("prime_rl", _prime_rl, outside=("entropy", "value"), aggregate="token_mean"),
        Convention("nemo_rl", _nemo_rl, outside=("entropy", "value")),
        Convention("tinker", _tinker, outside=("entropy", "value"), whole=True),
    )
}
