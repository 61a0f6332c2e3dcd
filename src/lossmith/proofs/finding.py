"""A finding: what one check says about one loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FAILED", "NOT_APPLICABLE", "PASSED", "Finding", "gap", "judged", "not_applicable", "worst"]

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"


@dataclass(frozen=True)
class Finding:
    """check: its name. number: what was measured (a relative difference unless the detail says otherwise)."""

    check: str
    status: str  # passed | failed | not applicable
    number: float | None
    detail: str


def judged(check: str, number: float, limit: float, detail: str) -> Finding:
    """Passed where number <= limit; NaN fails."""
    return Finding(check, PASSED if number <= limit else FAILED, number, detail)


def not_applicable(check: str, why: str, number: float | None = None) -> Finding:
    return Finding(check, NOT_APPLICABLE, number, why)


def gap(a: Tensor, b: Tensor, floor: float = 1e-3) -> float:
    """Largest difference over the largest number (at least `floor`); NaN where either is not finite."""
    if a.shape != b.shape:
        return math.nan
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.nan
    scale = max(float(a.abs().max()), float(b.abs().max()), floor)
    return float((a - b).abs().max()) / scale


def worst(findings: Iterable[Finding]) -> Finding:
    """One finding of several of the same check: a failure wins, then what could be judged, then the largest number."""
    rank = {FAILED: 2, PASSED: 1, NOT_APPLICABLE: 0}

    def badness(finding: Finding) -> tuple[int, float]:
        number = finding.number
        return rank[finding.status], -1.0 if number is None else math.inf if math.isnan(number) else number

    return max(findings, key=badness)
