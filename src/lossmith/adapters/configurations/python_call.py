"""The keyword arguments of the `GRPOConfig(...)` call in a Python script, which is read and never run."""

from __future__ import annotations

import ast
import warnings
from typing import Any

from lossmith.adapters.configurations.computed import Computed
from lossmith.errors import LossError

__all__ = ["settings"]

NAME = "GRPOConfig"


def settings(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """({keyword: value}, {keyword: line}). A literal, or a name that the script sets once to one, is a value.

    LossError: not Python, no such call or several, positional arguments.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a script that is not ours
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise LossError(f"{where}{line} is not Python: {getattr(error, 'msg', error)}.") from None
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _called(n.func) == NAME]
    if not calls:
        raise LossError(f"{where}: there is no {NAME}(...) call in this script, and no other call is read.")
    if len(calls) > 1:
        lines = " and ".join(str(call.lineno) for call in calls)
        raise LossError(f"{where}: {NAME}(...) is called in lines {lines}: which of them trains is not known.")
    call, constants = calls[0], _constants(tree)
    if call.args:
        raise LossError(f"{where}:{call.lineno}: {NAME} takes its settings by name, and one of them has none.")
    found = {k.arg or f"**{ast.unparse(k.value)}": _value(k.value, constants) for k in call.keywords}
    return found, {k.arg or f"**{ast.unparse(k.value)}": k.value.lineno for k in call.keywords}


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Names of the module that are set there once, and nowhere else in the file."""
    stored = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if isinstance(node, ast.Assign) and isinstance(target, ast.Name) and stored.count(target.id) == 1:
            found[target.id] = node.value
    return found


def _value(node: ast.expr, constants: dict[str, ast.expr]) -> Any:
    node = constants.get(node.id, node) if isinstance(node, ast.Name) else node
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Computed(ast.unparse(node))
