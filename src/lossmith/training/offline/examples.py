"""Preferences as rollouts that this policy did not sample: token ids, and a score made of what was said of them.

| form     | one example                               | scores               | a pair's probability and weight        |
|----------|-------------------------------------------|----------------------|----------------------------------------|
| pairs    | the two completions                       | 1 and 0              | as given                               |
| rankings | the completions of a ranking              | 0, -1, ... by tier   | 1, and together they weigh 1           |
| ratings  | one annotator's of a prompt               | 0 to 1 on its scale  | 1, and together they weigh 1           |
| labels   | one annotator's of a prompt               | 1 and 0              | 1, and together they weigh 1           |

The tokens that a policy wrote are used where the preferences recorded them and this tokenizer reads them as the same
text; any other text is encoded as it stands, with the token that ends the assistant's turn. No template touches it,
but for white space that it puts between its last token and an answer.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch

from lossmith.errors import FeedbackError, LossmithError, PolicyError
from lossmith.feedback.output_set import Output
from lossmith.feedback.preferences import Form, Label, Pair, Preference, Ranking, Rating, form_of
from lossmith.policy import Policy
from lossmith.policy.template import rendered
from lossmith.policy.text import SpecialTokens, encode_text
from lossmith.prompts import Prompt
from lossmith.rollouts import Distribution, LogProbs, Rollout, Score

__all__ = ["JudgedRollouts", "JudgedSet", "around_answer", "judged_rollouts"]


@dataclass(frozen=True)
class JudgedRollouts:
    """Completions of one prompt that were judged together, scored. Each of their pairs has this probability, weight."""

    rollouts: tuple[Rollout, ...]
    probability: float = 1.0
    weight: float = 1.0

    @property
    def prompt(self) -> Prompt:
        return self.rollouts[0].prompt

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) rows."""
        score = [float(r.score.value) for r in self.rollouts if r.score is not None and r.score.value is not None]
        return [(i, j) for i, j in itertools.permutations(range(len(score)), 2) if score[i] > score[j]]


@dataclass(frozen=True)
class JudgedSet:
    """What a preferences file holds for a policy. `texts` and `left_out` count, by what was done and why."""

    form: Form
    examples: list[JudgedRollouts]
    texts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        return sum(len(e.pairs) for e in self.examples)

    @property
    def soft(self) -> int:
        """JudgedSet whose pairs are not certain."""
        return sum(e.probability != 1 for e in self.examples)

    @property
    def weighed(self) -> bool:
        return any(e.weight != 1 for e in self.examples)

    def report(self) -> str:
        completions = sum(len(e.rollouts) for e in self.examples)
        prompts = len({e.prompt.id for e in self.examples})
        lines = [f"{len(self.examples)} {self.form}, {completions} completions of {prompts} prompts"]
        for name, counts in (("texts", self.texts), ("left out", self.left_out)):
            if counts:
                lines.append(f"{name}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
        return "\n".join(lines)


def judged_rollouts(policy: Policy, preferences: Sequence[Preference], *, skip_bad: bool = False) -> JudgedSet:
    """Preferences in this policy's tokens.

    skip_bad: leave out, and count, what cannot be learned from, in place of a FeedbackError that names its line: a
    text that exceeds the context, two sides that are the same tokens, a text without any token.
    """
    form = form_of(preferences)
    writer = _Writer(policy)
    found: list[JudgedRollouts] = []
    left: Counter[str] = Counter()
    for group in _together(preferences):
        try:
            found.append(_example(writer, group))
        except _Unusable as error:
            if not skip_bad:
                where = group[0].prompt.source
                raise FeedbackError(
                    f"{where}: {error}. Mend or remove it, or leave out all that are like it with skip_bad."
                ) from None
            left[error.kind] += 1
    if not any(e.pairs for e in found) and form in ("pairs", "rankings"):
        raise FeedbackError(f"the {form} hold no pair of a better and a worse text: there is nothing to learn from.")
    return JudgedSet(form, found, dict(writer.count), dict(left))


class _Unusable(LossmithError):
    """`kind` is what it is counted as."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _together(preferences: Sequence[Preference]) -> Iterator[list[Preference]]:
    """Ratings and labels of one prompt by one annotator stand together; a pair or a ranking stands for itself."""
    found: dict[tuple[object, ...], list[Preference]] = {}
    for number, p in enumerate(preferences):
        alone = isinstance(p, Pair | Ranking)
        found.setdefault((number,) if alone else (p.prompt.id, p.annotator), []).append(p)
    yield from found.values()


def _example(writer: _Writer, group: list[Preference]) -> JudgedRollouts:
    first = group[0]
    if isinstance(first, Pair):
        both = writer.rollouts(first.prompt, [(first.chosen, 1.0), (first.rejected, 0.0)])
        return JudgedRollouts(both, first.probability, first.weight)
    if isinstance(first, Ranking):
        scored = [(output, -float(k)) for k, tier in enumerate(first.tiers) for output in tier]
    else:
        scored = [(p.output, _level(p)) for p in group if isinstance(p, Rating | Label)]
    example = JudgedRollouts(writer.rollouts(first.prompt, scored))
    return JudgedRollouts(example.rollouts, 1.0, 1 / max(len(example.pairs), 1))


def _level(p: Rating | Label) -> float:
    return float(p.good) if isinstance(p, Label) else (p.rating - p.low) / (p.high - p.low)


class _Writer:
    """Texts as this policy's tokens, counting how they came to be."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.lead, self.end = around_answer(policy)
        self.known = policy.model.get_input_embeddings().weight.shape[0]
        self.count: Counter[str] = Counter()

    def rollouts(self, prompt: Prompt, scored: Sequence[tuple[Output, float]]) -> tuple[Rollout, ...]:
        prompt_ids = self.policy.encode(prompt)
        made = []
        seen: dict[tuple[int, ...], float] = {}
        for k, (output, score) in enumerate(scored):
            ids = self._ids(output, prompt_ids)
            if len(prompt_ids) + len(ids) > self.policy.context_length:
                raise _Unusable(
                    "too long for the context",
                    f"prompt and text have {len(prompt_ids)} + {len(ids)} tokens, and the model's context is "
                    f"{self.policy.context_length}",
                )
            if seen.setdefault(ids, score) != score:
                raise _Unusable(
                    "the same tokens judged better and worse", "two texts that were told apart are the same tokens"
                )
            made.append(self._rollout(prompt, prompt_ids, ids, k, output.text, score))
        return tuple(made)

    def _rollout(
        self, prompt: Prompt, prompt_ids: tuple[int, ...], ids: tuple[int, ...], k: int, text: str, score: float
    ) -> Rollout:
        # NaN: nobody knows under which distribution this text was written, and no loss may take it for ours
        unknown = LogProbs(torch.full((len(ids),), torch.nan), Distribution(0))
        ended = ids[-1] in self.policy.eos_ids
        return Rollout(prompt, k, prompt_ids, ids, text, unknown, "eos" if ended else "length", Score(score))

    def _ids(self, output: Output, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        recorded = output.tokens
        if recorded:
            if all(0 <= i < self.known for i in recorded) and self._read_as(recorded, prompt_ids, output.text):
                self.count["with the tokens that were judged"] += 1
                return recorded
            self.count["whose recorded tokens are another tokenizer's, encoded anew"] += 1
        else:
            self.count["encoded from text"] += 1
        lead = "" if output.text.startswith(self.lead) else self.lead
        text = encode_text(self.policy.tokenizer, lead + output.text, self.policy.eos_ids)
        ids = (*text, *(() if self.end is None else (self.end,)))
        if not ids:
            raise _Unusable("without a token", f"the tokenizer makes no token of the text {output.text!r}")
        if max(ids) >= self.known:
            raise _Unusable("not this model's tokens", f"the tokenizer makes the id {max(ids)}, unknown to the model")
        if self.policy.decode(ids, prompt_ids) != lead + output.text:
            self.count["that the tokenizer does not give back unchanged"] += 1
        return ids

    def _read_as(self, ids: tuple[int, ...], prompt_ids: tuple[int, ...], text: str) -> bool:
        """Whether ids are this text, whichever special tokens were shown where it was written."""
        views = {self.policy.decode(ids, prompt_ids, shown) for shown in get_args(SpecialTokens)}
        return text in views | {self.policy.decode(ids)}


def around_answer(policy: Policy) -> tuple[str, int | None]:
    """(white space that the chat template puts before an answer, the token with which it ends the assistant's turn).

    ("", the end token) where there is no template.
    """
    tokenizer = policy.tokenizer
    end: int | None = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return "", end
    mark = "lossmith-mark"
    user = {"role": "user", "content": "a"}
    try:
        asked = rendered(tokenizer, [user], answer_follows=True)
        text = rendered(tokenizer, [user, {"role": "assistant", "content": mark}], answer_follows=False)
    except PolicyError:
        return "", end
    before, found, after = text.rpartition(mark)
    lead = before.removeprefix(asked) if before.startswith(asked) else ""
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return lead if lead.isspace() else "", next((int(i) for i in ids if i in policy.eos_ids), end)
