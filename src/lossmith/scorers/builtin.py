"""Scorers that come with the library: automatic, no gold answers, no model, plain Python, English.

They are demonstrations: enough for a first run to have something sensible to improve and to over-optimize. None of
them knows whether an answer is true. For anything that matters bring a scorer of your own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from lossmith.rollouts import Rollout, Score

__all__ = ["BUILTINS", "Builtin"]


@dataclass(frozen=True)
class Builtin:
    """A built-in scorer; `summary` says in one line what it measures."""

    name: str
    summary: str
    function: Callable[[Rollout], Score]

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [self.function(rollout) for rollout in rollouts]

    def columns_read(self, names: Set[str]) -> set[str]:
        """None."""
        return set()

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        """As `score`: microseconds of plain Python need no limit."""
        return self.score(rollouts)


# --- helpfulness -----------------------------------------------------------------------------------------------------


HELPFULNESS_PARTS = ("substance", "own_words", "varied", "on_topic", "complete", "readable")


def helpfulness(rollout: Rollout) -> Score:
    """In [0, 1]: does this look like a short, finished answer to the prompt, in readable English?

        substance · own_words · varied · (0.25 + 0.75 on_topic) · (0.7 complete + 0.3 readable)

    The three in front are gates: 1 for any ordinary answer, near 0 for an empty or a degenerate one. The other three
    are what there is to improve. `Score.parts` holds all six, each in [0, 1]:

    - substance: different words / 8, at most 1.
    - own_words: 1 while at most half of the answer's word triples are in the prompt, then down to 0 for a copy.
    - varied: the share of the answer's word triples that are not repeats, squared; twice the same sentence is 0.25.
    - complete: 0.6 × the share of words that lie in ended sentences; + 0.4 for an answer that ended by itself and
      with the end of a sentence, + 0.1 for one that just stopped. A cut-off answer earns at most 0.6, and more the
      later its last sentence ended: samples of one prompt differ in it even if none ends in time.
    - on_topic: content words of the prompt (the last user message; no function words, no "explain", no endings) that
      come up in the answer; half of them, and never more than 4, is enough, so that parroting the rest earns nothing.
      It multiplies, so that one polished answer to everything keeps a quarter.
    - readable: mean of: different words / words (0.6 is enough); sentences of 6 to 30 words; plain characters; no
      monster words; starts with a capital letter or a list.

    What it is not: a judge. It cannot see whether an answer is true, polite, or even makes sense: fluent nonsense
    that uses the prompt's words and ends in time scores 1. Languages other than English score low.
    """
    text = rollout.completion.strip()
    words = _words(text)
    if not words:
        return Score(value=0.0, parts=dict.fromkeys(HELPFULNESS_PARTS, 0.0))
    prompt_words = _words(_question(rollout))
    substance = min(1.0, len(set(words)) / 8)
    in_prompt = set(_triples(prompt_words))
    copied = sum(triple in in_prompt for triple in _triples(words)) / len(_triples(words))
    own_words = min(1.0, 2 * (1 - copied))
    varied = _distinct_share(_triples(words)) ** 2
    on_topic = _on_topic(words, prompt_words)
    complete = _complete(text, len(words), rollout.finish_reason != "length")
    readable = _readable(text, words)
    value = substance * own_words * varied * (0.25 + 0.75 * on_topic) * (0.7 * complete + 0.3 * readable)
    parts = (substance, own_words, varied, on_topic, complete, readable)
    return Score(value=value, parts=dict(zip(HELPFULNESS_PARTS, parts, strict=True)))


_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_LIST_MARK = re.compile(r"^\s*(?:\d+[.)]|[-*•#]+)\s+", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]*_]*(?=\s|$)")
_PLAIN = re.compile(r"[A-Za-z0-9\s.,;:!?'\"()\-–—’‘“”%$&/*_#]")

_FUNCTION_WORDS = """
    a about after all also am an and any are as at be because been before being between both but by can could did do
    does doing done for from get had has have having he her here him his how i if in into is it its just like may me
    might more most much must my no not of off on one or other our out over own said same she should so some such than
    that the their them then there these they this those to too under up us very was we were what when where which
    while who whom whose why will with would you your
"""
_ASKING_WORDS = """
    answer briefly compare create define describe discuss explain find generate give help identify list make mention
    name please provide say sentence sentences short state suggest summarize summarize tell using word words write
"""
_STOP_WORDS = frozenset((_FUNCTION_WORDS + _ASKING_WORDS).split())


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _question(rollout: Rollout) -> str:
    """What the user said last."""
    user_messages = [str(m.get("content", "")) for m in rollout.prompt.messages if m.get("role") == "user"]
    return user_messages[-1] if user_messages else rollout.prompt.text


def _triples(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Every three words in a row; a shorter text is one piece."""
    return [tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))]


def _distinct_share(items: Sequence[object]) -> float:
    return len(set(items)) / len(items)


def _complete(text: str, words: int, ended: bool) -> float:
    prose = _LIST_MARK.sub("", text)  # the dot of "1." ends no sentence
    ends = [match.end() for match in _SENTENCE_END.finditer(prose)]
    inside = len(_words(prose[: ends[-1]])) if ends else 0
    closed = bool(ends) and ends[-1] == len(prose)
    return 0.6 * inside / words + (0.4 if ended and closed else 0.1 if ended else 0.0)


def _on_topic(words: Sequence[str], prompt: Sequence[str]) -> float:
    content_words = {_stem(word) for word in prompt if word not in _STOP_WORDS and len(word) > 2}
    if not content_words:
        return 1.0  # nothing to be on or off
    enough = min(4, math.ceil(len(content_words) / 2))
    return min(1.0, len(content_words & {_stem(word) for word in words}) / enough)


def _stem(word: str) -> str:
    """A word without its commonest English endings: cycles, cycling, cycled -> cycl."""
    for ending in ("'s", "’s", "ing", "ies", "ed", "ly", "es", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _readable(text: str, words: Sequence[str]) -> float:
    prose = _LIST_MARK.sub("", text)
    lengths = [len(_words(part)) for part in _SENTENCE_END.split(prose)]
    fit = [min(1.0, n / 6, 30 / n) for n in lengths if n]
    checks = [
        min(1.0, _distinct_share(words) / 0.6),
        sum(fit) / len(fit),
        len(_PLAIN.findall(text)) / len(text),
        float(max(len(word) for word in words) <= 25),
        float(text[0].isupper() or _LIST_MARK.match(text) is not None),
    ]
    return sum(checks) / len(checks)


# --- proxies ---------------------------------------------------------------------------------------------------------


def brevity(rollout: Rollout) -> Score:
    """1 / (1 + words / 20); 0 for an answer without a word, so that silence does not win."""
    words = len(rollout.completion.split())
    return Score(value=1 / (1 + words / 20) if words else 0.0)


def length(rollout: Rollout) -> Score:
    """words / 100, without end: a proxy that anything can over-optimize, to watch it happen."""
    return Score(value=len(rollout.completion.split()) / 100)


BUILTINS = {
    builtin.name: builtin
    for builtin in (
        Builtin(
            "helpfulness", "a finished, readable English answer that uses the prompt's words; in [0, 1]", helpfulness
        ),
        Builtin("brevity", "fewer words are better, none is worst; in [0, 1]", brevity),
        Builtin("length", "more words are better: a proxy to watch being over-optimized; words / 100", length),
    )
}
