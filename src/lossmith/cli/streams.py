"""Standard output and error, whatever characters they can hold: Windows and old locales know no UTF-8."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from typing import Any

from lossmith.errors import RunError
from lossmith.terminal import Terminal

__all__ = ["RunConsole", "bear_every_character", "check_names", "print_json", "write_lines"]

_SPELLED = {
    "π": "pi", "θ": "theta", "κ": "kappa", "μ": "mu", "σ": "sigma", "ρ": "rho", "λ": "lambda", "β": "beta", "τ": "tau",
    "ε": "eps", "δ": "delta", "γ": "gamma", "α": "alpha", "Σ": "sum", "Δ": "delta", "Π": "prod", "√": "sqrt",
    "−": "-", "–": "-", "·": "*", "×": "x", "≠": "!=", "≤": "<=", "≥": ">=", "≈": "~", "→": "->", "←": "<-",
    "∇": "grad ", "∞": "inf", "∈": " in ", "‖": "||", "✓": "+", "…": "...", "’": "'", "²": "^2",
}  # fmt: skip


class RunConsole(Terminal):
    def on_broken_pipe(self) -> None:
        """rich would end the process here; the run is to be saved first."""
        raise BrokenPipeError


def bear_every_character() -> None:
    """A character that standard output or error cannot hold is spelled in ASCII instead of ending the command."""
    codecs.register_error("lossmith.spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lossmith.spelled")


def check_names() -> None:
    """RunError: a word of the command line, or the folder that it is given in, is no text and could not be recorded."""
    try:
        here = os.getcwd()
    except OSError as error:
        raise RunError(f"the folder that you are in cannot be entered ({error.strerror}). Go to another one.") from None
    for name in (*sys.argv[1:], here):
        if any("\udc80" <= c <= "\udcff" for c in name):  # bytes that Python could not decode
            raise RunError(
                f"{name!a} is no text in this terminal's encoding ({sys.getfilesystemencoding()}). Rename it; or, "
                "where its name is UTF-8, set PYTHONUTF8=1."
            )


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    known = "".join(_SPELLED.get(c, c) for c in text)
    return known.encode("ascii", "backslashreplace").decode("ascii"), error.end


def print_json(value: Any, indent: int | None = None) -> None:
    """One JSON value on standard output, readable where that can hold its characters and valid everywhere."""
    write_lines([json.dumps(value, ensure_ascii=False, indent=indent)])


def write_lines(lines: list[str]) -> None:
    """JSON texts on standard output, a line each: what it cannot hold is escaped as JSON does, and nothing is lost."""
    for line in lines:
        try:
            line.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            line = "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in line)
        print(line)
