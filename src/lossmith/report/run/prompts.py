"""What reaches whom: which fields of the prompts the chat template reads, which the scorer, and which nobody."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lossmith.policy import Policy
from lossmith.policy.template import fields_read
from lossmith.prompts import SYSTEM_COLUMNS, Prompt
from lossmith.scorers.scorer import columns_read

__all__ = ["who_reads"]


def who_reads(policy: Policy, prompts: Iterable[Prompt], scorers: Sequence[Any] | None = None) -> list[str]:
    """A line for each of: the scorer, the chat template, nobody; and of what a chat template could read but does not.

    scorers: None where nothing is scored, and columns only travel along.

    PolicyError: the chat template refuses a prompt.
    """
    prompts = list(prompts)
    names = {name for prompt in prompts for name in prompt.columns}
    read, unread = fields_read(policy.tokenizer, prompts)
    scored = set().union(*(columns_read(scorer, names) for scorer in scorers or ()))
    nobody = names - scored - read - unread.keys() - set(SYSTEM_COLUMNS)
    lines = [
        f"{what}: {', '.join(sorted(found))}"
        for what, found in (
            ("to the scorer", scored),
            ("to the chat template", read),
            ("to nobody", nobody if scorers is not None else ()),
        )
        if found
    ]
    if unread:
        said = ", ".join(f"{name} ({count} prompts)" for name, count in sorted(unread.items()))
        what = "the model's chat template does not read" if policy.tokenizer.chat_template else "no chat template reads"
        lines.append(f"! {what}: {said}")
    for scorer in scorers or ():
        how = getattr(scorer, "reading", None)
        if how is not None:
            lines.append(f"the reward model {scorer.name} reads a conversation {how}")
    return lines
