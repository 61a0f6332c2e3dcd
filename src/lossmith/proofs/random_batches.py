"""Random ragged batches that hold whatever a loss needs, and the loss evaluated on them.

Nine completions in interleaved, uneven groups (one of them alone), one completion without a token, valid tokens
anywhere in a row of eight: the shapes on which a mask, a normalizer or a group statistic goes wrong.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import ProofError
from lossmith.losses import Batch
from lossmith.losses.batch import FIELDS

__all__ = [
    "LEAVES",
    "Evaluation",
    "batch_fields",
    "evaluate",
    "make",
    "over_tokens",
    "random_fields",
    "takes_normalizer",
]

LEAVES = tuple(name for name, field in FIELDS.items() if field.gradient)
LENGTHS = (7, 1, 3, 7, 0, 4, 2, 6, 5)
GROUPS = (5, 2, 5, 9, 2, 5, 2, 9, 7)  # 9 is a pair, 7 is alone; row 4 has no token
WIDTH = 8
VOCABULARY = 4
Fields = dict[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """One random batch in the making: every field has its own stream, so that one more field changes no other."""

    seed: int
    drift: float  # spread (nats) of the old, behavior and reference log-probabilities around the policy's

    def stream(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{name} {self.seed}".encode()))

    def normal(self, name: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.stream(name), dtype=torch.float64)

    def uniform(self, name: str, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.stream(name), dtype=torch.float64)

    @property
    def n(self) -> int:
        return len(LENGTHS)

    @property
    def logp(self) -> Tensor:
        return -0.05 - 2 * self.uniform("logp", self.n, WIDTH)

    @property
    def mask(self) -> Tensor:
        order = self.uniform("mask", self.n, WIDTH).argsort(1).argsort(1)
        return order < torch.tensor(LENGTHS)[:, None]

    def distribution(self, name: str) -> Tensor:
        """Log-probabilities of the first tokens of a vocabulary: with a rest, where a loss asks for it."""
        return self.normal(name, self.n, WIDTH, VOCABULARY + 2).log_softmax(-1)[..., :VOCABULARY]

    def near(self, name: str) -> Tensor:
        return (self.logp + self.drift * self.normal(name, self.n, WIDTH)).clamp(max=-1e-3)


# How a field of a kind is drawn; those that are not like their kind.
_KINDS: dict[str, Callable[[Draw, str, tuple[int, ...]], Tensor]] = {
    "logp": lambda d, name, size: d.near(name),
    "number": lambda d, name, size: d.normal(name, *size),
    "score": lambda d, name, size: d.normal(name, *size),
    "amount": lambda d, name, size: d.normal(name, *size).abs(),
    "share": lambda d, name, size: d.uniform(name, *size),
    "flag": lambda d, name, size: torch.tensor([i % 4 == 3 for i in range(d.n)]),
    "whole": lambda d, name, size: torch.tensor([i % 3 for i in range(d.n)]),
}
_OWN: dict[str, Callable[[Draw], Tensor]] = {
    "logp": lambda d: d.logp,
    "mask": lambda d: d.mask,
    "group": lambda d: torch.tensor(GROUPS),
    "off_policy": lambda d: torch.tensor([i % 3 == 1 for i in range(d.n)]),
    "vocab_logp": lambda d: d.distribution("vocab_logp"),
    "teacher_vocab_logp": lambda d: d.distribution("teacher_vocab_logp"),
    "pair_probability": lambda d: 0.5 + 0.5 * d.uniform("pair_probability", d.n),
}
# One number of a prompt, not of a completion: the same for the whole group.
PER_PROMPT = {"reward_greedy", "reference_reward", "baseline"}


def batch_fields(loss: Any) -> frozenset[str]:
    """The fields a batch for this loss holds: what every loss reads, what this one needs, and what goes with that.

    ProofError: the loss still needs a token limit, or a field that is not known here.
    """
    needs = frozenset(loss.needs)
    parameters = needs & set(loss.to_dict() if hasattr(loss, "to_dict") else ())
    parameters -= FIELDS.keys()
    if parameters:
        names = ", ".join(sorted(parameters))
        raise ProofError(f"{loss.name} needs {names}, which has no default: build it with a value before proving it.")
    unknown = needs - FIELDS.keys()
    if unknown:
        raise ProofError(
            f"{loss.name} needs {', '.join(sorted(unknown))}, which no proof knows how to make. "
            f"Known fields: {', '.join(sorted(FIELDS))}."
        )
    beside = {"old_value"} if "value" in needs else set()
    return needs | {"logp", "mask", "old_logp", "group"} | beside


def _drawn(name: str, draw: Draw) -> Tensor:
    if name in _OWN:
        return _OWN[name](draw)
    size = {"N": draw.n, "T": WIDTH, "K": 3, "V": VOCABULARY}
    return _KINDS[FIELDS[name].kind](draw, name, tuple(size[letter] for letter in FIELDS[name].shapes[0]))


def random_fields(loss: Any, seed: int = 0, drift: float = 0.3, dtype: torch.dtype = torch.float64) -> Fields:
    """A random batch for this loss as a dict: N = 9, T = 8, valid tokens anywhere in their row."""
    draw = Draw(seed, drift)
    fields = {name: _drawn(name, draw) for name in sorted(batch_fields(loss))}
    first = torch.tensor([GROUPS.index(g) for g in GROUPS])
    for name in PER_PROMPT & fields.keys():
        fields[name] = fields[name][first]
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in fields.items()}


def over_tokens(mask: Tensor, x: Tensor) -> Tensor:
    """mask [N, T] as it selects from x: [N, T] itself, [N, T, 1] of a field with a vocabulary, [N, 1, ...] of rows."""
    if x.shape[:2] == mask.shape:
        return mask.view(*mask.shape, *[1] * (x.ndim - 2))
    return mask.any(1).view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """value: the loss, detached. gradients: of each leaf in the batch. output: what the loss returned."""

    value: Tensor
    gradients: Fields
    output: Any


def make(fields: Mapping[str, Tensor]) -> tuple[Fields, Batch]:
    """(leaves, batch): the fields that carry gradient are leaves of the graph."""
    leaves = {name: fields[name].detach().clone().requires_grad_() for name in LEAVES if name in fields}
    return leaves, Batch(**{**fields, **leaves})


def evaluate(loss: Any, fields: Mapping[str, Tensor], *more: Any) -> Evaluation:
    """The loss and its gradients; a leaf that the loss does not use has gradient 0. more: a normalizer."""
    leaves, batch = make(fields)
    output = loss(batch, *more)
    return Evaluation(output.loss.detach(), gradients(output.loss, leaves), output)


def gradients(value: Tensor, leaves: Fields) -> Fields:
    """d value / d leaf, 0 where there is none."""
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}


def takes_normalizer(loss: Any) -> bool:
    """Whether counts over all ranks can be given: `loss(batch, normalizer)`."""
    return "normalizer" in inspect.signature(type(loss).__call__).parameters
