"""Preferences as a reward model reads them: token ids of whole conversations, and what was said of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lossmith.errors import FeedbackError
from lossmith.feedback.output_set import Output
from lossmith.feedback.preferences import Label, Pair, Preference, Ranking, Rating
from lossmith.scorers.reward_model import encode_conversation

__all__ = ["ScoredTexts", "make_scored_texts", "said_nothing"]


@dataclass(frozen=True)
class ScoredTexts:
    """One preference. `rows` are the conversations' token ids, best first where they are compared.

    tiers: the rank of each row. target: of a single row, its rating in [0, 1], or 1 and 0 for good and bad.
    """

    prompt_id: str
    rows: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]  # of the outputs alone, in words: what a length bias would be a bias for
    tiers: tuple[int, ...] = ()
    target: float | None = None
    probability: float = 1.0
    margin: float = 0.0
    weight: float = 1.0
    annotator: str = ""


def make_scored_texts(
    preferences: Sequence[Preference], tokenizer: Any, max_length: int, *, skip_bad: bool = False
) -> tuple[list[ScoredTexts], Counter[str]]:
    """(examples, how many were left out and why).

    FeedbackError names the line of a text too long for the model, or of two that are the same to it.
    """
    made: list[ScoredTexts] = []
    left: Counter[str] = Counter()
    for preference in preferences:
        outputs, said = _said(preference)
        rows = tuple(encode_conversation(tokenizer, preference.prompt, o.text) for o in outputs)
        kind, wrong = _wrong(rows, said.get("tiers", (0,)), max_length)
        if wrong:
            if not skip_bad:
                raise FeedbackError(
                    f"{preference.prompt.source}: {wrong}: mend it, or leave such lines out with --skip-bad."
                )
            left[kind] += 1
            continue
        lengths = tuple(len(o.text.split()) for o in outputs)
        made.append(
            ScoredTexts(
                preference.prompt.content_id, tuple(map(tuple, rows)), lengths, **said, annotator=preference.annotator
            )
        )
    if not made:
        raise FeedbackError("no preference is left to train on.")
    return made, left


def _wrong(rows: Sequence[Sequence[int]], tiers: Sequence[int], max_length: int) -> tuple[str, str]:
    """(what it is counted as, what to say) of texts that no reward model could be taught from; else ("", "")."""
    longest = max(map(len, rows))
    if longest > max_length:
        return (
            f"longer than {max_length} tokens",
            f"a text of {longest} tokens, and the reward model reads {max_length}. Cutting it would judge another text",
        )
    texts = [tuple(row) for row in rows]
    if len(set(zip(texts, tiers, strict=True))) > len(set(texts)):
        return "the same tokens judged better and worse", "two texts that were told apart are the same tokens"
    return "", ""


def _said(preference: Preference) -> tuple[list[Output], dict[str, Any]]:
    match preference:
        case Pair():
            said = {"tiers": (0, 1), "probability": preference.probability, "margin": preference.margin}
            return [preference.chosen, preference.rejected], said | {"weight": preference.weight}
        case Ranking():
            tiers = tuple(k for k, tier in enumerate(preference.tiers) for _ in tier)
            return [o for tier in preference.tiers for o in tier], {"tiers": tiers}
        case Rating():
            share = (preference.rating - preference.low) / (preference.high - preference.low)
            return [preference.output], {"target": share}
        case Label():
            return [preference.output], {"target": float(preference.good)}


def said_nothing(preferences: Sequence[Preference]) -> str:
    """Why these preferences hold no signal, or ""."""
    if all(isinstance(p, Pair) and p.probability == 0.5 for p in preferences):
        return "every pair is a tie"
    if all(isinstance(p, Ranking) and len(p.tiers) == 1 for p in preferences):
        return "in every ranking all outputs are as good as each other"
    if all(isinstance(p, Rating | Label) for p in preferences):
        values = {p.rating if isinstance(p, Rating) else p.good for p in preferences if isinstance(p, Rating | Label)}
        if len(values) == 1:
            return f"all {len(preferences)} judgements are the same: {values.pop()}"
    return ""
