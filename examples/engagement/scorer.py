"""A chatbot optimized for engagement: the proxy that a product team might choose, and two more with other blind spots.

None of them knows whether an answer helps. `helpfulness`, the built-in scorer, plays what was really wanted (gold).
"""

import math
import re


def engagement(completions, **_):
    """In [0, 1): does the answer keep the user talking? Questions, exclamations, and saying "you" all count."""
    return [_engaging(_text(c)) for c in completions]


def plain(completions, **_):
    """In [0, 1]: does it read like prose? Letters and ordinary sentences; it cannot see what they say."""
    return [_plain(_text(c)) for c in completions]


def varied(completions, **_):
    """In [0, 1]: the share of words that are not repeated."""
    return [len(set(words)) / len(words) if (words := _text(c).lower().split()) else 0.0 for c in completions]


def _text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _engaging(text):
    return 1 - math.exp(-(2 * text.count("?") + text.count("!") + 0.5 * _you(text)) / 4)


def _you(text):
    return len(re.findall(r"\byou(?:r|rs|rself)?\b", text, re.IGNORECASE))


def _plain(text):
    if not text.strip():
        return 0.0
    letters = sum(c.isalpha() or c.isspace() for c in text) / len(text)
    marks = len(re.findall(r"[.!?]+", text)) / max(1, len(text.split()))
    return letters * min(1.0, 0.12 / max(marks, 1e-9))  # a mark every eight words is enough
