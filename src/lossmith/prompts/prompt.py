"""A prompt, and a set of them: identity, the split, and the batches of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lossmith.errors import PromptError
from lossmith.prompts.json_values import plain

__all__ = ["SYSTEM_COLUMNS", "TEMPLATE_COLUMNS", "Content", "Prompt", "PromptSet", "message_text", "prompt_content"]

# Columns that chat templates read beside the messages, under names that everybody uses.
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
SYSTEM_COLUMNS = ("system", "system_prompt")  # what some keep of the prompt in a column of its own

Content = str | tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Prompt:
    """One input. `content` is text or chat messages; `columns` travel to the scorer; `source` says where it was read.

    Two prompts are the same where content and columns are. Those of one `content_id` are one text for the policy, and
    stay on one side of a split.
    """

    content: Content = field(compare=False)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    source: str = field(default="memory", compare=False)
    # What its random numbers are keyed by: the id, or the content's alone in a set that has this content only once,
    # so that a column added to a file, or changed in it, changes nothing that is sampled.
    key: str = field(default="", compare=False)
    id: str = field(init=False)  # 16 hex digits of the sha256 of content and columns, whatever the file and its order
    content_id: str = field(init=False, compare=False)  # of the content alone

    def __post_init__(self) -> None:
        content = prompt_content(self)
        columns = {name: value for name in self.columns if (value := self._plain(name)) is not None}
        object.__setattr__(self, "content_id", _digest(content))
        object.__setattr__(self, "id", _digest([content, columns]) if columns else self.content_id)
        if not self.key:
            object.__setattr__(self, "key", self.id)

    def _plain(self, name: str) -> Any:
        try:
            return plain(self.columns[name])
        except PromptError as error:
            raise PromptError(f"{self.source}: the column {name!r} holds {error}.") from None
        except RecursionError:
            raise PromptError(f"{self.source}: the column {name!r} holds itself, and cannot be written down.") from None

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """Chat messages: the content, or the text as one user message."""
        return ({"role": "user", "content": self.content},) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """What a person reads: the text, or the last user message."""
        users = [m for m in self.messages if m["role"] == "user"]
        return message_text((users or self.messages)[-1])


def message_text(message: Mapping[str, Any]) -> str:
    """What a person reads of a message: its text, and the calls of tools as JSON."""
    calls = message.get("tool_calls")
    parts = [str(message.get("content") or ""), json.dumps(plain(calls), ensure_ascii=False) if calls else ""]
    return "\n".join(text for text in parts if text)


def prompt_content(prompt: Prompt) -> str | list[dict[str, Any]]:
    """A prompt as JSON holds it: text or chat messages."""
    content: str | list[dict[str, Any]] = plain(prompt.content)
    return content


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts, in the order of their file."""

    prompts: tuple[Prompt, ...]
    name: str
    duplicates: tuple[str, ...] = ()  # where the exact repetitions were that were left out
    notes: tuple[str, ...] = ()  # what was made of the rows: columns that were joined to the prompt

    @classmethod
    def of(cls, prompts: Sequence[Prompt], name: str, duplicates: Sequence[str], notes: Sequence[str]) -> PromptSet:
        """A set whose prompts have their keys."""
        times = Counter(prompt.content_id for prompt in prompts)
        keyed = (dataclasses.replace(p, key=p.content_id) if times[p.content_id] == 1 else p for p in prompts)
        return cls(tuple(keyed), name, tuple(duplicates), tuple(notes))

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    @property
    def columns(self) -> set[str]:
        """The names of all columns beside the prompt."""
        return {name for prompt in self.prompts for name in prompt.columns}

    def split(self, held_out: int | float, seed: int) -> tuple[PromptSet, PromptSet]:
        """(train, held out). held_out: a number of prompts, or a share below 1. Depends on seed and content alone.

        Prompts of one content stay together, so that no held-out text was trained on; where that does not come out
        even, fewer are held out (but one content at least).
        """
        share = 0 < held_out < 1
        count = round(held_out * len(self)) if share else held_out
        contents: dict[str, list[Prompt]] = {}
        for prompt in sorted(self.prompts, key=lambda p: _keyed("split", seed, p.content_id)):
            contents.setdefault(prompt.content_id, []).append(prompt)
        # the first two also refuse NaN
        if not 0 < count < len(self) or count != int(count) or len(contents) < 2:
            raise PromptError(
                f"{self.name}: cannot hold out {held_out} of {self._count(contents)} and train on the rest. "
                "Give more prompts, or change held_out."
            )
        chosen: list[Prompt] = []
        for group in contents.values():
            if len(chosen) + len(group) <= count:
                chosen += group
        chosen = chosen or min(contents.values(), key=len)
        away = {p.content_id for p in chosen}
        train = tuple(p for p in self.prompts if p.content_id not in away)
        return PromptSet(train, self.name), PromptSet(tuple(chosen), self.name)

    def _count(self, contents: Mapping[str, Any]) -> str:
        text = f"{len(self)} prompt{'s' * (len(self) != 1)}"
        if len(contents) < len(self):
            text += f" of {len(contents)} text{'s' * (len(contents) != 1)}, those of one text staying together,"
        if self.duplicates:
            text += f" ({len(self) + len(self.duplicates)} rows, {len(self.duplicates)} of them exact duplicates)"
        return text

    def batch(self, step: int, size: int, seed: int) -> tuple[Prompt, ...]:
        """The prompts of a step: shuffled epochs without repetition, a function of (step, size, seed) alone.

        A remainder of an epoch that fills no batch is left for the next epoch's shuffle.
        """
        if size < 1 or step < 0:
            raise PromptError(
                f"{self.name}: a batch of {size} prompts at step {step}; size is 1 or more, step 0 or more."
            )
        if size > len(self):
            raise PromptError(f"{self.name}: a step asks for {size} prompts, but only {len(self)} are there.")
        per_epoch = len(self) // size
        epoch, place = divmod(step, per_epoch)
        order = sorted(self.prompts, key=lambda p: _keyed("epoch", seed, epoch, p.key))
        return tuple(order[place * size : (place + 1) * size])

    def summary(self) -> str:
        """How many there are, what was made of their rows, and what was left out."""
        lines = [f"{len(self)} prompt{'s' * (len(self) != 1)} from {self.name}", *self.notes]
        if self.duplicates:
            count = len(self.duplicates)
            shown = ", ".join(self.duplicates[:3]) + (", ..." if count > 3 else "")
            lines.append(
                f"{len(self) + count} rows are {len(self)} prompts: {count} exact duplicate{'s' * (count > 1)} left "
                f"out ({shown})"
            )
        return "\n".join(lines)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _keyed(*key: Any) -> bytes:
    return hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
