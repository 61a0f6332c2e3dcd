"""The check `formula`: the printed text, run as a program, is the loss; its LaTeX is converted from the same text."""

from __future__ import annotations

import re
from typing import Any

import torch

from lossmith.errors import LossError
from lossmith.losses import Batch, CompletionLoss, PolicyLoss
from lossmith.losses.composition.notation import read
from lossmith.proofs.finding import FAILED, PASSED, Finding, judged
from lossmith.proofs.listing import at_the_left
from lossmith.proofs.printed.dual import slope_of, value_of
from lossmith.proofs.printed.facts import Facts
from lossmith.proofs.printed.meaning import Meaning
from lossmith.proofs.random_batches import LEAVES, Draw, Fields, evaluate, random_fields
from lossmith.proofs.slopes import DRIFTS

__all__ = ["formula"]


def formula(loss: Any, seed: int) -> Finding:
    """The text gives the loss's value and its slope; of a loss that is no composition, text and LaTeX can be read."""
    wrong = _unreadable(loss)
    if wrong or not isinstance(loss, (PolicyLoss, CompletionLoss)):
        return Finding("formula", FAILED if wrong else PASSED, float(len(wrong)), "; ".join(wrong) or "it can be read")
    try:
        gaps = [_gap(loss, random_fields(loss, seed, drift), seed) for drift in DRIFTS]
    except LossError as error:
        return Finding("formula", FAILED, None, str(error))
    return judged("formula", max(gaps), 1e-9, "the printed text, evaluated, against the loss, value and slope")


def _gap(loss: Any, fields: Fields, seed: int) -> float:
    """Relative difference of value and of slope along a random direction, tokens at the left of their rows."""
    fields = at_the_left(fields, fields["mask"], drop=False)
    found, draw = evaluate(loss, fields), Draw(seed, 0.0)
    ways = {name: draw.normal(f"way {name}", *fields[name].shape) for name in LEAVES if name in fields}
    slopes = {name: way * found.gradients[name] for name, way in ways.items()}
    printed = Meaning(read(loss.formula()), Facts(Batch(**fields), ways)).loss()
    slope = float(torch.stack([x.sum() for x in slopes.values()]).sum())
    size = max(float(torch.stack([x.abs().sum() for x in slopes.values()]).sum()), 1e-3)
    value = float(found.value)
    gaps = (abs(value_of(printed) - value) / max(abs(value), 1e-3), abs(slope_of(printed) - slope) / size)
    return float("inf") if any(x != x for x in gaps) else max(gaps)


def _unreadable(loss: Any) -> list[str]:
    try:
        text, latex = loss.formula("text"), loss.formula("latex")
    except LossError as error:
        return [str(error)]
    return [
        *(["no text"] if not text.strip() or not str(loss).strip() else []),
        *(["no LaTeX"] if not latex.strip() else []),
        *(["LaTeX braces do not balance"] if not _balanced(latex) else []),
        *([r"\left and \right do not pair"] if _count(latex, "left") != _count(latex, "right") else []),
    ]


def _count(latex: str, command: str) -> int:
    return len(re.findall(rf"\\{command}(?![A-Za-z])", latex))


def _balanced(latex: str) -> bool:
    depth = 0
    for a, b in zip(" " + latex, latex, strict=False):
        if a != "\\" and b in "{}":
            depth += 1 if b == "{" else -1
        if depth < 0:
            return False
    return depth == 0
