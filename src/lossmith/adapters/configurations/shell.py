"""The settings that a shell script launches a trainer with. The script is read, and nothing in it is run.

Read are words and quotes, comments, lines continued with a backslash, variables and arrays that the script sets,
`${X:-default}`, and here-documents. What only a shell could know (`$(...)`, `$1`, a variable that is set under a
condition or from outside) makes the value a `Computed` one, which no reader takes for granted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lossmith.adapters.configurations.computed import Computed
from lossmith.adapters.configurations.words import Command, ShellError, commands
from lossmith.errors import LossError

__all__ = ["Launch", "launches"]

_SETTING = re.compile(r"^(?P<mark>[+~]*)(?P<key>[A-Za-z_][\w./@-]*)=(?P<value>.*)$", re.DOTALL)
_FLAG = re.compile(r"^--(?P<key>[A-Za-z_][\w.-]*)(?:=(?P<value>.*))?$", re.DOTALL)
_ARGUMENTS = "the script passes on what it is started with ($@), which may set more"


@dataclass(frozen=True)
class Launch:
    """A command of the script that runs a program with settings."""

    program: str
    settings: dict[str, Any]
    lines: dict[str, int]
    rest: str  # what the script leaves to whoever runs it


def launches(text: str, where: str) -> list[Launch]:
    """Every command that runs a Python program with settings. LossError: a quote is left open, or there is none."""
    try:
        found = [made for command in commands(text) if (made := _launch(command, where)) is not None]
    except ShellError as error:
        raise LossError(f"{where}:{error.line}: {error.what}.") from None
    if not found:
        raise LossError(f"{where}: no command in it runs a Python program with settings (key=value, or --key value).")
    return found


def _launch(command: Command, where: str) -> Launch | None:
    start = next((i for i, word in enumerate(command.words) if _is_program(command, i)), None)
    if start is None:
        return None
    settings: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value, line in _pairs(command, start + 1):
        if key in settings and settings[key] != value:
            raise LossError(f"{where}:{line}: {key} is given twice, as {settings[key]} and {value}.")
        settings[key], lines[key] = value, line
    rest = _ARGUMENTS if any(word.text in ("$@", "$*", "${@}", "${@:1}", "${@:2}") for word in command.words) else ""
    return Launch(command.words[start].text, settings, lines, rest) if settings else None


def _is_program(command: Command, i: int) -> bool:
    text, before = command.words[i].text, command.words[i - 1].text if i else ""
    if before == "-m" or (text.endswith(".py") and "=" not in text):
        return True
    return (text == "grpo" and before.rpartition("/")[2] == "trl") or (text == "rl" and before in ("run", ""))


def _pairs(command: Command, start: int) -> Iterator[tuple[str, Any, int]]:
    """(key, value, line) of key=value, --key=value, and --key followed by its values; `@ file` is (@, file)."""
    words, i = command.words, start
    while i < len(words):
        word = words[i]
        i += 1
        if flag := _FLAG.match(word.text):
            values = [] if flag["value"] is None else [_known(flag["value"], word.computed)]
            while flag["value"] is None and i < len(words) and not _starts_setting(words[i].text):
                values.append(_known(words[i].text, words[i].computed))
                i += 1
            yield flag["key"], True if not values else values[0] if len(values) == 1 else values, word.line
        elif setting := _SETTING.match(word.text):
            if setting["mark"].startswith("~"):
                yield setting["key"], Computed(word.text), word.line
            else:
                yield setting["key"], _known(setting["value"], word.computed), word.line
        elif word.text.startswith("@"):
            name = word.text[1:] or (words[i].text if i < len(words) else "")
            i += not word.text[1:]
            yield "@", name, word.line


def _starts_setting(text: str) -> bool:
    return bool(_FLAG.match(text)) or text in ("$@", "$*", "--") or text.startswith("@")


def _known(text: str, computed: bool) -> Any:
    return Computed(text) if computed else text
