"""The text of each token, by the tokenizer of the run's model. Ids decide; text is a view."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossmith.files import cache_folder
from lossmith.policy.embedded import NAME
from lossmith.replay.recorded import Row

__all__ = ["find_tokenizer", "token_texts"]

_CONTEXT = 8  # tokens before a token that it is decoded with: some tokenizers drop the first space of what they decode


def find_tokenizer(place: Path, model: str | None) -> Any | None:
    """That of the folder's policy/, else of the model; None where there is none. Nothing is fetched."""
    from transformers import AutoTokenizer

    folders = [place / "policy", *([cache_folder() / NAME if model == "default" else Path(model)] if model else [])]
    for folder in folders:
        if not (folder / "tokenizer_config.json").is_file():
            continue
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError):  # a damaged one: ids are shown instead
            continue
    return None


def token_texts(row: Row, tokenizer: Any | None) -> list[str]:
    """A text for each token; [id] without a tokenizer, and where bytes stand for tokens: the bytes' characters.

    A character of several tokens stands at the last of them, where it becomes readable.
    """
    if row.tokens is None:
        return _characters(row)
    if tokenizer is None:
        return [f"[{i}]" for i in row.tokens]
    texts, first = [], 0  # of the character under way
    for end in range(1, len(row.tokens) + 1):
        context = row.tokens[max(0, first - _CONTEXT) : first]
        before, whole = _decoded(tokenizer, context), _decoded(tokenizer, context + row.tokens[first:end])
        if whole.endswith("\ufffd") and end < len(row.tokens):
            texts.append("")
            continue
        texts.append(whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, row.tokens[first:end]))
        first = end
    return texts


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _characters(row: Row) -> list[str]:
    """Each character at its first byte."""
    texts = [piece for c in row.completion for piece in (c, *[""] * (len(c.encode(errors="replace")) - 1))]
    return (texts + [""] * row.length)[: row.length]
