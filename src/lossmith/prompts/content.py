"""What a prompt holds: text, or chat messages with every field that a chat template may read."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from lossmith.errors import PromptError
from lossmith.prompts.json_values import plain
from lossmith.prompts.prompt import Content

__all__ = ["BEGINS_CHAT", "NOTHING", "as_python_spells", "chat_in_text", "is_blank", "read_content"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
# How tables and programs write a cell that holds nothing.
NOTHING = frozenset({"NaN", "nan", "NAN", "None", "null", "NULL", "Null", "<NA>", "NaT", "undefined"})
BEGINS_CHAT = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")


def is_blank(text: str) -> bool:
    """Whether there is nothing to see: white space, zero-width and control characters alone."""
    return not any(c.isprintable() and not c.isspace() for c in text)


def read_content(value: Any, where: str, column: str) -> Content:
    """A cell as a prompt. Text that holds chat messages as JSON, as tables keep them, is read as chat."""
    if hasattr(value, "tolist"):  # pandas gives the lists of a parquet file as arrays
        value = value.tolist()
    if isinstance(value, str):
        _encodable(value, where, column)
        if is_blank(value):
            raise PromptError(f"{where}: the column {column!r} is blank.")
        if value.strip() in NOTHING:
            raise PromptError(
                f"{where}: the column {column!r} holds {value.strip()!r}, which is how a program writes a cell with "
                "nothing in it. Remove the row."
            )
        try:
            messages = chat_in_text(value)
        except PromptError as error:
            raise PromptError(f"{where}: the column {column!r} {error}") from None
        return value if messages is None else _chat(messages, where, column)
    if not isinstance(value, (list, tuple)):
        raise PromptError(
            f"{where}: the column {column!r} holds {type(value).__name__}, but a prompt is text or a "
            "list of chat messages."
        )
    if not value:
        raise PromptError(f"{where}: the column {column!r} holds an empty list of messages.")
    return _chat(value, where, column)


def chat_in_text(text: str) -> list[Any] | None:
    """The chat messages that a text holds as JSON; None where it is a text like any other.

    PromptError, to be put after "the column ...": it is half right, and would pass for a user's words.
    """
    start = text.lstrip()
    if not start.startswith(("[", "{")):
        return None
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):
        if not BEGINS_CHAT.match(start):
            return None
        messages = as_python_spells(text)
        if messages is None:
            raise PromptError(
                "begins as chat messages do, but is not JSON that can be read. Write the messages with json.dumps."
            ) from None
    if isinstance(messages, Mapping) and _is_message(messages):
        raise PromptError("holds one chat message as JSON; write a list of messages, [...].")
    if not isinstance(messages, list) or not any(map(_is_message, messages)):
        return None
    for number, item in enumerate(messages, 1):
        if not _is_message(item):
            raise PromptError(f"holds chat messages as JSON, but the item {number} is none: {str(item)[:60]}.")
    return messages


def as_python_spells(text: str) -> Any:
    """What a text is in Python's own spelling, in which pandas writes a list into a table; None where it is nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a text
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and (
        ("from" in item and "value" in item) or ("role" in item and bool({"content", "tool_calls"} & item.keys()))
    )


def _chat(value: Any, where: str, column: str) -> tuple[Mapping[str, Any], ...]:
    messages = tuple(_message(m, number, where, column) for number, m in enumerate(value, 1))
    last = messages[-1]
    if last["role"] == "assistant":
        raise PromptError(
            f"{where}: the messages of {column!r} end with the assistant's; that is a completion, and the policy "
            "writes its own. Remove the last message."
        )
    if last["role"] == "user" and is_blank(last.get("content", "")):
        raise PromptError(f"{where}: the last message of {column!r} is blank.")
    return messages


def _message(message: Any, number: int, where: str, column: str) -> dict[str, Any]:
    """The message with all of its fields but those that hold None, which is how tables fill the gaps."""
    place = f"message {number} of {column!r}"
    if not isinstance(message, Mapping):
        raise _no_message(message, place, where)
    try:
        fields = {str(key): item for key, value in message.items() if (item := plain(value)) is not None}
    except PromptError as error:
        raise PromptError(f"{where}: {place} holds {error}.") from None
    if "role" not in fields and "from" in fields and "value" in fields:  # as ShareGPT writes them
        fields = {"role": _SHAREGPT.get(str(fields.pop("from"))), "content": fields.pop("value"), **fields}
    if isinstance(fields.get("content"), list):
        fields["content"] = _text_of_parts(fields["content"], place, where)
    has_text = isinstance(fields.get("content"), str) or ("content" not in fields and fields.keys() - {"role", "name"})
    if fields.get("role") not in ROLES or not has_text:
        raise _no_message(message, place, where)
    _encodable(fields.get("content", ""), where, column)
    _encodable(json.dumps(fields, ensure_ascii=False), where, column)
    return fields


def _no_message(message: Any, place: str, where: str) -> PromptError:
    return PromptError(
        f"{where}: {place} must be {{'role': one of {', '.join(ROLES)}, 'content': text}}, not {str(message)[:80]}."
    )


def _text_of_parts(parts: list[Any], place: str, where: str) -> str:
    """Content given in parts, [{"type": "text", "text": ...}, ...], as the one text that a language model reads."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "input_text") or not isinstance(text, str):
            raise PromptError(
                f"{where}: {place} holds a part of type {str(kind)!r}, and a policy here reads text alone. Leave out "
                "the row, or write what it shows in words."
            )
        texts.append(text)
    return "".join(texts)


def _encodable(text: str, where: str, column: str) -> None:
    """Half of a surrogate pair is refused here, because every tokenizer would fail on it later."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: the column {column!r} holds half of a surrogate pair at character {error.start + 1}, which is "
            "no text. Write the file again as UTF-8."
        ) from None
