"""One completion of a recorded step, explained token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lossmith.errors import RunError, quiet_traps
from lossmith.explanation.numbers import Numbers, numbers_of
from lossmith.explanation.parts import Explanation, Member, Number, Term, Token
from lossmith.explanation.sentences import completion_sentence, token_sentence
from lossmith.explanation.texts import find_tokenizer, token_texts
from lossmith.files import at_home
from lossmith.losses import Loss, PolicyLoss, parse_loss
from lossmith.losses.anatomy import Link, Pull
from lossmith.losses.batch import FIELDS
from lossmith.policy import load_policy
from lossmith.replay import Recorded, read_recorded
from lossmith.replay.model import at_model
from lossmith.replay.through import Prepared, prepare
from lossmith.training.recipe import Recipe
from lossmith.training.run import read_metrics

__all__ = ["explain"]


def explain(
    path: str | Path,
    *,
    step: int | None = None,
    prompt: int | str | None = None,
    sample: int | None = None,
    loss: Loss | str | Mapping[str, Any] | None = None,
    mapping: Mapping[str, str] | None = None,
    tokenizer: Any | None = None,
    model: str | Path | None = None,
    device: str = "auto",
) -> Explanation:
    """Why the tokens of a recorded completion were pushed, in numbers that add up to -dL/dlogp, and in words.

    path: a run's folder, or rollouts of any trainer that `read_recorded` reads. step: as the file numbers it, the last
    if not given. prompt: its number in the step from 0, its id, or a part of its text. sample: which of the prompt's
    completions; the most pushed if not given. loss: the run's own if not given. tokenizer: for the tokens' texts, that
    of the run's model if not given. model: a policy to explain it at, such as the run's after the step, whose ratios
    are not 1, so that a trust region acts; the policy that the update began with if not given. RunError: there is no
    such step, prompt or sample, no loss is known, or the file has no token ids for the model.
    """
    place = at_home(path)
    record = _step(read_recorded(place, mapping), step)
    if model is not None:
        record = at_model(record, load_policy(str(model), device=device, trainable=False))
    recipe = _recipe(place)
    chosen = parse_loss(loss) if loss is not None else _own_loss(place, recipe, record)
    width = record.fields["mask"].shape[1]
    if "max_length" in chosen.needs:
        chosen = chosen.replace(max_length=recipe.get("max_tokens", width))
    ready = prepare(record, chosen)
    numbers = numbers_of(record, ready)
    row, keys = _choose(record, numbers, prompt, sample)
    tokenizer = tokenizer or find_tokenizer(place, str(recipe.get("model", "")))
    notes = [*record.notes, *ready.notes, *_cautions(recipe, loss is None, model)]
    reads = chosen.needs | ({"old_logp"} if chosen.uses_old and record.source != "Lossmith" else set())
    unknown = tuple(sorted((reads | {"reward", "group"}) & FIELDS.keys() - record.fields.keys()))
    texts = token_texts(record.rows[row], tokenizer)
    return _Completion(record, ready, numbers, row, keys).explained(texts, notes, unknown)


# -- which completion, through which loss -----------------------------------------------------------------------------


def _step(steps: Sequence[Recorded], asked: int | None) -> Recorded:
    by_number = {record.step: record for record in steps}
    if asked is None:
        return steps[-1]
    if asked not in by_number:
        raise RunError(f"there is no step {asked}: recorded are {', '.join(map(str, by_number))}.")
    return by_number[asked]


def _recipe(place: Path) -> dict[str, Any]:
    """What the run's recipe says, as it stands; {} where there is none."""
    file = place / "recipe.toml"
    return (Recipe.read(file) if file.is_file() else None) or {}


def _own_loss(place: Path, recipe: Mapping[str, Any], record: Recorded) -> Loss:
    """The run's own, with the KL coefficient that it had at this step."""
    if "loss" not in recipe:
        raise RunError(
            f"{place} has no recipe.toml that says with which loss it was trained. Name one: loss='grpo@trl', or "
            "--loss grpo@trl on the command line (`lossmith losses list` has them all)."
        )
    with quiet_traps():
        loss = parse_loss(recipe["loss"])
    metrics = place / "metrics.jsonl"
    if isinstance(loss, PolicyLoss) and loss.kl.control == "adaptive" and metrics.is_file():
        beta = {m["step"]: m.get("kl_coefficient") for m in read_metrics(metrics)}.get(record.step)
        loss = loss if beta is None else loss.replace(beta=float(beta))
    return loss


def _cautions(recipe: Mapping[str, Any], own: bool, model: str | Path | None) -> list[str]:
    if model is not None:
        return [
            f"the numbers are those at the policy {model}: of an update that it would make next on these completions"
        ]
    counts = [recipe.get("updates_per_step", 1), recipe.get("epochs", 1)]
    updates = math.prod(n for n in counts if isinstance(n, int))
    if not own or updates == 1:
        return []
    return [
        f"the run made {updates} updates of this step, each with the counts of its own "
        "completions in 1/Z; the numbers here are of one update with all of them, at the policy it began with"
    ]


def _keys(record: Recorded) -> list[Any]:
    """Of each completion, what its prompt is told apart by."""
    rows = record.rows
    return [r.group if r.group is not None else r.prompt or i for i, r in enumerate(rows)]


def _choose(record: Recorded, numbers: Numbers, prompt: int | str | None, sample: int | None) -> tuple[int, list[Any]]:
    """(row, the prompt's key of every row)."""
    keys, rows = _keys(record), list(range(len(record)))
    if prompt is not None:
        key = _key(record, keys, prompt)
        rows = [i for i in rows if keys[i] == key]
    if sample is not None:
        if prompt is None and any(key != keys[0] for key in keys):
            raise RunError(f"sample {sample} of which prompt? Name it: prompt=0, or --prompt 0 (or part of its text).")
        samples = _samples(keys, record)
        known = [samples[i] for i in rows]
        rows = [i for i in rows if samples[i] == sample]
        if not rows:
            raise RunError(f"the prompt has no sample {sample}: recorded are {', '.join(map(str, known))}.")
    total = numbers.pull.nan_to_num().abs().sum(1)
    return max(rows, key=lambda i: float(total[i])), keys


def _samples(keys: Sequence[Any], record: Recorded) -> list[int]:
    """Of each row, which of its prompt's completions it is: as recorded, else counted."""
    seen: dict[Any, int] = {}
    found = []
    for key, row in zip(keys, record.rows, strict=True):
        seen[repr(key)] = seen.get(repr(key), -1) + 1
        found.append(seen[repr(key)] if row.sample is None else row.sample)
    return found


def _key(record: Recorded, keys: Sequence[Any], asked: int | str | None) -> Any:
    distinct = list({repr(k): k for k in keys}.values())
    exact = [k for k in distinct if isinstance(k, str) and k == asked]
    if not exact and (isinstance(asked, int) or str(asked).isdecimal()):
        number = int(asked or 0)
        if not 0 <= number < len(distinct):
            raise RunError(f"there is no prompt {number}: step {record.step} has {len(distinct)}, counted from 0.")
        return distinct[number]
    text = str(asked)
    found = exact or list(
        {
            repr(k): k
            for k, row in zip(keys, record.rows, strict=True)
            if text.lower() in row.prompt.lower() or str(k).startswith(text)
        }.values()
    )
    if len(found) != 1:
        what = "no prompt" if not found else f"{len(found)} prompts"
        raise RunError(
            f"{what} of step {record.step} match {text!r}. Give more of its text, its id, or its number from 0 to "
            f"{len(distinct) - 1}."
        )
    return found[0]


# -- one completion ---------------------------------------------------------------------------------------------------


def _value(x: Tensor, row: int, token: int) -> float | None:
    value = float(x[row, token])
    return None if math.isnan(value) else value


@dataclass(frozen=True, eq=False)
class _Completion:
    """One row of a step, being explained."""

    record: Recorded
    ready: Prepared
    numbers: Numbers
    row: int
    keys: list[Any]

    def explained(self, texts: list[str], notes: list[str], unknown: tuple[str, ...]) -> Explanation:
        record, mine, loss = self.record, self.record.rows[self.row], self.ready.loss
        mask = record.fields["mask"][self.row]
        group = self._group()
        tokens = tuple(self._token(t, texts[t], bool(mask[t]), group) for t in range(mine.length))
        seen = next((t for t in tokens if t.trained), tokens[0]) if tokens else None
        sentence = "It has no token." if seen is None else completion_sentence(
            [t.pull for t in tokens if t.trained], (*seen.credit, *seen.ratio), seen.terms, group
        )  # fmt: skip
        distinct = list(dict.fromkeys(map(repr, self.keys)))
        return Explanation(
            record.source, record.place, record.step, loss.name, loss.formula(), mine.prompt,
            distinct.index(repr(self.keys[self.row])), len(distinct), _samples(self.keys, record)[self.row],
            mine.completion, group, tokens, sentence, self.numbers.gap, tuple(dict.fromkeys(notes)),
            tuple(n for n in record.fields if n != "mask"), unknown,
        )  # fmt: skip

    def _group(self) -> tuple[Member, ...]:
        fields, samples = self.record.fields, _samples(self.keys, self.record)
        reward = fields.get("reward")
        advantage = next((link.value for link in self.numbers.credit if link.name == "advantage"), None)
        members = []
        for i, key in enumerate(self.keys):
            if key != self.keys[self.row]:
                continue
            live = fields["mask"][i]
            score = None if reward is None else float(reward[i] if reward.ndim == 1 else reward[i].sum())
            mean = None if advantage is None else float(advantage[i][live].mean())
            pull = float(self.numbers.pull[i][live].sum())
            row = self.record.rows[i]
            known = [None if x is None or math.isnan(x) else x for x in (score, mean, pull)]
            members.append(Member(samples[i], known[0], known[1], row.length, known[2], i == self.row, row.completion))
        return tuple(members)

    def _token(self, t: int, text: str, trained: bool, group: Sequence[Member]) -> Token:
        numbers = self.numbers
        credit, policies, ratio = (self._all(x, t) for x in (numbers.credit, numbers.policies, numbers.ratio))
        terms = tuple(self._term(p, t) for p in numbers.pulls)
        pull = _value(numbers.pull, self.row, t)
        tokens = self.record.rows[self.row].tokens
        sentence = token_sentence(pull, trained, (*credit, *policies, *ratio), terms, group)
        return Token(
            t, None if tokens is None else tokens[t], text, trained, pull, credit, policies, ratio, terms,
            self._all(numbers.beside, t), sentence,
        )  # fmt: skip

    def _all(self, links: Sequence[Link], t: int) -> tuple[Number, ...]:
        return tuple(Number(link.name, _value(link.value, self.row, t), link.words) for link in links)

    def _term(self, pull: Pull, t: int) -> Term:
        factors, shared = self._all(pull.factors, t), pull.share is not None
        total = float(pull.own[self.row][pull.mask[self.row]].sum()) if shared else math.nan
        return Term(
            pull.name, _value(pull.value, self.row, t), factors, None if math.isnan(total) else total,
            _value(pull.share, self.row, t) if pull.share is not None else None, shared, pull.measured,
        )  # fmt: skip
