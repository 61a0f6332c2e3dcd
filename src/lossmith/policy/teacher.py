"""A teacher: the model whose probabilities a policy is drawn to, and what it is told beside the prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossmith.errors import LossmithError, PolicyError
from lossmith.files import at_home
from lossmith.policy.folder import check_model, find_config
from lossmith.policy.load import Policy
from lossmith.prompts import Prompt
from lossmith.rollouts import Rollout

__all__ = ["Teacher", "check_teacher"]


@dataclass(frozen=True, eq=False)
class Teacher:
    """policy: the teacher's model, which may be the policy itself. column: of the prompts, what it alone is told."""

    policy: Policy
    column: str | None = None

    def sees(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The same completions behind the prompts as the teacher is given them."""
        return [dataclasses.replace(r, prompt_ids=self.encode(r.prompt)) for r in rollouts]

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of what the teacher is given. PolicyError: its template refuses it."""
        return self.policy.encode(prompt if self.column is None else told(prompt, prompt.columns[self.column]))

    def check(self, policy: Policy, whole_vocabulary: bool) -> None:
        """PolicyError: its tokens are not the policy's. whole_vocabulary: they are compared at every token."""
        if self.policy is policy:
            return
        mine, theirs = policy.tokenizer.get_vocab(), self.policy.tokenizer.get_vocab()
        if mine != theirs:
            raise PolicyError(_other_tokens(mine, theirs))
        width, theirs_width = (p.model.get_output_embeddings().weight.shape[0] for p in (policy, self.policy))
        if whole_vocabulary and theirs_width < width:
            raise PolicyError(_narrower(theirs_width, width))


def told(prompt: Prompt, text: str) -> Prompt:
    """The prompt with a text after its last user message, a blank line between."""
    if isinstance(prompt.content, str):
        return Prompt(f"{prompt.content}\n\n{text}", prompt.columns, prompt.source)
    messages = list(prompt.content)
    at = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if at is None:
        messages.append({"role": "user", "content": text})
    else:
        messages[at] = {**messages[at], "content": f"{messages[at].get('content', '')}\n\n{text}"}
    return Prompt(tuple(messages), prompt.columns, prompt.source)


def check_teacher(model: str, teacher: str, whole_vocabulary: bool, error: type[LossmithError] = PolicyError) -> None:
    """What can be known before weights are read: that the teacher is a model, and of the same tokens as the policy's.

    A hub name and the default model are looked at once they are loaded: `Teacher.check`.
    """
    check_model(teacher, error, "policy")
    mine, theirs = at_home(model, error), at_home(teacher, error)
    if not (mine / "config.json").is_file() or not (theirs / "config.json").is_file():
        return
    files = [folder / "tokenizer.json" for folder in (mine, theirs)]
    if all(file.is_file() for file in files):
        ours, others = (_tokens(file) for file in files)
        if ours != others:
            raise error(_other_tokens(ours, others))
    width, theirs_width = (_width(folder, error) for folder in (mine, theirs))
    if whole_vocabulary and width is not None and theirs_width is not None and theirs_width < width:
        raise error(_narrower(theirs_width, width))


def _tokens(file: Path) -> dict[str, int]:
    """{token: id} of a tokenizer.json; {} where it is none that can be read, which loading will say."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        known = vocabulary if isinstance(vocabulary, dict) else {str(row[0]): i for i, row in enumerate(vocabulary)}
        return known | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def _width(folder: Path, error: type[LossmithError]) -> int | None:
    config: dict[str, Any] = find_config(folder, error)
    found = config.get("text_config", config)
    width = found.get("vocab_size") if isinstance(found, dict) else None
    return width if type(width) is int else None


def _other_tokens(mine: dict[str, int], theirs: dict[str, int]) -> str:
    differ = sorted((t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)), key=lambda t: (len(t), t))
    return (
        f"the teacher has another tokenizer than the policy: {len(differ)} tokens differ (such as {differ[0]!r}, "
        f"number {mine.get(differ[0], 'none')} here and {theirs.get(differ[0], 'none')} there). Its probabilities are "
        "of other tokens, and cannot be compared. Choose a teacher of the same model family."
    )


def _narrower(theirs: int, mine: int) -> str:
    return (
        f"the teacher knows {theirs} tokens and the policy {mine}: over the whole vocabulary the rest would have no "
        "probability. Choose another teacher, or a loss that compares the sampled tokens alone (opd)."
    )
