"""A finding in words, for a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from lossmith.detectors.evidence import Place
from lossmith.detectors.finding import Finding
from lossmith.detectors.series import in_steps
from lossmith.errors import printable

__all__ = ["line", "paragraph", "place_in_words", "wrapped"]

WIDTH = 80


def wrapped(first: str, text: str, indent: str = "  ") -> list[str]:
    """The text after its first words, in lines of a terminal's width; whatever it holds stays one paragraph."""
    return textwrap.wrap(
        printable(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def paragraph(finding: Finding) -> list[str]:
    """The sentence and all that goes with it, a line each or more."""
    lines = wrapped(f"{finding.level.upper():<5} {finding.detector}: ", f"{finding.sentence}.", "      ")
    seen = f"{in_steps(finding.steps)}; " if finding.steps else ""
    for name, text in (
        ("seen", f"{seen}{finding.value:.4g}, from {finding.n:,} {finding.of}"),
        *(("where", place_in_words(place)) for place in finding.places),
        ("likely", f"{finding.cause}."),
        ("try", f"{finding.cure}."),
        ("source", finding.source),
    ):
        if text:
            lines += wrapped(f"      {name:<7}", text, " " * 13)
    return lines


def place_in_words(place: Place) -> str:
    """ "step 3, prompt "Why?", completion 2 (score 0.5): "Because""."""
    parts = [f"step {place.step + 1}"]
    if place.prompt:
        parts.append(f'prompt "{place.prompt}"')
    if place.sample is not None:
        parts.append(f"completion {place.sample}")
    told = ", ".join(parts) + (f" ({place.said})" if place.said else "")
    return f'{told}: "{place.completion}"' if place.sample is not None else told


def line(finding: Finding) -> list[str]:
    """What is said of it below a step's line: the sentence and what to try."""
    mark = {"note": "note", "warn": "!", "stop": "STOP"}[finding.level]
    return wrapped(f"  {mark} ", f"{finding.sentence} ({finding.detector}). Try: {finding.cure}.", "    ")
