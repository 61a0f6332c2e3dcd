"""Untrusted text as text: nothing in it is markup, and nothing in it is invisible."""

from __future__ import annotations

import itertools
import unicodedata

from markupsafe import Markup, escape

__all__ = ["visible"]

_JOINERS = "\u200c\u200d"  # rightly between letters of many scripts, and inside emoji
_BLANK = "\u115f\u1160\u2028\u2029\u2800\u3164\uffa0"  # neither controls nor spaces, and yet not seen


def visible(text: str) -> Markup:
    """HTML of a text: escaped, line breaks and tabs kept, and a label where a character would hide or turn the rest.

    Control and format characters (bidi overrides, zero widths, NUL, escape), lone surrogates and tag characters are
    labelled; joiners between letters that need them are left alone.
    """
    text = text.replace("\r\n", "\n")
    if all(c.isprintable() or c in "\n\t" for c in text) and not any(c in text for c in _BLANK):
        return escape(text)
    pieces: list[Markup] = []
    for (character, hides), run in itertools.groupby(
        (c, _hides(c, text[k - 1 : k], text[k + 1 : k + 2])) for k, c in enumerate(text)
    ):
        count = len(list(run))
        pieces.append(_label(character, count) if hides else escape(character * count))
    return Markup("").join(pieces)


def _hides(c: str, before: str, after: str) -> bool:
    if c in "\n\t":
        return False
    if c in _JOINERS:
        return not (before > "\x7f" and after > "\x7f")
    return c in _BLANK or unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") or "\U000e0000" <= c <= "\U000e0fff"


def _label(c: str, count: int) -> Markup:
    code = f"U+{ord(c):04X}"
    name = unicodedata.name(c, "control character" if ord(c) < 0xA0 else "no character")
    times = f" ×{count}" if count > 1 else ""
    return Markup('<span class="hidden-char" title="{}">{}{}</span>').format(f"{code} {name}", code, times)
