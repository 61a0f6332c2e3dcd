"""Agreement: published and hand-computed numbers, and what the report says of data that hold none."""

import json
import math
import random

import pytest
from rich.console import Console

from lossmith.errors import FeedbackError
from lossmith.feedback.agreement import agreement_report
from lossmith.feedback.agreement_measures import agreed, cohen, cycles, fleiss, in_words, ordinal_alpha, share_of_first
from lossmith.feedback.judgement import Judgement
from lossmith.feedback.output_set import OutputSet, named
from lossmith.prompts import Prompt

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, twelve units.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
# The worked example of Fleiss' kappa on Wikipedia: ten subjects, fourteen raters, five categories.
FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def made(prompt="Why is the sky blue?", n=3):
    prompt = Prompt(prompt)
    return OutputSet(prompt, tuple(named(prompt, f"answer {k}", None, {}) for k in range(n)))


def many(count, n=2):
    return {s.id: s for s in (made(f"question {k}", n) for k in range(count))}


def said(of, kind, outputs, value, who="ada", **more):
    """A judgement of the outputs with these numbers, as far as it may be one."""
    names = tuple(of.outputs[k].id for k in outputs)
    question = kind if kind in ("rating", "pair", "ranking") else "pair"
    scale = "1-5" if kind == "rating" else ""
    j = Judgement(of.id, kind, names, value, who, more.pop("question", question), **{"scale": scale, **more})
    return j.check(of)


def ranked(of, tiers, who="ada", **more):
    names = [[of.outputs[k].id for k in tier] for tier in tiers]
    return said(of, "ranking", range(len(of.outputs)), names, who, **more)


def report(judgements, *sets):
    found = agreement_report(judgements, {s.id: s for s in sets})
    json.dumps(found.as_dict(), allow_nan=False)
    Console(quiet=True).print(found.render())
    return found


# -- the measures ------------------------------------------------------------------------------------------------------


def test_alpha_is_the_published_one():
    units = [{k: v for k, v in enumerate(column) if v is not None} for column in zip(*OBSERVERS, strict=True)]
    assert round(ordinal_alpha(units), 3) == 0.815


def test_an_ordinal_alpha_reads_the_order_alone():
    units = [{k: v for k, v in enumerate(column) if v is not None} for column in zip(*OBSERVERS, strict=True)]
    stretched = [{k: 10.0**v for k, v in unit.items()} for unit in units]
    assert ordinal_alpha(stretched) == pytest.approx(ordinal_alpha(units))


def test_alpha_of_many_fractions_is_close_to_that_of_their_steps():
    draw = random.Random(1)
    units = [{"a": (x := draw.random()), "b": min(1.0, max(0.0, x + draw.gauss(0, 0.1)))} for _ in range(400)]
    rounded = [{who: round(x * 30) for who, x in unit.items()} for unit in units]
    stretched = [{who: x**5 for who, x in unit.items()} for unit in units]
    assert ordinal_alpha(units) == pytest.approx(ordinal_alpha(rounded), abs=0.01)
    assert ordinal_alpha(units) == ordinal_alpha(stretched)


def test_kappas_are_the_published_ones():
    assert round(fleiss(FLEISS), 3) == 0.210
    assert cohen([[20, 5], [10, 15]]) == pytest.approx(0.4)
    assert cohen([[0, 0], [5, 5]]) == 0.0 and in_words(cohen([[0, 0], [5, 5]])) == "slight"
    assert cohen([[0, 5], [5, 0]]) == -1.0


def test_what_is_not_defined_is_nan_without_a_warning():
    assert math.isnan(cohen([[7, 0], [0, 0]])) and math.isnan(cohen([[0, 0], [0, 0]]))
    assert math.isnan(fleiss([[3, 0], [3, 0]])) and math.isnan(fleiss([])) and math.isnan(fleiss([[1, 0], [0, 1]]))
    assert math.isnan(ordinal_alpha([])) and math.isnan(ordinal_alpha([{"a": 1.0, "b": 1.0}]))
    assert math.isnan(ordinal_alpha([{"a": 1.0}, {"b": 2.0}])) and math.isnan(agreed([{"a": 1}]))
    none, p = share_of_first(0, 0)
    assert all(map(math.isnan, (none.mean, none.low, none.high, p)))


def test_the_interval_of_what_is_shown_first_is_exact():
    share, p = share_of_first(8, 10)
    assert share.mean == 0.8 and (round(share.low, 3), round(share.high, 3)) == (0.444, 0.975)
    assert p == pytest.approx(2 * (45 + 10 + 1) / 1024)  # the upper tail of ten fair coins, twice


def test_circles_are_counted_among_triples_that_are_decided():
    assert cycles([("a", "b"), ("b", "c"), ("c", "a")]) == cycles([("b", "a"), ("c", "b"), ("a", "c")]) == (1, 1)
    assert cycles([("a", "b"), ("b", "c"), ("a", "c")]) == (0, 1)
    assert cycles([("a", "b"), ("b", "c")]) == (0, 0)


@pytest.mark.parametrize(
    ("value", "word"),
    [(-0.01, "worse than chance"), (0.0, "slight"), (0.2, "fair"), (0.4, "moderate"), (0.6, "substantial"),
     (0.8, "almost perfect"), (1.0, "almost perfect"), (math.nan, "not defined")],
)  # fmt: skip
def test_every_number_has_its_word(value, word):
    assert in_words(value) == word


# -- the report --------------------------------------------------------------------------------------------------------


def test_ratings_of_the_published_example_through_the_report():
    of = made(n=12)
    judgements = [
        said(of, "rating", [unit], value, f"observer {k}")
        for k, row in enumerate(OBSERVERS)
        for unit, value in enumerate(row)
        if value is not None
    ]
    (found,) = report(judgements, of).agreement
    assert (found.question, found.scale, found.among, found.items) == ("rating", "1-5", "people", 11)
    assert round(found.value, 3) == 0.815 and found.words == "almost perfect" and len(found.annotators) == 4


def test_scales_are_never_mixed():
    of = made()
    judgements = [said(of, "rating", [k], v, who) for who in ("ada", "bob") for k, v in enumerate([1, 3, 5])]
    judgements += [said(of, "rating", [0], 10, "cyd", scale="1-10")]
    (found,) = report(judgements, of).agreement
    assert found.scale == "1-5" and found.annotators == ("ada", "bob") and found.value == 1.0


def test_two_annotators_of_pairs_are_cohens_whatever_the_order_shown():
    sets = many(50)
    cells = ["ff"] * 20 + ["fs"] * 5 + ["sf"] * 10 + ["ss"] * 15
    judgements = []
    for k, (of, cell) in enumerate(zip(sets.values(), cells, strict=True)):
        for who, choice in zip(("ada", "bob"), cell, strict=True):
            swap = (k + (who == "bob")) % 2  # each sees every second pair the other way round
            ids = sorted(range(2), key=lambda i, of=of: of.outputs[i].id)
            value = "first" if (choice == "f") != bool(swap) else "second"
            judgements.append(said(of, "pair", ids[::-1] if swap else ids, value, who))
    (found,) = report(judgements, *sets.values()).agreement
    assert found.measure == "Cohen's kappa" and found.value == pytest.approx(0.4) and found.words == "moderate"
    assert found.items == 50 and found.same == 0.7


def test_three_annotators_of_pairs_are_fleiss_over_items_of_one_number():
    sets = list(many(5).values())
    answers = ["fff", "ffs", "sss", "tbb"]
    value = {"f": "first", "s": "second", "t": "tie", "b": "both_bad"}
    judgements = [
        said(of, "pair", sorted(range(2), key=lambda i, of=of: of.outputs[i].id), value[c], who)
        for of, row in zip(sets, [*answers, "ff"], strict=True)
        for who, c in zip(("ada", "bob", "cyd"), row, strict=False)
    ]
    (found,) = report(judgements, *sets).agreement
    # By hand: P = (1 + 1/3 + 1 + 1/3) / 4 = 2/3; shares 5/12, 4/12, 1/12, 2/12, so Pe = 46/144.
    assert found.measure == "Fleiss' kappa" and found.value == pytest.approx((2 / 3 - 46 / 144) / (1 - 46 / 144))
    assert (found.items, found.left_out) == (4, 1)
    assert "Left out: 1 common item judged by another number" in report(judgements, *sets).text()


def test_probabilities_are_the_side_they_are_on():
    sets = list(many(3).values())
    judgements = []
    for of, soft, hard in zip(sets, [0.9, 0.5, 0.1], ["first", "tie", "second"], strict=True):
        judgements += [said(of, "pair", [0, 1], soft, "rm", source="model"), said(of, "pair", [0, 1], hard)]
    found = report(judgements, *sets)
    assert [(a.among, a.same) for a in found.agreement] == [("all", 1.0)]
    assert found.agreement[0].annotators == ("ada", "rm (model)")
    assert [(b.source, b.decided) for b in found.position_bias] == [("model", 2), ("person", 2)]


def test_rankings_with_ties_agree_by_rank():
    of = made(n=4)
    same = report([ranked(of, [[0], [1, 2], [3]], w) for w in ("ada", "bob")], of).agreement[0]
    other = report([ranked(of, [[0], [1], [2], [3]]), ranked(of, [[3], [2], [1], [0]], "bob")], of).agreement[0]
    assert same.question == "ranking" and same.value == 1.0 and other.value < 0
    assert in_words(other.value) == "worse than chance"
    assert same.words == other.words == "too few items to say, 10 are needed"  # four outputs bear no word


def test_one_name_as_a_person_and_as_a_program_is_two():
    of = made()
    found = report([said(of, "pair", [0, 1], "first", source=s) for s in ("person", "model")], of)
    assert [(a.annotator, a.source) for a in found.annotators] == [("ada", "person"), ("ada", "model")]


def test_each_annotator_is_summed_up():
    of = made()
    first = said(of, "pair", [0, 1], "first", seconds=1.0)
    judgements = [
        first,
        Judgement(of.id, "undo", (), first.id, "ada", "pair"),
        said(of, "pair", [0, 1], "second", seconds=1.5),
        said(of, "pair", [1, 2], "first", seconds=4.5),
        said(of, "skip", [0, 2], None, seconds=0.5),
        said(of, "flag", [0, 2], None, comment="empty"),
        said(of, "rating", [0], 3),
        said(of, "rating", [1], 3),
        said(of, "pair", [0, 1], "first", "bob"),
    ]
    ada, bob = report(judgements, of).annotators
    assert (ada.pairs, ada.ratings, ada.rankings, ada.skips, ada.flags, ada.undos) == (2, 2, 0, 1, 1, 1)
    assert ada.median_seconds == 3.0 and ada.hasty == 0.5 and ada.no_signal == 1
    assert ada.contradictions == 0, "an answer taken back is a correction"
    assert math.isnan(bob.median_seconds) and report(judgements, of).as_dict()["annotators"][1]["hasty"] is None


def test_a_click_sent_twice_counts_once():
    of = made()
    flag = said(of, "flag", [0, 1], None)
    undo = Judgement(of.id, "undo", (), "something", "ada", "pair")
    (ada,) = report([flag, flag, undo, undo], of).annotators
    assert (ada.flags, ada.undos) == (1, 1)


def test_contradictions_are_other_answers_to_the_same_question():
    of = made()
    turned = [said(of, "pair", [0, 1], "first"), said(of, "pair", [1, 0], "second")]
    assert report(turned, of).annotators[0].contradictions == 0, "the same answer the other way round"
    changed = [said(of, "pair", [0, 1], "first"), said(of, "pair", [1, 0], "first")]
    assert report(changed, of).annotators[0].contradictions == 1
    assert report([ranked(of, [[0, 1], [2]]), ranked(of, [[1, 0], [2]])], of).annotators[0].contradictions == 0
    assert report([ranked(of, [[0], [1], [2]]), ranked(of, [[1], [0], [2]])], of).annotators[0].contradictions == 1
    assert report([said(of, "rating", [0], 2), said(of, "rating", [0], 4)], of).annotators[0].contradictions == 1


def test_a_circle_is_found_and_its_set_listed():
    of = made("Tell me " + "a very long story " * 9)
    judgements = [said(of, "pair", two, "first") for two in ([0, 1], [1, 2], [2, 0])]
    found = report(judgements, of)
    assert (found.annotators[0].circles, found.annotators[0].triples) == (1, 1)
    (item,) = found.look_again
    assert item.reasons == ("1 intransitive triple",) and len(item.prompt) == 60 and item.prompt.endswith("…")
    assert "1 of 1 triple in a circle" in found.text()


def test_circles_are_of_one_annotator_and_not_of_two():
    of = made()
    judgements = [said(of, "pair", [0, 1], "first"), said(of, "pair", [1, 2], "first")]
    judgements += [said(of, "pair", [2, 0], "first", "bob")]
    assert [a.circles for a in report(judgements, of).annotators] == [0, 0]


def test_rankings_of_one_tier_say_nothing():
    of = made()
    found = report([ranked(of, [[0, 1, 2]])], of)
    assert found.annotators[0].no_signal == 1 and "equally good in 1 set:" in found.text()


@pytest.mark.parametrize(("lean", "words"), [(0.5, "no bias to be seen"), (0.75, "prefers what is shown first")])
def test_position_bias_is_seen_where_it_is(lean, words):
    draw, sets = random.Random(4), many(300)
    judgements = []
    for of in sets.values():
        value = "first" if draw.random() < lean else "second"
        judgements.append(said(of, "pair", draw.sample([0, 1], 2), value))
    judgements += [said(of, "pair", [0, 1], "tie", "bob") for of in sets.values()]  # decides nothing
    (found,) = report(judgements, *sets.values()).position_bias
    assert found.words == words and found.decided == 300 and found.low < lean < found.high


def test_the_most_doubtful_sets_come_first_and_ten_at_most():
    sets = list(many(14).values())
    judgements = [said(of, "pair", [0, 1], "first") for of in sets]
    judgements += [said(of, "pair", [0, 1], "second", "bob") for of in sets[:13]]
    judgements += [said(sets[12], "flag", [0, 1], None, comment="the prompt\nis cut")]
    again = report(judgements, *sets).look_again
    assert len(again) == 10 and again[0].set_id == sets[12].id
    assert again[0].reasons == ("flagged: the prompt is cut", "disagreement 100%")
    assert sets[13].id not in {item.set_id for item in again}


def test_a_chat_is_named_by_its_last_message():
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "\x1b[31mHello [bold]there"}]
    of = made(chat)
    found = report([said(of, "flag", [0], None)], of)
    assert found.look_again[0].prompt == " [31mHello [bold]there"
    assert "[bold]there" in found.text() and "\x1b" not in found.text()


def test_everybody_saying_one_thing_is_perfect_and_undefined():
    sets = list(many(4).values())
    judgements = [said(of, "rating", [k], 3, who) for of in sets for k in (0, 1) for who in ("ada", "bob")]
    judgements += [said(of, "pair", [0, 1], "tie", who) for of in sets for who in ("ada", "bob", "cyd")]
    found = report(judgements, *sets)
    assert all(math.isnan(a.value) and a.same == 1.0 for a in found.agreement) and len(found.agreement) == 2
    assert all(a["value"] is None for a in found.as_dict()["agreement"])
    assert "only one answer was ever given" in " ".join(found.sentences)


def test_one_annotator_is_told_that_agreement_needs_two():
    of = made()
    found = report([said(of, "pair", [0, 1], "first")], of)
    assert found.agreement == () and found.sentences[0].endswith("agreement needs two who judge the same items.")


def test_two_without_a_common_item_are_told_so():
    one, two = many(2).values()
    found = report([said(one, "pair", [0, 1], "first"), said(two, "pair", [0, 1], "first", "bob")], one, two)
    assert found.agreement == () and "no item that two of them judged" in found.text()


def test_nothing_at_all():
    found = report([])
    assert found.sentences == ("There are no judgements yet.",) and found.text() == "There are no judgements yet.\n"
    of = made()
    undo = report([Judgement(of.id, "undo", (), "something", "ada", "pair")], of)
    assert undo.annotators[0].undos == 1


def test_a_judgement_of_another_set_is_an_error():
    of = made()
    with pytest.raises(FeedbackError, match="not among the sets"):
        agreement_report([said(of, "pair", [0, 1], "first")], {})


def test_the_whole_fits_a_terminal():
    sets = list(many(3, n=3).values())
    judgements = [
        said(of, "pair", two, draw, who, seconds=1.0)
        for of, draw in zip(sets, ("first", "second", "tie"), strict=True)
        for two in ([0, 1], [1, 2], [0, 2])
        for who in ("ada", "bob")
    ]
    text = report(judgements, *sets).text(80)
    assert max(map(len, text.splitlines())) <= 80 and "annotator" in text
    assert "Cohen's kappa" in text and "too few items to say" in " ".join(text.split()) and "almost perfect" not in text
