"""What went wrong, in the words of the shell.

Messages name a setting as a recipe does, `held_out` or `held_out = 3`. Here they get the options of the command that
was given, `--held-out 3`; a setting that stands in the recipe file keeps its name there.
"""

from __future__ import annotations

import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cyclopts

from lossmith.errors import LossmithError, printable
from lossmith.settings.base import Settings
from lossmith.settings.unknown import instead_of, is_word

__all__ = ["in_options", "options_of", "said", "settings_of"]

S = typing.TypeVar("S", bound=Settings)
_OF_PROMPTS = {"limit": "prompt_limit", "column": "prompt_column", "split": "prompt_split"}  # as load_prompts has them
_IN_RECIPE: set[str] = set()  # settings whose value is the recipe file's
_QUOTED = r"(?<!\w)(?:'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\")(?!\w)"  # a user's own words: left as they are

_LISTED = r" Known: .*?\.(?=\s|$)"  # what `nearest` lists are the names of where it looked


def settings_of(
    kind: type[S],
    recipe: Path | None,
    options: S | None,
    *,
    first: Callable[[dict[str, typing.Any]], None] | None = None,
    **more: typing.Any,
) -> S:
    """The settings of a command: what was given as options wins over what the recipe file says.

    first: is shown them before they are checked, for a check may run the code of a file that they name.
    """
    given = {} if options is None else {key: getattr(options, key) for key in options.model_fields_set}
    fields = {} if recipe is None else kind.read(recipe)
    given |= {key: value for key, value in more.items() if value is not None}
    _IN_RECIPE.update(fields.keys() - given.keys())
    if first is not None:
        first(fields | given)
    return kind.make(str(recipe or "command line"), **fields | given)


def said(app: cyclopts.App, error: LossmithError | cyclopts.CycloptsError) -> str:
    """The message of an error that was met while `app` did what the command line asks."""
    options = options_of(app, sys.argv[1:])
    text = str(error) if isinstance(error, LossmithError) else _misread(error, options)
    kept = {name: option for name, option in options.items() if name not in _IN_RECIPE}
    return printable(in_options(text.removeprefix("command line: "), kept))


def options_of(app: cyclopts.App, words: Sequence[str]) -> dict[str, str]:
    """{setting: option} of the command that the words name; {} where they name none."""
    command = app.parse_commands(list(words))[1][-1]
    if command.default_command is None:
        return {}
    arguments = command.assemble_argument_collection()
    found = {a.field_info.name: a.names[0] for a in arguments if a.names[0].startswith("--")}
    other = {name: found[setting] for name, setting in _OF_PROMPTS.items() if setting in found}
    return other | found


def in_options(text: str, options: Mapping[str, str]) -> str:
    """The text with every setting that it names spelled as its option.

    A word such as `steps` alone is English; `steps = 3` is the setting, and so is `held_out`.
    """
    if not options:
        return text
    name = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    value = r"(?P<value>true|True|false|False|\[\"[^\"\]]*\"\])?"
    pattern = re.compile(
        rf"{_QUOTED}|{_LISTED}|(?<![\w./@-])(?P<name>{name})(?:(?P<equals> ?= ?){value}|(?![\w.(/-]*[\w(/]))"
    )

    def spelled(match: re.Match[str]) -> str:
        key, equals, value = match["name"], match["equals"], match["value"] or ""
        if key is None or (equals is None and "_" not in key):
            return match[0]
        if value.lower() == "true":
            return options[key]
        if value.lower() == "false":
            return options[key].replace("--", "--no-", 1)
        return options[key] + (" " if equals else "") + value.strip('[]"')

    return pattern.sub(spelled, text)


def _misread(error: cyclopts.CycloptsError, options: Mapping[str, str]) -> str:
    """Words that fit no command or option. What a recipe's field refuses is said as a recipe says it."""
    import pydantic

    if isinstance(error.__cause__, pydantic.ValidationError) and error.argument is not None:
        kinds = (error.argument.hint, *typing.get_args(error.argument.hint))
        kind = next(k for k in kinds if isinstance(k, type) and issubclass(k, Settings))
        return kind.refusal(error.__cause__, shlex.quote)
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return f"there is no place for {' '.join(map(shlex.quote, error.unused_tokens or ()))} in this command."
    if isinstance(error, cyclopts.UnknownOptionError):
        keyword = (error.token.keyword or error.token.value).partition("=")[0]
        key = keyword.strip("-").replace("-", "_")
        if "allow_traps" in options and is_word(key):  # the nearest option would be another quantity
            return f"there is no option {keyword}.{instead_of(key, ..., options)}"
    return str(error)
