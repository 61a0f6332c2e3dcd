"""Annotators that are programs, recorded as what they are: any scorer, or a language model at an endpoint."""

from __future__ import annotations

from collections.abc import Callable

from lossmith.feedback.judgement import Question
from lossmith.feedback.judges.by_scorer import judge_by_scorer
from lossmith.feedback.output_set import OutputSet
from lossmith.feedback.store import Store

__all__ = ["judge"]


def judge(
    spec: str,
    sets: list[OutputSet],
    store: Store,
    *,
    question: Question,
    scale: str = "1-5",
    model: str | None = None,
    criteria: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> str:
    """Judge what this program has not judged yet; returns what was done, in words.

    spec: a scorer (see `load_scorer`), or with `model` the address of an OpenAI-compatible endpoint, up to /v1.
    """
    if model is None:
        return judge_by_scorer(spec, sets, store, question=question, scale=scale, on_progress=on_progress)
    from lossmith.feedback.judges.language_model import judge_by_model

    return judge_by_model(spec, model, sets, store, question=question, criteria=criteria, on_progress=on_progress)
