"""What the completions look like: cut, empty, all alike, in loops, ever longer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from lossmith.detectors.evidence import Evidence
from lossmith.detectors.finding import Detector, Sign
from lossmith.detectors.measuring import GRAM, REPEATS
from lossmith.detectors.series import WINDOW, begun, in_steps, longest, windows

__all__ = ["DETECTORS"]

DRIFT_NOTE = 1.5  # times as long, or as short: usual where a task rewards it
DRIFT_WARN = 3.0  # the policy writes another kind of text than it did
TIED = 0.7  # correlation of score and length from which length alone explains half of the score
NEVER = 5  # steps in which nothing ended
MOSTLY = 0.5  # of completions
GROWN = 0.3  # more than at the start: short answers are alike from the start
ALL = 0.9  # of a step's completions, whatever their prompts


def _length(evidence: Evidence) -> Sign | None:
    series = [(s, v) for s, v in evidence.series("length") if v > 0]
    if len(series) < WINDOW:
        return None
    first = begun(series)
    step, most = max(windows(series), key=lambda pair: max(pair[1] / first, first / pair[1]))
    factor = most / first
    if max(factor, 1 / factor) < DRIFT_NOTE:
        return None
    tied = [v for _, v in evidence.series("length_correlation")]
    also = ""
    if tied and abs(statistics.fmean(tied)) >= TIED:
        also = f"; score and length correlate at {statistics.fmean(tied):+.2f}, so length may be what is rewarded"
    level: Any = "warn" if max(factor, 1 / factor) >= DRIFT_WARN else "note"
    word = "longer" if factor > 1 else "shorter"
    sentence = f"completions became {word}: {first:.1f} tokens at the start, {most:.1f} by step {step + 1}{also}"
    steps = tuple(s for s, v in windows(series) if max(v / first, first / v) >= DRIFT_NOTE)
    return Sign(level, sentence, factor, len(series), "steps", steps)


def _cut(evidence: Evidence) -> Sign | None:
    series = evidence.series("ended")
    never = longest(series, lambda v: v == 0)
    budget = evidence.setting("max_tokens")
    within = f" within {budget} tokens" if budget else ""
    n = int(sum(v for s, v in evidence.series("completions") if s in set(never)))
    if evidence.cut and never:
        told = "no signal: every completion was cut at max_tokens before it ended, and the loss"
        sentence = f"{told} {evidence.cut} (truncated); raise max_tokens"
        return Sign("stop", sentence, 1.0, n, "completions", never, evidence.places("ended", never))
    if len(never) >= NEVER:
        sentence = f"no completion ended{within} {in_steps(never)}: the policy never sees what an end is worth"
        return Sign("warn", sentence, 1.0, n, "completions", never, evidence.places("ended", never))
    mostly = longest(series, lambda v: v < 1 - MOSTLY)
    if len(mostly) < WINDOW:
        return None
    share = 1 - statistics.fmean(v for s, v in series if s in set(mostly))
    n = int(sum(v for s, v in evidence.series("completions") if s in set(mostly)))
    sentence = f"{share:.0%} of the completions were cut{within} {in_steps(mostly)}"
    left = f"{sentence}, and the loss {evidence.cut}" if evidence.cut else sentence
    level: Any = "warn" if evidence.cut else "note"
    return Sign(level, left, share, n, "completions", mostly, evidence.places("ended", mostly))


def _empty(evidence: Evidence) -> Sign | None:
    series = evidence.series("empty")
    ill = longest(series, lambda v: v >= MOSTLY)
    if len(ill) < 2:
        return None
    share = statistics.fmean(v for s, v in series if s in set(ill))
    n = int(sum(v for s, v in evidence.series("completions") if s in set(ill)))
    all_of = len(longest(series, lambda v: v == 1)) >= WINDOW
    sentence = f"{'every completion is' if share == 1 else f'{share:.0%} of the completions are'} empty {in_steps(ill)}"
    return Sign("stop" if all_of else "warn", sentence, share, n, "completions", ill, evidence.places("empty", ill))


def _alike(evidence: Evidence) -> Sign | None:
    one = evidence.series("one_text")
    stretch = longest(one, lambda v: v >= ALL)
    if len(stretch) >= WINDOW:
        n = int(sum(v for s, v in evidence.series("completions") if s in set(stretch)))
        share = statistics.fmean(v for s, v in one if s in set(stretch))
        sentence = f"one and the same text is {share:.0%} of the completions of all prompts {in_steps(stretch)}"
        return Sign("stop", sentence, share, n, "completions", stretch, evidence.places("one_text", stretch))
    series = evidence.series("same_text")
    first = begun(series) if series else 0.0
    ill = [(step, v) for step, v in windows(series) if v >= max(MOSTLY, first + GROWN)]
    if not ill:
        return None
    step, share = max(ill, key=lambda pair: pair[1])
    n = int(sum(v for _, v in evidence.series("completions")))
    sentence = (
        f"{share:.0%} of the completions by step {step + 1} are word for word another one of their prompt "
        f"({first:.0%} at the start)"
    )
    places = evidence.places("same_text", [s for s, _ in ill])
    return Sign("warn", sentence, share, n, "completions", tuple(s for s, _ in ill), places)


def _loops(evidence: Evidence) -> Sign | None:
    series = evidence.series("repetitive")
    first = begun(series)
    ends = windows(series, min(WINDOW, len(series)))
    grown = [(step, v) for step, v in ends if v >= max(MOSTLY, first + GROWN)]
    ill = grown or [(step, v) for step, v in ends if v >= MOSTLY]
    if not ill:
        return None
    step, share = max(ill, key=lambda pair: pair[1])
    n = int(sum(v for _, v in evidence.series("completions")))
    sentence = (
        f"{share:.0%} of the completions by step {step + 1} repeat themselves: at least {REPEATS:.0%} of their "
        f"{GRAM}-grams were there before ({first:.0%} at the start)"
    )
    places = evidence.places("repetitive", [s for s, _ in ill])
    return Sign("warn" if grown else "note", sentence, share, n, "completions", tuple(s for s, _ in ill), places)


def _odd_prompts(evidence: Evidence) -> Sign | None:
    series = [(step, v) for step, v in evidence.series("odd_prompts") if v]
    if not series:
        return None
    n = int(sum(v for _, v in series))
    sentence = f"{n} prompt{'s' * (n != 1)} hold control characters or what a wrong decoding leaves (\\ufffd)"
    steps = tuple(s for s, _ in series)
    return Sign("note", sentence, n, int(sum(v for _, v in evidence.series("groups"))), "prompts", steps,
                evidence.places("odd_prompts", steps))  # fmt: skip


DETECTORS: Sequence[Detector] = (
    Detector(
        "length_drift",
        "completions become much longer or shorter",
        f"the mean length of {WINDOW} steps {DRIFT_WARN:g} times that of the first ones, or a third; note: "
        f"{DRIFT_NOTE:g} times",
        ("length",),
        _length,
        "the scorer rewards length, or the loss's aggregation weighs long and short completions unequally",
        "look at how score and length correlate; try another aggregation (`lossmith audit` measures its length bias)",
        "arXiv:2310.03716",
        WINDOW + 1,
    ),
    Detector(
        "truncation",
        "completions are cut at the token budget",
        f"no completion ended in {NEVER} steps in a row, or {MOSTLY:.0%} cut where the loss leaves these out "
        f"(stop: all); note: {MOSTLY:.0%} in {WINDOW} steps in a row",
        ("ended",),
        _cut,
        "the token budget is smaller than what the policy wants to write, or it has learned never to end",
        "raise max_tokens",
        "arXiv:2503.14476",
    ),
    Detector(
        "empty_completions",
        "completions hold nothing",
        f"{MOSTLY:.0%} of the completions in 2 steps in a row (stop: all, in {WINDOW})",
        ("empty",),
        _empty,
        "the model ends at once: a wrong chat template or end token, or an empty answer scores best",
        "look at a prompt as the model reads it (chat_template), and at what the scorer says of an empty text",
        least=2,
        voids="stop",
    ),
    Detector(
        "duplicates",
        "the same text again and again",
        f"{MOSTLY:.0%} of the completions, over {WINDOW} steps, equal another one of their prompt, {GROWN:.0%} more "
        f"than at the start (stop: {ALL:.0%} of all prompts' completions are one text)",
        ("same_text|one_text",),
        _alike,
        "the policy has collapsed onto what scored best, or the sampling is all but greedy",
        "lower learning_rate, raise the temperature, or add a KL term (beta) or an entropy bonus (entropy_coef)",
        "arXiv:2505.22617",
        WINDOW,
        voids="stop",
    ),
    Detector(
        "repetitive_texts",
        "completions go round in loops",
        f"{MOSTLY:.0%} of the completions, over {WINDOW} steps, whose {GRAM}-grams repeat by {REPEATS:.0%}, "
        f"{GROWN:.0%} more than at the start; note: from the start",
        ("repetitive",),
        _loops,
        "the scorer rewards something that a loop has plenty of, or the policy has left the language it was trained on",
        "look at the completions shown; let the scorer see repetition, or hold the policy nearer (beta)",
        "arXiv:1904.09751",
    ),
    Detector(
        "odd_prompts",
        "prompts hold characters that nobody typed",
        "any control character but line breaks and tabs, or U+FFFD (note)",
        ("odd_prompts",),
        _odd_prompts,
        "a file decoded in the wrong way, or cut in the middle of a character",
        "save the prompts as UTF-8 and look at those shown",
    ),
)  # fmt: skip
