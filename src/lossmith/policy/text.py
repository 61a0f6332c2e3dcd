"""Tokens of a prompt, and text of tokens. Ids decide; text is a view.

What a chat template writes itself is control; the same characters in a message are text, and are encoded as text.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from lossmith.errors import PolicyError, nearest
from lossmith.policy.template import chat_template, rendered, template_values
from lossmith.prompts import Prompt

__all__ = [
    "SpecialTokens",
    "answer_text",
    "check_special_tokens",
    "encode_chat",
    "encode_text",
    "prompt_ids",
]

# Which special tokens a completion's text shows: those that are part of the answer (<think>, tool tokens), all of
# them, or none. An answer's end, padding and beginning are no part of it.
SpecialTokens = Literal["answer", "all", "none"]

_BREAK = "\U000f0003"  # a private character, put into a control token that is only text
_CONTEXT = 8  # tokens before a completion that its first one is decoded with


def check_special_tokens(value: str) -> None:
    if value not in get_args(SpecialTokens):
        raise PolicyError(f"special_tokens is {value!r}.{nearest(value, get_args(SpecialTokens))}")


# -- tokens of a prompt -----------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: Any, prompt: Prompt, ends: Iterable[int] = ()) -> list[int]:
    """Token ids of a prompt [T]: through the chat template where there is one, its columns included, or the text.

    ends: ids that end a completion, besides those that the tokenizer knows. PolicyError: the template refuses it.
    """
    if tokenizer.chat_template:
        values = template_values(tokenizer, prompt)
        try:
            return encode_chat(tokenizer, prompt.messages, values, answer_follows=True, ends=ends)
        except PolicyError as error:
            raise PolicyError(f"{prompt.source}: {error}") from None
    if not isinstance(prompt.content, str):
        raise PolicyError(f"{prompt.source}: the prompt holds chat messages, but the model has no chat template.")
    return _beginning(tokenizer, prompt.content)


def _beginning(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that goes on: with the token that begins a text, once, and without one that ends it."""
    ids = list(tokenizer(text)["input_ids"])
    probe, bare = list(tokenizer("a")["input_ids"]), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    at = next((i for i in range(len(probe)) if probe[i : i + len(bare)] == bare), 0)
    before, after = probe[:at], probe[at + len(bare) :]
    if after and ids[-len(after) :] == after:
        ids = ids[: -len(after)]
    if before and ids[: 2 * len(before)] == before * 2:  # the text has its own
        ids = ids[len(before) :]
    return ids


def encode_text(tokenizer: Any, text: str, ends: Iterable[int] = ()) -> list[int]:
    """The ids of an answer's text, in the middle of a conversation: a control token spelled out in it is text."""
    separator = _separator(tokenizer)
    if separator is None:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    template = chat_template(tokenizer) if tokenizer.chat_template else None
    tokens = _control_tokens(tokenizer, ends, template, answer=True)
    # after a token, so that a tokenizer which begins a text with a space of its own does not
    return _encode(tokenizer, _BREAK + _broken(text, _pattern(tokens)), separator)


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any] | None = None,
    *,
    answer_follows: bool,
    ends: Iterable[int] = (),
) -> list[int]:
    """The ids of messages through the chat template, which writes its own special tokens.

    values: what else the template reads. A control token that a message spells out is encoded as text. PolicyError:
    the template refuses the messages.
    """
    template = chat_template(tokenizer, bool((values or {}).get("tools")))
    pattern = _pattern(_control_tokens(tokenizer, ends, template))
    marked = [{key: item if key == "role" else _broken(item, pattern) for key, item in m.items()} for m in messages]
    marked_values = _broken(dict(values or {}), pattern)
    text = rendered(tokenizer, marked, marked_values, template=template, answer_follows=answer_follows)
    if _BREAK not in text:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    separator = _separator(tokenizer)
    if separator is None:
        raise PolicyError(
            f"the text of a message holds the control token {_control_in(text)!r}, and the tokenizer cannot encode it "
            "as text. Remove it."
        )
    return _encode(tokenizer, text, separator)


def _broken(value: Any, pattern: re.Pattern[str]) -> Any:
    """The value with a mark inside each control token in its texts."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][0] + _BREAK + match[0][1:], value.replace(_BREAK, ""))
    if isinstance(value, Mapping):
        return {key: _broken(item, pattern) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_broken(item, pattern) for item in value]
    return value


def _encode(tokenizer: Any, text: str, separator: str) -> list[int]:
    """The ids of a text that is broken at its marks: each mark is encoded as a special token, and this taken out."""
    parts = text.split(_BREAK)
    ids = list(tokenizer(separator.join(parts), add_special_tokens=False)["input_ids"])
    broken, count = set(), 0
    for part in parts[:-1]:
        count += part.count(separator)
        broken.add(count)
        count += 1
    mark = tokenizer.convert_tokens_to_ids(separator)
    places = [place for place, i in enumerate(ids) if i == mark]
    if len(places) != count + parts[-1].count(separator):
        raise PolicyError(
            f"the text of a message holds the control token {_control_in(text)!r}, and the tokenizer cannot encode it "
            "as text. Remove it."
        )
    marks = {places[k] for k in broken}
    return [i for place, i in enumerate(ids) if place not in marks]


def _control_in(text: str) -> str:
    before, _, after = text.partition(_BREAK)
    return before[-1:] + after[:20].split(">")[0] + ">" * (">" in after[:20])


def _separator(tokenizer: Any) -> str | None:
    """A special token that swallows no space beside it."""
    known = {t.content: t for t in tokenizer.added_tokens_decoder.values() if t.special}
    first = [tokenizer.eos_token, tokenizer.bos_token, *known]
    fit = (name for name in first if name in known and not (known[name].lstrip or known[name].rstrip))
    return next(fit, None)


@functools.lru_cache(maxsize=64)
def _pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    """Any of the tokens, the longest first; a token of one character cannot be broken."""
    longest_first = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


_known_control: weakref.WeakKeyDictionary[Any, dict[Any, frozenset[str]]] = weakref.WeakKeyDictionary()


def _control_tokens(tokenizer: Any, ends: Iterable[int], template: str | None, answer: bool = False) -> frozenset[str]:
    """The tokens that build a conversation: every special one but the tags of an answer (<think> and </think>), so
    that a prompt may speak of them, and whatever the template writes around plain turns.

    answer: in a policy's own words other special tokens are at home too.
    """
    known = _known_control.setdefault(tokenizer, {})
    key = (template, frozenset(ends), answer)
    if key not in known:
        added = tokenizer.get_added_vocab()
        frame = "" if template is None else _frame(tokenizer, template)
        names = {token for token, i in added.items() if (token in frame and not token.isspace()) or i in key[1]}
        marks = {getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad", "sep", "cls")}
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and not answer}
        tags = {t for t in special if t[0] + "/" + t[1:] in special or t.replace("/", "", 1) in special - {t}}
        known[key] = frozenset(names | (special - tags) | {str(mark) for mark in marks if mark in added})
    return known[key]


def _frame(tokenizer: Any, template: str) -> str:
    """What the template writes around turns of one letter."""
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    for chat in (turns, turns[1:], turns[1:2]):  # some take no system message, some but one turn
        try:
            return rendered(tokenizer, chat, template=template, answer_follows=False)
        except PolicyError:
            continue
    return ""


# -- text of tokens ---------------------------------------------------------------------------------------------------


def answer_text(tokenizer: Any, ids: Sequence[int], after: Sequence[int], hidden: frozenset[int]) -> str:
    """The text of a completion's ids, decoded after the ids of its prompt: some tokenizers drop the first space
    of whatever they decode. Hidden ids are left out."""
    shown = [i for i in ids if i not in hidden]
    context = list(after[-_CONTEXT:])
    before, whole = _decoded(tokenizer, context), _decoded(tokenizer, context + shown)
    return whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, shown)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)) if ids else ""
