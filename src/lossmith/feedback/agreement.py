"""How far the annotators agree with each other, and with themselves: what to know before a loss reads judgements.

Only judgements that still hold count: what was undone or answered again is not compared between annotators. A person
is never mixed with a program without a line that says so.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from lossmith.errors import FeedbackError
from lossmith.feedback.agreement_measures import (
    agreed,
    cohen,
    cycles,
    fleiss,
    in_words,
    ordinal_alpha,
    share_of_first,
    spread,
)
from lossmith.feedback.agreement_tables import (
    FEW,
    Agreement,
    AgreementReport,
    AnnotatorSummary,
    LookAgain,
    PositionBias,
    count,
    short,
)
from lossmith.feedback.convert import effective_judgements
from lossmith.feedback.judgement import SCALES, Judgement
from lossmith.feedback.output_set import OutputSet
from lossmith.intervals import FEWEST
from lossmith.prompts import prompt_content

__all__ = ["Agreement", "AgreementReport", "AnnotatorSummary", "LookAgain", "PositionBias", "agreement_report"]

HASTY = 2.0  # seconds: nobody reads two outputs in less
SHOWN = 10  # items to look at again
_CATEGORIES = ("first", "second", "tie", "both_bad")
_SWAPPED = {"first": "second", "second": "first"}
_ANSWERS = ("rating", "pair", "ranking")

Coder = tuple[str, str]  # annotator and source: the same name as a person and as a program is two
Units = dict[Hashable, dict[Coder, Any]]  # what was judged: {coder: the value}


def agreement_report(judgements: Sequence[Judgement], sets: Mapping[str, OutputSet]) -> AgreementReport:
    """`judgements` are all that were ever made, in their order: undone ones and their undos included."""
    raw = list({j.id: j for j in judgements}.values())  # a click sent twice counts once
    for j in raw:
        if j.set_id not in sets:
            raise FeedbackError(
                f"a judgement of {j.annotator!r} is about the set {j.set_id!r}, which is not among the sets: the sets "
                "file is another one than was judged."
            )
        j.check(sets[j.set_id])
    effective = effective_judgements(raw)
    wins = _wins(effective)
    annotators = tuple(_annotators(raw, effective, wins))
    agreements = tuple(_agreements(effective))
    bias = tuple(_position_bias(effective))
    again = tuple(_look_again(effective, wins, sets))
    return AgreementReport(annotators, agreements, bias, again, tuple(_sentences(annotators, agreements, bias)))


# -- judgements as tables ----------------------------------------------------------------------------------------------


def _coder(j: Judgement) -> Coder:
    return j.annotator, j.source


def _choice(j: Judgement) -> str:
    """A pair's category in the order in which it was shown; a probability is the side that it is on."""
    if isinstance(j.value, str):
        return j.value
    return "tie" if j.value == 0.5 else "first" if j.value > 0.5 else "second"


def _oriented(j: Judgement) -> str:
    """A pair's category by the sorted ids, so that two who were shown it in other orders can be compared."""
    choice = _choice(j)
    return choice if j.outputs[0] <= j.outputs[1] else _SWAPPED.get(choice, choice)


def _ranks(j: Judgement) -> dict[str, float]:
    """{output id: rank}, best 1; those of one tier share the mean of their places."""
    ranks: dict[str, float] = {}
    before = 0
    for tier in j.value:
        ranks |= dict.fromkeys(tier, before + (len(tier) + 1) / 2)
        before += len(tier)
    return ranks


def _wins(effective: Iterable[Judgement]) -> dict[tuple[Coder, str], list[tuple[str, str]]]:
    """{(coder, set): [(better, worse), ...]} of decided pairs."""
    wins: dict[tuple[Coder, str], list[tuple[str, str]]] = {}
    for j in effective:
        if j.kind == "pair" and (choice := _choice(j)) in _SWAPPED:
            a, b = j.outputs if choice == "first" else j.outputs[::-1]
            wins.setdefault((_coder(j), j.set_id), []).append((a, b))
    return wins


def _units(effective: Iterable[Judgement]) -> dict[tuple[str, str], Units]:
    """{(question, scale): units}; a unit of ratings and rankings is an output, of pairs two of them."""
    units: dict[tuple[str, str], Units] = defaultdict(dict)
    for j in effective:
        values: dict[Hashable, Any] = {}
        if j.kind == "rating":
            values = {(j.set_id, j.outputs[0]): float(j.value)}
        elif j.kind == "pair":
            values = {(j.set_id, *sorted(j.outputs)): _oriented(j)}
        elif j.kind == "ranking":
            values = {(j.set_id, name): rank for name, rank in _ranks(j).items()}
        for unit, value in values.items():
            units[j.kind, j.scale if j.kind == "rating" else ""].setdefault(unit, {})[_coder(j)] = value
    return dict(sorted(units.items()))


# -- each annotator ----------------------------------------------------------------------------------------------------


def _annotators(
    raw: list[Judgement], effective: list[Judgement], wins: Mapping[Any, Any]
) -> Iterable[AnnotatorSummary]:
    contradictions, no_signal = _contradictions(raw), _no_signal(effective)
    for coder in dict.fromkeys(map(_coder, raw)):
        mine = [j for j in effective if _coder(j) == coder]
        kinds = Counter(j.kind for j in mine)
        seconds = [j.seconds for j in mine if j.kind in _ANSWERS and j.seconds is not None]
        circles = [cycles(better) for (who, _), better in wins.items() if who == coder]
        yield AnnotatorSummary(
            *coder,
            ratings=kinds["rating"],
            pairs=kinds["pair"],
            rankings=kinds["ranking"],
            skips=kinds["skip"],
            flags=kinds["flag"],
            undos=sum(j.kind == "undo" and _coder(j) == coder for j in raw),
            median_seconds=statistics.median(seconds) if seconds else math.nan,
            hasty=sum(s < HASTY for s in seconds) / len(seconds) if seconds else math.nan,
            circles=sum(cyclic for cyclic, _ in circles),
            triples=sum(complete for _, complete in circles),
            contradictions=contradictions[coder],
            no_signal=no_signal[coder],
        )


def _contradictions(raw: list[Judgement]) -> Counter[Coder]:
    """Questions answered differently at different times. An answer taken back is a correction, and no contradiction."""
    undone = {j.value for j in raw if j.kind == "undo"}
    answers_of: dict[tuple[Any, ...], set[Hashable]] = defaultdict(set)
    for j in raw:
        if j.kind in _ANSWERS and j.id not in undone:
            answer: Hashable = j.value
            if j.kind == "pair":
                answer = _oriented(j)  # the same pair the other way round is the same question
            elif j.kind == "ranking":
                answer = tuple(frozenset(tier) for tier in j.value)
            answers_of[_coder(j), j.set_id, j.kind, j.scale, frozenset(j.outputs)].add(answer)
    return Counter(key[0] for key, answers in answers_of.items() if len(answers) > 1)


def _no_signal(effective: list[Judgement]) -> Counter[Coder]:
    """Sets in which all outputs are equally good. One rating alone does not show that."""
    rated: dict[tuple[Coder, str, str], list[float]] = defaultdict(list)
    counts: Counter[Coder] = Counter()
    for j in effective:
        if j.kind == "rating":
            rated[_coder(j), j.set_id, j.scale].append(j.value)
        elif j.kind == "ranking":
            counts[_coder(j)] += len(j.value) == 1 and len(j.outputs) > 1
    for (coder, _, _), values in rated.items():
        counts[coder] += len(values) > 1 and len(set(values)) == 1
    return counts


# -- between annotators ------------------------------------------------------------------------------------------------


def _agreements(effective: list[Judgement]) -> Iterable[Agreement]:
    """Among people, and where others judged too, among all."""
    people = [j for j in effective if j.source == "person"]
    groups = {"people": people} | ({"all": effective} if len(people) < len(effective) else {})
    for among, mine in groups.items():
        for (question, scale), units in _units(mine).items():
            common = [unit for unit in units.values() if len(unit) > 1]
            if not common or (among == "all" and all(source == "person" for unit in common for _, source in unit)):
                continue  # a second line of the same people would say nothing new
            if question == "pair":
                measure, value, used = _kappa(common)
            else:
                measure, value, used = "Krippendorff's alpha (ordinal)", ordinal_alpha(common), common
            words = in_words(value)
            if len(used) < FEWEST and not math.isnan(value):  # a few more items might turn it into another
                words = f"too few items to say, {FEWEST} are needed"
            names = dict.fromkeys(coder for unit in used for coder in unit)
            shown = [name if source == "person" else f"{name} ({source})" for name, source in names]
            yield Agreement(
                question, scale, among, measure, value, words, agreed(used), len(used),
                len(common) - len(used), tuple(sorted(shown)),
            )  # fmt: skip


def _kappa(common: list[dict[Coder, Any]]) -> tuple[str, float, list[dict[Coder, Any]]]:
    """Cohen's for two annotators, Fleiss' for more, over the items judged by the most usual number of them."""
    coders = sorted({coder for unit in common for coder in unit})
    if len(coders) == 2:
        both = Counter((unit[coders[0]], unit[coders[1]]) for unit in common)
        return "Cohen's kappa", cohen([[both[a, b] for b in _CATEGORIES] for a in _CATEGORIES]), common
    sizes = Counter(len(unit) for unit in common)
    size = max(sizes, key=lambda n: (sizes[n], n))
    used = [unit for unit in common if len(unit) == size]
    table = [[list(unit.values()).count(c) for c in _CATEGORIES] for unit in used]
    return "Fleiss' kappa", fleiss(table), used


def _position_bias(effective: list[Judgement]) -> Iterable[PositionBias]:
    shown: dict[str, Counter[str]] = defaultdict(Counter)
    for j in effective:
        if j.kind == "pair" and (choice := _choice(j)) in _SWAPPED:
            shown[j.source][choice] += 1
    for source, sides in sorted(shown.items()):
        share, p = share_of_first(sides["first"], sides.total())
        words = (
            "no bias to be seen" if p >= 0.05 else f"prefers what is shown {'first' if share.mean > 0.5 else 'second'}"
        )
        if sides.total() < FEWEST:
            words = f"too few to say, {FEWEST} are needed"
        yield PositionBias(source, sides.total(), sides["first"], share.mean, share.low, share.high, p, words)


# -- what to look at ---------------------------------------------------------------------------------------------------


def _look_again(effective: list[Judgement], wins: Mapping[Any, Any], sets: Mapping[str, OutputSet]) -> list[LookAgain]:
    """The most doubtful first: a flag and a circle weigh 1, disagreement up to 1."""
    weight: Counter[str] = Counter()
    reasons: dict[str, list[str]] = defaultdict(list)
    flags: dict[str, list[Judgement]] = defaultdict(list)
    for j in effective:
        if j.kind == "flag":
            flags[j.set_id].append(j)
    for name, mine in flags.items():
        comment = next((": " + short(j.comment) for j in mine if j.comment.strip()), "")
        reasons[name].append(f"flagged {len(mine)}x{comment}" if len(mine) > 1 else f"flagged{comment}")
        weight[name] += 1
    circles: Counter[str] = Counter()
    for (_, name), better in wins.items():
        circles[name] += cycles(better)[0]
    for name, triples in (+circles).items():
        reasons[name].append(count(triples, "intransitive triple"))
        weight[name] += 1
    disagreement = _disagreement(effective, sets)
    for name, share in disagreement.items():
        reasons[name].append(f"disagreement {share:.0%}")
    score = {name: weight[name] + disagreement.get(name, 0.0) for name in sets if name in reasons}
    worst = sorted(score, key=lambda name: -score[name])[:SHOWN]  # stable: of equals, the earlier set
    return [LookAgain(name, short(_prompt(sets[name])), tuple(reasons[name])) for name in worst]


def _disagreement(effective: list[Judgement], sets: Mapping[str, OutputSet]) -> dict[str, float]:
    """{set: 0 to 1}, of the question on which its annotators are furthest apart; without sets of full agreement."""
    largest: dict[str, float] = {}
    for (question, scale), units in _units(effective).items():
        of_set: dict[str, list[dict[Coder, Any]]] = defaultdict(list)
        for key, unit in units.items():
            of_set[key[0]].append(unit)  # type: ignore[index]
        for name, mine in of_set.items():
            if question == "pair":
                share = 1 - agreed(mine)
            else:
                low, high = SCALES[scale] if scale else (1, len(sets[name].outputs))
                share = spread(mine, high - low)
            if share > 0:  # False for NaN: nobody to disagree with
                largest[name] = max(share, largest.get(name, 0.0))
    return largest


def _prompt(of: OutputSet) -> str:
    """What the prompt asks: of a chat, its last message."""
    content = prompt_content(of.prompt)
    return content if isinstance(content, str) else str(content[-1].get("content", "")) if content else ""


# -- in words ----------------------------------------------------------------------------------------------------------


def _sentences(
    annotators: Sequence[AnnotatorSummary], agreements: Sequence[Agreement], bias: Sequence[PositionBias]
) -> Iterable[str]:
    if not annotators:
        yield "There are no judgements yet."
        return
    if len(annotators) == 1:
        yield f"There is one annotator, {short(annotators[0].annotator)}: agreement needs two who judge the same items."
    elif not agreements:
        yield f"{len(annotators)} annotators, but no item that two of them judged: their agreement cannot be known."
    for a in agreements:
        yield _agreement_sentence(a)
    for b in bias:
        yield (
            f"Of {count(b.decided, 'decided pair')} ({b.source}), the output shown first was preferred in "
            f"{b.share:.0%} (95% interval {b.low:.0%} to {b.high:.0%}): {b.words}"
            + (". This holds if the order was drawn at random." if b.p_value < 0.05 and b.decided >= FEWEST else ".")
        )
    yield from itertools.chain.from_iterable(map(_own_sentences, annotators))


def _agreement_sentence(a: Agreement) -> str:
    what = f"{a.question}s" + (f" on the scale {a.scale}" if a.scale else "")
    who = "people" if a.among == "people" else "all, programs included,"
    sentence = f"Agreement of {who} on {what}: "
    if math.isnan(a.value):
        sentence += f"{a.measure} is not defined, because only one answer was ever given"
    else:
        sentence += f"{a.measure} {a.value:.3f}, {a.words}"
    sentence += (
        f"; {count(a.items, 'common item')}, {len(a.annotators)} annotators, {a.same:.0%} of the answers the same."
    )
    if a.left_out:
        sentence += f" Left out: {count(a.left_out, 'common item')} judged by another number of annotators."
    return sentence + (" So few items may mislead." if FEWEST <= a.items < FEW else "")


def _own_sentences(a: AnnotatorSummary) -> Iterable[str]:
    name = short(a.annotator)
    if a.circles:
        triples = f"{a.circles} of {count(a.triples, 'triple')}"
        yield f"{name} judged {triples} in a circle: a better than b, b than c, c than a."
    if a.contradictions:
        questions = count(a.contradictions, "question")
        yield f"{name} answered {questions} differently at different times; the last answer holds."
    if a.no_signal:
        sets = count(a.no_signal, "set")
        yield f"{name} found all outputs equally good in {sets}: no preference can be read from that."
    if a.hasty >= 0.1:  # False for NaN
        yield f"{name} gave {a.hasty:.0%} of the answers in under two seconds."
