"""What the Tab key offers: cyclopts writes the script of the shell, and this file knows the losses.

The shell asks `lossmith __complete WORDS...` where a value is typed that a script cannot hold. Every Tab would import
torch to build the catalogue (seconds), so its words are kept in the cache folder and asked for there.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

import lossmith
from lossmith.errors import LossmithError, RunError
from lossmith.files import cache_folder, explain_write_errors, write_atomically

if TYPE_CHECKING:
    from cyclopts import App

__all__ = ["A_LOSS", "answer", "installer", "script"]

Shell = Literal["bash", "zsh", "fish"]

_OF_SETTINGS = ("train", "prefer", "bench")  # commands whose options are the fields of a recipe
_OF_LOSSES = (("losses", "show"), ("losses", "compare"), ("audit",), ("explore",), ("tour",))

# Marks a value for which the script asks; what it is answered is `answer`'s.
A_LOSS = Parameter(completer=lambda context: ())

# cyclopts' functions offer nothing where any path may stand; then the shell offers its files, as it would without them.
# bash cuts words at @, and leaves the quote in which a call such as "grpo(clip_high=0.3)" must stand at its word.
_BASH = r"""
_lossmith_or_files() {
  local cur="${COMP_WORDS[COMP_CWORD]}" before="${COMP_LINE:0:COMP_POINT}" typed line
  typed="${before##*[[:space:]]}"
  [[ $cur == [\"\']* ]] && typed="${cur:1}" && cur="$typed"
  if [[ $typed == *[@\(]* ]]; then
    [[ $cur == @ ]] && cur=""
    COMPREPLY=()
    while IFS=$'\t' read -r line _; do
      [[ -n $line && $line == "$typed"* ]] && COMPREPLY+=("${line:${#typed}-${#cur}}")
    done < <(lossmith __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
  else
    _lossmith
  fi
  [[ ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *[=/\(] ]] && compopt -o nospace 2>/dev/null
  return 0
}

complete -o bashdefault -o default -F _lossmith_or_files lossmith
"""
_ZSH = """
_lossmith_or_files() {
  _cyclopts_lossmith "$@"
  (( compstate[nmatches] )) || _files
}

compdef _lossmith_or_files lossmith
"""


def answer(app: App, words: Sequence[str]) -> None:
    """What `lossmith __complete WORDS...` prints, as cyclopts' scripts read it. Nothing goes wrong aloud."""
    print("\n\x1fbegin")
    with contextlib.suppress(LossmithError, OSError, ValueError):
        for word, meaning in _offers(words, _known(app)):
            print(f"{word}\t{meaning}")


def _offers(words: Sequence[str], known: dict[str, Any]) -> list[tuple[str, str]]:
    """(word, what it means) for the last of the words, and what it may become."""
    *before, typed = _joined(words)
    option, equals, value = typed.partition("=")
    if option.startswith("--") and equals:
        before, typed = [*before, option], value
    asked_for = before[-1] if before else ""
    typed = typed.lstrip("'\"").replace("\\", "")
    if asked_for == "--loss" or (
        not asked_for.startswith("-") and any(tuple(before[: len(c)]) == c for c in _OF_LOSSES)
    ):
        return _losses(typed, known["losses"])
    choices = known["choices"].get(before[0], {}).get(asked_for, ()) if before else ()
    return [(choice, "") for choice in choices if choice.startswith(typed)]


def _losses(typed: str, losses: dict[str, Any]) -> list[tuple[str, str]]:
    """Names that begin so; within the parentheses of one, its parameters that are not given yet."""
    name, opened, inside = typed.partition("(")
    if not opened:
        return [(n, of["summary"]) for n, of in losses.items() if n.startswith(name)]
    given, _, begun = inside.rpartition(",")
    if name not in losses or "=" in begun:
        return []
    there = {part.partition("=")[0].strip() for part in given.split(",")}
    parameter = begun.strip()
    head = typed.removesuffix(begun.lstrip())
    return [
        (f"{head}{key}=", meaning)
        for key, meaning in losses[name]["parameters"].items()
        if key not in there and key.startswith(parameter)
    ]


def _joined(words: Sequence[str]) -> list[str]:
    """bash cuts --loss=grpo and grpo@trl into three words."""
    joined: list[str] = []
    for word in words:
        cut = joined and (word == "@" or joined[-1].endswith("@"))
        if cut or (joined and joined[-1].startswith("--") and (word == "=" or joined[-1].endswith("="))):
            joined[-1] += word
        else:
            joined.append(word)
    return joined or [""]


def _known(app: App) -> dict[str, Any]:
    """Losses, and the choices of options, from the cache folder if it was put there by these very files."""
    package = Path(lossmith.__file__).parent
    made_by = [str(package), *(f"{f.stat().st_mtime_ns} {f.name}" for f in sorted(package.rglob("*.py")))]
    place = cache_folder() / "completion.json"
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(place.read_bytes())
        if isinstance(kept, dict) and kept.get("made_by") == made_by:
            return kept
    known = {"made_by": made_by, "losses": dict(_catalogue()), "choices": {n: _choices(app, n) for n in _OF_SETTINGS}}
    with contextlib.suppress(LossmithError, OSError):  # no cache: slow, and as good
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps(known))
    return known


def _choices(app: App, command: str) -> dict[str, list[str]]:
    """{option: what it may be} where that is a list."""
    arguments = app.parse_commands([command])[1][-1].assemble_argument_collection()
    return {name: list(found) for a in arguments if (found := a.get_choices(force=True)) for name in a.names}


def _catalogue() -> Iterator[tuple[str, dict[str, Any]]]:
    from lossmith.losses import PolicyLoss, describe, example_loss, list_losses  # torch comes with it

    for entry in list_losses():
        loss = example_loss(entry.name)
        if isinstance(loss, PolicyLoss):
            parameters = {name: meaning for name, _, meaning in describe(loss)}
        else:
            parameters = dict.fromkeys((k for k in loss.to_dict() if k not in ("name", "completion")), "")
        yield entry.name, {"summary": entry.summary, "parameters": parameters}


def script(app: App, shell: Shell) -> str:
    """The completion script of a shell."""
    text = app.generate_completion(shell=shell)
    if shell == "bash":
        return text.replace("\ncomplete -F _lossmith lossmith\n", _BASH)
    return text + _ZSH if shell == "zsh" else text


def installer(app: App) -> Any:
    """The function behind `lossmith --install-completion`."""

    def install_completion(
        *, shell: Shell | None = None, output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None
    ) -> None:
        """Let the Tab key complete commands, options, names of losses and their parameters: bash, zsh or fish.

        Parameters
        ----------
        shell
            bash, zsh or fish; the one that you are in, if not given.
        output
            File for the script, and nothing else is touched; if not given, it goes where the shell looks for it.
        """
        from cyclopts.completion.detect import ShellDetectionError, detect_shell
        from cyclopts.completion.install import add_to_rc_file, get_default_completion_path

        try:
            chosen = shell or detect_shell()
        except ShellDetectionError:
            chosen = "powershell"
        if chosen == "powershell":
            raise RunError("this is no shell that is known here: give --shell bash, --shell zsh or --shell fish.")
        place = output or get_default_completion_path(chosen, "lossmith")
        with explain_write_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, script(app, chosen))
            if output is None and chosen != "fish":
                add_to_rc_file(place, "lossmith", chosen)
        _known(app)  # or the first Tab would wait for torch
        then = "source it" if output else "it works in every new shell"
        print(f"completion for {chosen} is in {place}; {then}", file=sys.stderr)

    return install_completion
