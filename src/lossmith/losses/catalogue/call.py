"""A call as text: "grpo(beta=0.04)" -> its name and its parameters. Literals only, nothing is executed."""

from __future__ import annotations

import ast
from typing import Any

from lossmith.errors import LossError

__all__ = ["read_call"]


def read_call(text: str) -> tuple[str, dict[str, Any]]:
    """("grpo", {"beta": 0.04}); a name alone has no parameters. A path may hold brackets of its own.

    LossError: brackets that are no list of parameter=value, or a parameter that is given twice.
    """
    text = text.strip()
    if not text.endswith(")"):
        if "(" in text and ":" not in text:
            raise _unreadable(text)
        return text, {}
    for at in (i for i, c in enumerate(text) if c == "(" and i > 0):
        try:
            call = ast.parse(f"loss({text[at + 1 :]}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
                raise ValueError
            given = [(str(k.arg), ast.literal_eval(k.value)) for k in call.keywords if k.arg is not None]
            if len(given) < len(call.keywords):
                raise ValueError
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that ast says of odd text
            continue
        names = [name for name, _ in given]
        for name in names:
            if names.count(name) > 1:
                raise LossError(f"the loss {text!r} gives {name} twice.")
        return text[:at].strip(), dict(given)
    raise _unreadable(text)


def _unreadable(text: str) -> LossError:
    return LossError(f"cannot read the loss {text!r}: write it as name(parameter=value, ...), strings in quotes.")
