"""A scorer as an annotator: its scores of a set's outputs, as judgements that say they are a scorer's."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import torch

from lossmith import __version__
from lossmith.errors import FeedbackError, nearest
from lossmith.feedback.convert import effective_judgements
from lossmith.feedback.judgement import SCALES, Judgement, Question
from lossmith.feedback.output_set import Output, OutputSet
from lossmith.feedback.store import Store
from lossmith.prompts import Prompt
from lossmith.rollouts import Distribution, LogProbs, Rollout
from lossmith.scorers import Scorer, close_scorer, load_scorer, score_rollouts
from lossmith.scorers.address import is_address
from lossmith.scorers.weak import doubts

__all__ = ["judge_by_scorer"]

PAIRS = 6  # of a set, at most
IN_A_ROW = 8  # sets without a score after which a scorer is taken for dead


def judge_by_scorer(
    spec: str,
    sets: list[OutputSet],
    store: Store,
    *,
    question: Question,
    scale: str = "1-5",
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> str:
    """Judge every set that this scorer has not judged yet; returns what was done, in words.

    ranking: by score, equal scores tied. pair: up to six pairs of a set. rating: the score itself, which has to lie on
    the scale. An output without a score leaves its item out, counted. FeedbackError: a score off the scale, or a scorer
    that only fails, with what was done so far, which stays in the store.
    """
    if question == "rating" and scale not in SCALES:
        raise FeedbackError(f"there is no scale {scale!r}.{nearest(scale, SCALES)}")
    scorer = load_scorer(spec, columns={name for s in sets for name in s.prompt.columns})
    # Of an address without what may be secret: a password, a query.
    name = scorer.name if is_address(spec) else str(spec)
    before = effective_judgements(store.judgements(name))
    known = {(j.set_id, frozenset(j.outputs)) for j in before if j.question == question}
    counts: Counter[str] = Counter()
    by_id = {s.id: s for s in sets}
    errors: list[str] = []
    in_a_row = 0  # sets of which nothing was scored, and something failed
    try:
        for number, output_set in enumerate(sets):
            on_progress(number, len(sets))
            if in_a_row >= IN_A_ROW:
                counts["not asked, for the scorer only fails"] += len(_items(output_set, question))
                continue
            errors_before, items = len(errors), _items(output_set, question)
            todo = [item for item in items if (output_set.id, frozenset(o.id for o in item)) not in known]
            scores = _scores(scorer, output_set, errors) if todo else {}
            judgements = [_judgement(output_set, outputs, scores, question, scale, name) for outputs in todo]
            counts["judged"] += store.add([j for j in judgements if j is not None], by_id)
            counts["left out: no score"] += sum(j is None for j in judgements)
            counts["judged before"] += len(items) - len(todo)
            if todo:
                in_a_row = in_a_row + 1 if len(errors) > errors_before and not scores else 0
    finally:
        close_scorer(scorer)
    summary = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing to judge"
    lines = [f"{name} (a scorer, recorded as one): {summary}"]
    if errors:
        lines.append(f"outputs with an error, which is not an abstention: {len(errors)}; the first: {errors[0]}")
    if in_a_row >= IN_A_ROW or (errors and not counts["judged"]):
        lines.append("What was judged is stored; the same command goes on.")
        raise FeedbackError("the scorer gives no scores. " + "\n".join(lines))
    return "\n".join([*lines, *(f"! {doubted}" for doubted in doubts(spec))])


def _items(of: OutputSet, question: Question) -> list[tuple[Output, ...]]:
    """What is asked about a set."""
    if question == "rating":
        return [(output,) for output in of.outputs]
    if len(of.outputs) < 2:
        return []
    if question == "ranking":
        return [of.outputs]
    pairs: list[tuple[Output, ...]] = list(itertools.combinations(of.outputs, 2))
    return pairs[:PAIRS]


def _scores(scorer: Scorer, of: OutputSet, errors: list[str]) -> dict[str, float]:
    """{output id: score}, of outputs that have one; what went wrong with others is added to `errors`."""
    rollouts = [_rollout(of.prompt, output, k) for k, output in enumerate(of.outputs)]
    scored = score_rollouts(scorer, rollouts, on_error="drop", timeout=None)
    errors += [r.score.error for r in scored if r.score is not None and r.score.error is not None]
    pairs = zip(of.outputs, scored, strict=True)
    return {o.id: float(r.score.value) for o, r in pairs if r.score is not None and r.score.value is not None}


def _rollout(prompt: Prompt, output: Output, k: int) -> Rollout:
    ids = output.tokens or ()
    reason = output.finish_reason if output.finish_reason in ("eos", "stop", "length") else "eos"
    logp = LogProbs(torch.full((len(ids),), torch.nan), Distribution(0))  # nobody knows them, and no scorer reads them
    return Rollout(prompt, k, (), ids, output.text, logp, reason)  # type: ignore[arg-type]


def _judgement(
    of: OutputSet, outputs: tuple[Output, ...], scores: dict[str, float], question: Question, scale: str, name: str
) -> Judgement | None:
    if any(output.id not in scores for output in outputs):
        return None
    values = [scores[output.id] for output in outputs]
    value: object = values[0]
    if question == "ranking":
        ranked = sorted(outputs, key=lambda o: -scores[o.id])
        value = [[o.id for o in tier] for _, tier in itertools.groupby(ranked, key=lambda o: scores[o.id])]
    elif question == "pair":
        value = "first" if values[0] > values[1] else "second" if values[1] > values[0] else "tie"
    elif not SCALES[scale][0] <= values[0] <= SCALES[scale][1]:
        raise FeedbackError(
            f"{name} scored {values[0]:g}, which is not on the scale {scale}. Let it rank instead: --question ranking."
        )
    return Judgement(
        of.id, question, tuple(o.id for o in outputs), value, name, question, source="scorer",
        scale=scale if question == "rating" else "", page=f"lossmith {__version__}",
    )  # fmt: skip
