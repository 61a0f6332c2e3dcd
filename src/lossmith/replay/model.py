"""The same rollouts under a model: ratios, KL, entropy, and what each loss does to its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, RunError
from lossmith.losses import Batch, Loss
from lossmith.losses.axes.kl import kl_estimate
from lossmith.policy import Policy, SamplingSettings, available_bytes, token_outputs
from lossmith.prompts import Prompt
from lossmith.replay.recorded import Recorded
from lossmith.rollouts import Distribution, LogProbs, Rollout

__all__ = ["UnderModel", "at_model", "under_model"]

ROWS = 8  # completions in a forward pass


@dataclass(frozen=True, eq=False)
class UnderModel:
    """What a model says of the recorded completions. Token means are over the N·T valid tokens."""

    kl_behavior: float | None  # k3 to the behavior policy, nats a token
    ratio: tuple[float, float, float] | None  # 5th, 50th and 95th percentile of π_model / π_behavior
    effective_sample_size: float | None
    entropy: float  # nats a token
    grad_norm: dict[str, float]  # by loss: |dL/dθ|
    cosines: Tensor  # [L, L] between the gradients dL/dθ of those losses
    refused: dict[str, str]  # by loss: why it has no gradient here


def at_model(record: Recorded, policy: Policy) -> Recorded:
    """The record with this model as its policy: `logp` [N, T] and entropies are the model's.

    RunError: the file has no token ids, or they are not this model's.
    """
    fields = dict(record.fields)
    base = fields.get("old_logp", fields.get("behavior_logp"))
    logp, entropy = _outputs(record, policy, _rollouts(record, policy))
    return replace(
        record, fields=fields | {"logp": logp, "entropy": entropy, "old_logp": logp if base is None else base}
    )


def under_model(record: Recorded, losses: Sequence[Loss], policy: Policy) -> UnderModel:
    """Ratios, KL, entropy and gradients of the losses in parameter space, at this model's weights.

    RunError: the file has no token ids, they are not this model's, or the gradients do not fit into memory.
    """
    rollouts = _rollouts(record, policy)
    settings = SamplingSettings(*record.rows[0].sampling)
    logp, entropy = _outputs(record, policy, rollouts)
    fields = dict(record.fields) | {"entropy": entropy}
    behavior = fields.get("behavior_logp")
    fields.setdefault("old_logp", behavior if behavior is not None else logp)
    norms: dict[str, float] = {}
    refused: dict[str, str] = {}
    vectors: list[Tensor] = []
    size = sum(p.numel() for p in policy.parameters()) * 4
    free = available_bytes()
    if free is not None and size * (len(losses) + 2) > free:
        raise RunError(
            f"{len(losses)} gradients of {size / 1e9:.1f} GB each do not fit into the {free / 1e9:.1f} GB that are "
            "free: name fewer losses with --loss."
        )
    for loss in losses:
        try:
            pull = _pull(loss, fields, logp)
        except LossError as error:
            refused[loss.name] = str(error)
            continue
        vectors.append(_gradient(policy, rollouts, settings, pull))
        norms[loss.name] = float(vectors[-1].norm())
    mask = fields["mask"]
    gap = None if behavior is None else (logp - behavior)[mask]
    weight = None if gap is None else gap.exp()
    return UnderModel(
        kl_behavior=None if gap is None else float(kl_estimate(gap, "k3").mean()),
        ratio=None if weight is None else _percentiles(weight),
        effective_sample_size=None if weight is None else float(weight.sum() ** 2 / (len(weight) * (weight**2).sum())),
        entropy=float(entropy[mask].mean()),
        grad_norm=norms,
        cosines=_cosines(vectors),
        refused=refused,
    )


def _outputs(record: Recorded, policy: Policy, rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
    """([N, T] log-probabilities, [N, T] entropies)."""
    settings = SamplingSettings(*record.rows[0].sampling)
    with torch.no_grad():
        parts = [_forward(policy, rollouts, rows, settings, True) for rows in _chunks(len(rollouts))]
    width = record.fields["mask"].shape[1]
    logp, entropy = (torch.cat([_wide(p[k], width) for p in parts]).double() for k in ("logp", "entropy"))
    return logp, entropy


def _percentiles(x: Tensor) -> tuple[float, float, float]:
    low, middle, high = x.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=x.dtype)).tolist()
    return low, middle, high


def _rollouts(record: Recorded, policy: Policy) -> list[Rollout]:
    """The rows as rollouts of this model. The prompt's text is its ids, so that equal prompts share their encoding."""
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    found = []
    for i, row in enumerate(record.rows):
        if row.tokens is None or row.prompt_tokens is None:
            raise RunError(f"{record.place} holds no token ids: a model cannot be asked about its completions.")
        largest = max([*row.tokens, *row.prompt_tokens])
        if largest >= vocabulary:
            raise RunError(
                f"{record.place} has the token id {largest}, and the model a vocabulary of {vocabulary}: these "
                "completions were written with another tokenizer."
            )
        prompt = Prompt(({"role": "user", "content": repr(row.prompt_tokens)},))
        logp = LogProbs(torch.zeros(row.length), Distribution(0, *row.sampling))
        found.append(Rollout(prompt, i, tuple(row.prompt_tokens), tuple(row.tokens), row.completion, logp, "eos"))
    return found


def _chunks(n: int) -> Iterator[range]:
    for start in range(0, n, ROWS):
        yield range(start, min(start + ROWS, n))


def _forward(policy: Policy, rollouts: list[Rollout], rows: range, settings: Any, entropy: bool) -> dict[str, Tensor]:
    want = frozenset({"entropy"} if entropy else ())
    out = token_outputs(policy, [rollouts[i] for i in rows], settings, want=want)
    return {"logp": out.logp, **({} if out.entropy is None else {"entropy": out.entropy})}


def _wide(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))


def _pull(loss: Loss, fields: dict[str, Tensor], logp: Tensor) -> dict[str, Tensor]:
    """dL/d(outputs) [N, T] of the loss at the model's log-probabilities."""
    leaves = {"logp": logp.clone().requires_grad_()}
    if "entropy" in loss.needs:
        leaves["entropy"] = fields["entropy"].clone().requires_grad_()
    total = loss(Batch(**(fields | leaves))).loss
    if not total.requires_grad:
        return {}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def _gradient(policy: Policy, rollouts: list[Rollout], settings: Any, pull: dict[str, Tensor]) -> Tensor:
    """dL/dθ, flat, float32 on the CPU."""
    parameters = policy.parameters()
    for p in parameters:
        p.grad = None
    for rows in _chunks(len(rollouts)):
        with torch.enable_grad():
            out = _forward(policy, rollouts, rows, settings, "entropy" in pull)
            index = torch.tensor(list(rows))
            terms = [
                (_wide(out[name], g.shape[1]) * g[index].to(out[name].dtype).to(out[name].device)).sum()
                for name, g in pull.items()
            ]
            if terms:
                torch.stack(terms).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return torch.cat([g.detach().float().flatten().cpu() for g in grads])


def _cosines(vectors: Sequence[Tensor]) -> Tensor:
    """[L, L]; the vectors are large, so each product is one pass."""
    n = len(vectors)
    norms = [max(float(v.norm()), 1e-300) for v in vectors]
    found = torch.eye(n, dtype=torch.float64)
    for i in range(n):
        for j in range(i):
            found[i, j] = found[j, i] = float(vectors[i] @ vectors[j]) / (norms[i] * norms[j])
    return found
