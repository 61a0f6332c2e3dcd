"""Rows of preferences as other tools write them, as rows of our own form (`preferences.py`).

| tool            | a row                                                                                           |
|-----------------|-------------------------------------------------------------------------------------------------|
| TRL             | prompt, chosen, rejected; or chosen and rejected that begin with the same messages; completion   |
|                 | and label                                                                                       |
| hh-rlhf         | chosen and rejected, turns of "\\n\\nHuman:" and "\\n\\nAssistant:", the same up to the last one   |
| LLaMA-Factory   | conversations or messages (from and value, or role and content), chosen, rejected, or label;     |
|                 | instruction, input, history, system, and chosen, rejected, or output with kto_tag                |
| ms-swift        | messages and rejected_response or rejected_messages, or label; query, response, history          |
| UltraFeedback   | instruction and completions, each with response and overall_score (1 to 10)                      |
| OpenAI          | input (its messages), preferred_output, non_preferred_output                                     |

Names decide, never a column's place. What would change the text that was judged, and has no place in our form (tools,
images, a message's tool calls), is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lossmith.errors import FeedbackError, nearest
from lossmith.prompts.content import BEGINS_CHAT, as_python_spells

__all__ = ["FIELDS", "our_rows"]

Row = Mapping[str, Any]
Message = dict[str, Any]

_OPTIONAL = ("annotator", "probability", "margin", "weight", "low", "high")
_SIDES = ("chosen", "rejected", "completion")
FIELDS = {"prompt", "ranking", "ranking_tokens", "rating", "label", *_OPTIONAL, *_SIDES}  # of a row of our own form
FIELDS |= {f"{side}_{what}" for side in _SIDES for what in ("tokens", "id")}
_RENAMED = {
    "chosen_response": "chosen", "preferred_output": "chosen", "rejected_response": "rejected",
    "rejected_messages": "rejected", "non_preferred_output": "rejected", "kto_tag": "label",
}  # fmt: skip
_CHATS = ("conversations", "messages")
_TEXTS = {"prompt", "input", *_SIDES, *_CHATS, *_RENAMED}  # what may be chat messages
_LISTS = ("ranking", "history", "completions")
_QUESTIONS = ("instruction", "question", "query")
_ANSWERS = ("output", "response")
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip
_NOT_SUPPORTED = ("tools", "images", "videos", "audios", "image", "rejected_images", "rejected_tools")
_NOT_TEXT = ("tool_calls", "function_call", "reasoning_content", "thinking", "images", "audio", "tool_call_id")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def our_rows(row: Row, where: str) -> list[dict[str, Any]]:
    """The row in our own form; several where it judges several texts apart. FeedbackError says what has no place."""
    row = _cells(row, where)
    for name in _NOT_SUPPORTED:
        if row.get(name):
            raise FeedbackError(
                f"{where}: {name} is part of what was judged, and preferences hold texts alone. Remove such rows, or "
                "the column if the texts do without it."
            )
    for theirs, ours in _RENAMED.items():
        if theirs in row and ours not in row:
            row[ours] = row.pop(theirs)
    if isinstance(row.get("completions"), list):
        return _ultrafeedback(row, where)
    renamed = _with_prompt(row, where)
    for side in _SIDES:
        if side in renamed and not isinstance(renamed[side], str):
            renamed[side] = _side(renamed[side], where, side)
    return [_with_turns(renamed, where)]


# -- cells ------------------------------------------------------------------------------------------------------------


def _cells(row: Row, where: str) -> dict[str, Any]:
    """The row without what is empty, and with the chats and tokens that a cell holds as JSON."""
    cells: dict[str, Any] = {}
    for key, value in row.items():
        optional = key.endswith(("_tokens", "_id")) or key in (*_OPTIONAL, *_CHATS, *_QUESTIONS, "history", "system")
        missing = value is None or (isinstance(value, float) and value != value)  # pandas writes a missing text as NaN
        if missing or (optional and value == ""):
            continue
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            if key.endswith("_tokens") or key in _LISTS:
                value = _json(value)
            elif key in _TEXTS:
                value = _chat(value, key, where)
        cells[key] = value
    return cells


def _json(text: str) -> Any:
    """What the text is JSON of; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _chat(text: str, key: str, where: str) -> Any:
    """The chat messages that a text is JSON of; any other text is a text."""
    parsed, like_chat = _json(text), BEGINS_CHAT.match(text)
    if parsed is text and like_chat:
        parsed = as_python_spells(text)
        if parsed is None:
            raise FeedbackError(
                f"{where}: {key} begins like chat messages, but is no JSON that can be read. Write the column as JSON "
                "(json.dumps)."
            )
    messages = parsed if isinstance(parsed, list) else [parsed]
    whole = isinstance(parsed, Mapping) and key == "input" and "messages" in parsed
    return parsed if whole or (messages and all(_is_message(m) for m in messages)) else text


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


# -- the prompt -------------------------------------------------------------------------------------------------------


def _with_prompt(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with its conversation as `prompt`, and the answer that ended it as the side that it is."""
    row = dict(row)
    if "prompt" in row:
        for name in ("input", "history"):
            if row.get(name):
                raise FeedbackError(
                    f"{where}: the row has prompt and {name}, and nothing says how they belong together. Put all that "
                    "the model was given into prompt."
                )
        prompt = row.pop("prompt")
        prompt = _messages(prompt, where, "prompt") if _is_chat(prompt) else prompt
    elif isinstance(row.get("input"), Mapping):
        prompt = _messages(row.pop("input").get("messages"), where, "input.messages")
    elif field := next((name for name in _CHATS if name in row), None):
        prompt = _messages(row.pop(field), where, field)
        if not ("chosen" in row and "rejected" in row) and "completion" not in row:
            if prompt[-1]["role"] != "assistant":
                raise FeedbackError(
                    f"{where}: the last message of {field} must be the assistant's: it is what was judged."
                )
            row["chosen" if "rejected" in row else "completion"] = [prompt.pop()]
    elif field := next((name for name in _QUESTIONS if name in row), None):
        prompt = _alpaca_prompt(row, field, where)
    else:
        return row
    system = row.pop("system", None)
    if system:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(system, str) or not isinstance(turns, list) or (turns[:1] and turns[0]["role"] == "system"):
            raise FeedbackError(f"{where}: system must be one text, and the only system message. Keep one of them.")
        prompt = [{"role": "system", "content": system}, *turns]
    return row | {"prompt": prompt}


def _alpaca_prompt(row: dict[str, Any], field: str, where: str) -> str | list[Message]:
    """Alpaca's columns as a prompt: the question, its input below it, the turns before it."""
    parts = [row.pop(field), row.pop("input", "")]
    if not all(isinstance(part, str) for part in parts):
        raise FeedbackError(f"{where}: {field} and input must hold text.")
    prompt = "\n".join(part for part in parts if part)
    before: list[Message] = []
    history = row.pop("history", None) or []
    if not isinstance(history, list):
        raise FeedbackError(f"{where}: history must be a list of [question, answer].")
    for turn in history:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise FeedbackError(f"{where}: history must be a list of [question, answer], not {str(turn)[:60]}.")
        before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    answer = next((name for name in _ANSWERS if name in row), None)
    if answer is not None and "completion" not in row and not ("chosen" in row and "rejected" in row):
        row["chosen" if "rejected" in row else "completion"] = row.pop(answer)
    return [*before, {"role": "user", "content": prompt}] if before else prompt


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(m, Mapping) and "from" in m for m in value)


# -- the sides --------------------------------------------------------------------------------------------------------


def _side(value: Any, where: str, side: str) -> list[Message]:
    messages = _messages(value if isinstance(value, list) else [value], where, side)
    last = messages[-1]
    if last["role"] != "assistant":
        raise FeedbackError(f"{where}: {side} must be the assistant's message, not the {last['role']}'s.")
    for key in _NOT_TEXT:
        if last.get(key):
            raise FeedbackError(f"{where}: the answer of {side} has {key}, and preferences hold texts alone.")
    return messages


def _messages(value: Any, where: str, field: str) -> list[Message]:
    """Chat messages, of which each has role and content, or from and value."""
    if not isinstance(value, list | tuple) or not value:
        raise FeedbackError(f"{where}: {field} must be text or a list of chat messages, not {str(value)[:60]!r}.")
    messages = []
    for m in value:
        if isinstance(m, str) and field in _SIDES and len(value) == 1:
            m = {"role": "assistant", "content": m}
        role, text = (
            (m.get("role", m.get("from")), m.get("content", m.get("value"))) if isinstance(m, Mapping) else (None, None)
        )
        if isinstance(text, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in text):
            text = "".join(part["text"] for part in text)
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
            raise FeedbackError(
                f"{where}: a message of {field} has role (or from) {', '.join(_ROLES)} and a text as content (or "
                f"value), not {str(m)[:80]}."
            )
        more = {k: v for k, v in m.items() if k not in ("from", "value") and v is not None}
        messages.append(more | {"role": _ROLES[role], "content": text})
    return messages


def _with_turns(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Transcripts of Human and Assistant as chat messages, where both sides are one and no other prompt is there."""
    sides = ("chosen", "rejected") if "chosen" in row and "rejected" in row else ("completion",)
    turns = {side: _turns(row[side]) for side in sides if isinstance(row.get(side), str)}
    if len(turns) < len(sides) or not all(turns.values()):
        return row
    prompt = row.get("prompt")
    if prompt is not None:
        prompt_turns = _turns(prompt.rstrip().removesuffix("Assistant:")) if isinstance(prompt, str) else None
        if any(prompt_turns != its[:-1] for its in turns.values()):
            return row  # an answer that is about a conversation
    return {key: value for key, value in row.items() if key != "prompt"} | turns


def _turns(transcript: str) -> list[Message]:
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ..."; none where the text is no such transcript."""
    before, *parts = _TURN.split(transcript.rstrip())
    if before.strip() or len(parts) < 2 or parts[0] != "Human":
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


# -- UltraFeedback ----------------------------------------------------------------------------------------------------


def _ultrafeedback(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Each completion with its overall score, which is from 1 to 10."""
    rows = []
    for number, one in enumerate(row["completions"], 1):
        if not isinstance(one, Mapping) or "response" not in one or one.get("overall_score") is None:
            keys = one if isinstance(one, Mapping) else {}
            raise FeedbackError(
                f"{where}: completion {number} has not response and overall_score, as UltraFeedback's have."
                f"{nearest('overall_score', keys) if keys else ''}"
            )
        base = {key: value for key, value in row.items() if key != "completions"}
        rated = {"completion": one["response"], "rating": one["overall_score"], "low": 1, "high": 10}
        rows.append(_with_prompt(base | rated, where))
    return rows
