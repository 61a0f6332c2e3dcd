"""What an explanation is made of. A number that depends on what was not recorded is None."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["Explanation", "Member", "Number", "Term", "Token"]


@dataclass(frozen=True)
class Number:
    """One number of the chain."""

    name: str
    value: float | None
    words: str = ""  # what it is: a formula, or everyday words


@dataclass(frozen=True)
class Term:
    """One term's part of a token's pull: the product of its factors; `sum` and `share` where a completion shares."""

    name: str
    pull: float | None
    factors: tuple[Number, ...]
    sum: float | None = None  # of the products over the completion's tokens
    share: float | None = None  # the part of the sum that this token gets
    shared: bool = False
    measured: bool = False  # by autograd: the loss states no formula of it


@dataclass(frozen=True)
class Token:
    """One response token. pull: -dL/dlogp, above 0 where a step down the loss makes the token more likely."""

    place: int  # in the completion, from 0
    id: int | None
    text: str
    trained: bool  # whether the mask lets the loss see it
    pull: float | None
    credit: tuple[Number, ...]  # from the score to the advantage
    policies: tuple[Number, ...]  # log-probabilities
    ratio: tuple[Number, ...]  # how far the policy moved, and the trust region
    terms: tuple[Term, ...]  # they add up to the pull
    beside: tuple[Number, ...]  # pulls that do not act through the token's log-probability
    sentence: str

    @property
    def by_name(self) -> dict[str, float | None]:
        """The numbers before the terms."""
        return {n.name: n.value for n in (*self.credit, *self.policies, *self.ratio)}


@dataclass(frozen=True)
class Member:
    """A completion of the same group."""

    sample: int
    score: float | None
    advantage: float | None  # mean over its tokens
    length: int
    pull: float | None  # of all its tokens
    this: bool
    completion: str


@dataclass(frozen=True)
class Explanation:
    """One completion of a recorded step, seen through a loss."""

    source: str  # whose file it is
    place: str
    step: int
    loss: str
    formula: str
    prompt: str
    prompt_number: int  # in the step, from 0
    prompts: int  # of the step
    sample: int
    completion: str
    group: tuple[Member, ...]
    tokens: tuple[Token, ...]
    sentence: str
    gap: float | None  # largest |the chain's sum - dL/dlogp by autograd| of the step's tokens
    notes: tuple[str, ...]
    recorded: tuple[str, ...]  # fields that the file holds
    unknown: tuple[str, ...]  # of those that matter here, what it does not

    @cached_property
    def pull(self) -> float | None:
        """Of all tokens of the completion."""
        pulls = [t.pull for t in self.tokens]
        return None if None in pulls else sum(p for p in pulls if p is not None)

    @cached_property
    def largest(self) -> float:
        """The largest |pull| of a token."""
        return max((abs(t.pull) for t in self.tokens if t.pull is not None), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """In JSON types, with every token's chain."""
        return dataclasses.asdict(self) | {"pull": self.pull}
