"""Reward models that are not known to be better than a coin: what their manifest says of held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lossmith.errors import ScorerError
from lossmith.files import at_home
from lossmith.intervals import doubt
from lossmith.scorers.seal import MANIFEST

__all__ = ["doubts", "refuse_weak"]


def doubts(spec: Any) -> list[str]:
    """Of each trained reward model that a scorer asks, why it is not known to be better than chance.

    spec: as `load_scorer` reads it. A model without a manifest was not trained here, and is its owner's to judge; of
    an ensemble that was trained together, the ensemble's own figures count.
    """
    if isinstance(spec, Mapping):
        return doubts([spec[key] for key in ("steps", "ensemble", "scorers") if key in spec])
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return [doubt_text for member in spec for doubt_text in doubts(member)]
    if not isinstance(spec, str | Path) or "://" in str(spec):
        return []
    try:
        manifest = json.loads((at_home(spec) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    held_out = manifest.get("held_out") if isinstance(manifest, dict) else None
    doubt_text = doubt(held_out.get("accuracy") if isinstance(held_out, dict) else None)
    return [f"reward model {str(spec)!r}: {doubt_text}"] if doubt_text else []


def refuse_weak(spec: Any) -> None:
    """ScorerError where a policy would learn from a reward model that may be no better than a coin."""
    reasons = doubts(spec)
    if reasons:
        raise ScorerError(
            f"{'; '.join(reasons)}. A policy that learns from it may learn noise. Judge more outputs and train it "
            "again, or use it all the same with accept_weak_scorer = true."
        )
