"""What can go wrong, in one tree.

LossmithError
├── LossError      (ValueError)    a loss that does not exist, is mis-specified, or lacks a tensor it needs
├── ProofError     (RuntimeError)  a loss that fails its checks, or that no check can evaluate
├── RecipeError    (ValueError)    a run's settings
├── PromptError    (ValueError)    the input-only data set
├── PolicyError    (ValueError)    the model, its tokenizer, or how it is sampled
├── ScorerError    (RuntimeError)  a scorer that does not load, raises, hangs, or answers nonsense
├── FeedbackError  (ValueError)    output sets, judgements of them, and preferences made of those
├── AddressError   (ValueError)    an address of the explorer that means nothing
├── StageError     (RuntimeError)  a step of a project taken before the one that it needs
└── RunError       (RuntimeError)  the run folder and the machine under it
    └── FinishedError              a run that has come to its end already

Every message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "AddressError",
    "FeedbackError",
    "FinishedError",
    "LossError",
    "LossmithError",
    "PolicyError",
    "PromptError",
    "ProofError",
    "RecipeError",
    "RunError",
    "ScorerError",
    "StageError",
    "TrapWarning",
    "nearest",
    "printable",
    "quiet_traps",
]


class LossmithError(Exception):
    """Root of everything that Lossmith raises on purpose."""


class LossError(LossmithError, ValueError):
    """A loss that does not exist, is mis-specified, or lacks a tensor it needs."""


class ProofError(LossmithError, RuntimeError):
    """A loss that fails its checks, or that no check can evaluate."""


class RecipeError(LossmithError, ValueError):
    """A run's settings."""


class PromptError(LossmithError, ValueError):
    """The input-only data set."""


class PolicyError(LossmithError, ValueError):
    """The model, its tokenizer, or how it is sampled."""


class ScorerError(LossmithError, RuntimeError):
    """A scorer that does not load, raises, hangs, or answers nonsense."""


class FeedbackError(LossmithError, ValueError):
    """Output sets, judgements of them, and preferences made of those."""


class AddressError(LossmithError, ValueError):
    """An address of the explorer that means nothing."""


class StageError(LossmithError, RuntimeError):
    """A step of a project taken before the one that it needs."""


class RunError(LossmithError, RuntimeError):
    """The run folder and the machine under it."""


class FinishedError(RunError):
    """There is nothing left to resume. `summary` is what summary.json holds."""

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary


class TrapWarning(UserWarning):
    """A composition that is legal and known to mislead. Training refuses it unless told otherwise."""


@contextmanager
def quiet_traps() -> Iterator[None]:
    """Without trap warnings: a loss is only built to be looked at, or its traps were reported before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrapWarning)
        yield


def printable(text: str) -> str:
    """Text with its control characters (except line breaks and tabs) replaced: a completion is not trusted."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'grpo'?"` for a near miss, else the known names, as the tail of an error message."""
    known = sorted({str(one) for one in known})  # a table that YAML holds may have true as a key
    close = difflib.get_close_matches(str(name), known, n=2, cutoff=0.6)
    if close:
        return " Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return " Known: " + ", ".join(known) + "."
