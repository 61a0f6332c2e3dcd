"""Whose code will run, and who is asked: said before it happens, for a recipe may come from a stranger."""

from __future__ import annotations

import importlib.machinery
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lossmith.errors import LossmithError, printable, quiet_traps
from lossmith.losses import Loss, parse_loss
from lossmith.scorers import BUILTINS
from lossmith.scorers.address import KEY, Address, is_address, redacted

__all__ = ["code_that_runs", "loss_without_code", "show_code"]

# "path/file.py:name" or "package.module:name", alone or inside of a loss's parameters
_PLACE = re.compile(r"""([^\s'"(),=]+\.py|[A-Za-z_][\w.]*):([A-Za-z_][\w.]*)""")


def code_that_runs(**specs: Any) -> str:
    """Lines for the files whose code the given specs run, and the servers they ask; "" where there are none.

    specs: scorers and losses as a recipe has them, by what they are for.
    """
    code: list[str] = []
    asked: list[str] = []
    secrets: list[str] = []
    for purpose, spec in specs.items():
        for text in _texts(spec):
            if is_address(text):
                asked.append(_asked(text, purpose, secrets))
            elif text not in BUILTINS and not os.path.isdir(text):
                code += [f"{_place(*found)} ({purpose}), with what it imports" for found in _PLACE.findall(text)]
    blocks = (("code", "will run: ", code), ("server", "will be asked: ", asked))
    return "\n".join(
        f"{name if k == 0 else '':<10}{verb}{line}"
        for name, verb, lines in blocks
        for k, line in enumerate(dict.fromkeys(lines))
    )


def show_code(console: Console, **specs: Any) -> None:
    """Print `code_that_runs`, if there is any."""
    lines = code_that_runs(**specs)
    if lines:
        console.print(printable(lines), highlight=False, soft_wrap=True, markup=False)


def loss_without_code(spec: Any) -> Loss | None:
    """The loss of a recipe that is only looked at; None where it is none, or reading it would run somebody's code."""
    names = [spec.get("name"), spec.get("function")] if isinstance(spec, Mapping) else [spec]
    if not spec or any(":" in str(name).partition("(")[0] for name in names):
        return None
    try:
        with quiet_traps():
            return parse_loss(spec)
    except (LossmithError, TypeError):
        return None


def _texts(spec: Any) -> Iterator[str]:
    """Every text in a spec, however deep."""
    if isinstance(spec, str | Path):
        yield str(spec)
    elif isinstance(spec, Mapping | list | tuple):
        for value in spec.values() if isinstance(spec, Mapping) else spec:
            yield from _texts(value)


def _place(where: str, name: str) -> str:
    if where.endswith(".py"):
        return f"{os.path.abspath(os.path.expanduser(where))}:{name}"
    spec = importlib.machinery.PathFinder.find_spec(where.partition(".")[0], [str(Path.cwd()), *sys.path])
    return f"{where}:{name}" + (f" in {spec.origin}" if spec is not None and spec.origin else "")


def _asked(text: str, purpose: str, secrets: list[str]) -> str:
    address = Address.of(text)
    known = len(secrets)
    kept = redacted(text, secrets)
    line = f"{address.name} ({purpose})"
    if address.headers.get("Authorization", "").startswith("Bearer"):
        line += f", with the key in {KEY}"
    elif len(secrets) > known:
        names = ", ".join(name for name in re.findall(r"\$\{(\w+)\}", kept) if name not in text)
        line += f". The key in its address is not written down: to resume the run, put it into {names}"
    return line
