"""The chat template: which one, what else than messages it reads, and the text that it makes.

Templates come with a model, from strangers: whatever one does wrong is reported in one sentence.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lossmith.errors import PolicyError
from lossmith.policy.template_trial import check_template
from lossmith.prompts import TEMPLATE_COLUMNS, Prompt, plain

__all__ = ["chat_template", "fields_read", "rendered", "template_values"]

_TRIED = 64  # prompts in which a field is looked for, before it is taken for one that the template does not read
_EMPTY: tuple[Any, ...] = (None, "", [], {})
# What a template may raise while it runs.
_RAISED = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


def chat_template(tokenizer: Any, tools: bool = False) -> str:
    """The one template that is used. PolicyError where the model names several, and none of them "default"."""
    known = tokenizer.chat_template
    if not isinstance(known, dict):
        return str(known)
    name = "tool_use" if tools and "tool_use" in known else "default"
    if name not in known:
        names = ", ".join(sorted(known))
        raise PolicyError(
            f"the model has several chat templates ({names}), and none of them is called default. Choose one with "
            "chat_template, or set tokenizer.chat_template to it and save the tokenizer."
        )
    return str(known[name])


def template_values(tokenizer: Any, prompt: Prompt) -> dict[str, Any]:
    """The columns of a prompt that its chat template reads by their name (tools, documents, ...), and what a
    `chat_template_kwargs` column holds."""
    columns = {name: _parsed(name, value) for name, value in prompt.columns.items()}
    options = columns.get("chat_template_kwargs")
    columns |= options if isinstance(options, dict) else {}
    filled = {name: plain(value) for name, value in columns.items() if value not in _EMPTY}
    if not filled or not tokenizer.chat_template:
        return {}
    # Names that are no column's: arguments of transformers' own, the special tokens, functions.
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
    reserved |= set(tokenizer.special_tokens_map) | {"messages", "raise_exception", "strftime_now"}
    reads = _variables(chat_template(tokenizer, "tools" in filled)) - reserved
    return {name: _without_gaps(value) for name, value in filled.items() if name in reads}


def _parsed(name: str, value: Any) -> Any:
    """Tools and the like are often stored as JSON text."""
    if name in TEMPLATE_COLUMNS and isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return plain(value) if hasattr(value, "tolist") else value


def _without_gaps(value: Any) -> Any:
    """Without the None that a table's columns put where a field is not there."""
    if isinstance(value, dict):
        return {key: _without_gaps(item) for key, item in value.items() if item is not None}
    return [_without_gaps(item) for item in value] if isinstance(value, list) else value


@functools.lru_cache(maxsize=64)
def _variables(template: str) -> frozenset[str]:
    """The names that a template expects from outside."""
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:  # {% generation %} is a tag of transformers' own
        tree = environment.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
    except TemplateError:
        return frozenset()
    return frozenset(meta.find_undeclared_variables(tree)) - environment.globals.keys()


def rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any] | None = None,
    *,
    template: str | None = None,
    answer_follows: bool,
) -> str:
    """The text that the chat template makes of messages. PolicyError: it refuses them, or fails."""
    from jinja2 import TemplateError

    template = template or chat_template(tokenizer)
    check_template(template)
    options = {"chat_template": template, "add_generation_prompt": answer_follows, "tokenize": False}
    try:
        return str(tokenizer.apply_chat_template(list(messages), **options, **(values or {})))
    except TemplateError as error:
        raise PolicyError(f"the model's chat template refuses the prompt: {error}") from None
    except _RAISED as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise PolicyError(f"the model's chat template fails on the prompt ({reason}).") from None


def fields_read(tokenizer: Any, prompts: Iterable[Prompt]) -> tuple[set[str], dict[str, int]]:
    """(columns and fields of messages that reach the policy, {those that its chat template does not read: prompts}).

    Tested by leaving a field out and comparing the text. PolicyError: the template refuses a prompt.
    """
    read: set[str] = set()
    unread: Counter[str] = Counter()
    for prompt in prompts:
        values = template_values(tokenizer, prompt)
        read |= values.keys()
        for name, value in prompt.columns.items():
            parsed = _parsed(name, value)
            if name == "chat_template_kwargs" and isinstance(parsed, Mapping):
                read.add(name)
                unread.update(f"{name}.{key}" for key in parsed if key not in values)
            elif name in TEMPLATE_COLUMNS and parsed not in _EMPTY and name not in values:
                unread[name] += 1
        fields = {key for m in prompt.messages for key in m} - {"role", "content"} - read
        for name in sorted(fields) if tokenizer.chat_template else ():
            if unread[name] < _TRIED and _matters(tokenizer, prompt, values, name):
                read.add(name)
            else:
                unread[name] += 1
    return read, {name: count for name, count in unread.items() if name not in read}


def _matters(tokenizer: Any, prompt: Prompt, values: Mapping[str, Any], name: str) -> bool:
    """Whether a prompt's text changes without a field of its messages; True also where the template refuses it."""
    template = chat_template(tokenizer, "tools" in values)
    without = [{key: item for key, item in m.items() if key != name} for m in prompt.messages]
    try:
        text = rendered(tokenizer, prompt.messages, values, template=template, answer_follows=True)
        return text != rendered(tokenizer, without, values, template=template, answer_follows=True)
    except PolicyError:
        return True
