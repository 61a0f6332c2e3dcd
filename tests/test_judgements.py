"""Judgements are kept as they were said; conversions give what they imply and count what they leave out."""

import dataclasses
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossmith.errors import FeedbackError
from lossmith.feedback.convert import convert, effective_judgements, to_labels, to_pairs, to_rankings, to_ratings
from lossmith.feedback.judgement import SCALES, Judgement
from lossmith.feedback.output_set import OutputSet, named
from lossmith.prompts import Prompt

WHY = Prompt("Why?", {}, "x")
SET = OutputSet(WHY, tuple(named(WHY, text) for text in "abcd"))
A, B, C, D = (o.id for o in SET.outputs)
SETS = {SET.id: SET}


def said(kind, outputs, value, who="ann", **more):
    return Judgement(SET.id, kind, outputs, value, who, more.pop("question", kind), **more)


def pair(value, outputs=(A, B), who="ann", **more):
    return said("pair", outputs, value, who, **more)


def rating(value, output=A, who="ann", scale="1-5", **more):
    return said("rating", (output,), value, who, scale=scale, **more)


def ranking(*tiers, who="ann"):
    return said("ranking", (A, B, C, D), [list(t) for t in tiers], who)


def texts(made):
    return [(p.chosen.text, p.rejected.text) for p in made.preferences]


# -- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "j",
    [
        *(pair(v) for v in ("first", "second", "tie", "both_bad", 0.0, 0.3, 1.0)),
        *(rating(v) for v in (1, 5)),
        rating(3.5, source="scorer"),
        rating(0, scale="binary"),
        ranking([D], [A, B], [C]),
        said("skip", (A, B), None, question="pair"),
        said("flag", (A,), None, question="rating", comment="rude"),
        said("undo", (), "someid", question="pair"),
    ],
)
def test_what_makes_sense_passes_and_comes_back_from_json(j):
    assert j.check(SET) is j
    assert Judgement.from_row(json.loads(json.dumps(j.as_row()))) == j


@pytest.mark.parametrize(
    ("j", "message"),
    [
        (pair("third"), "first, second, tie, both_bad or a probability"),
        (pair(1.5), "probability"),
        (pair(float("nan")), "probability"),
        (pair("first", (A,)), "about 2 outputs, not 1"),
        (pair("first", (A, A)), "twice"),
        (pair("first", (A, "elsewhere")), "'elsewhere', which is not in the set"),
        (pair("first", who="  "), "annotator"),
        (rating(0), "1 to 5"),
        (rating(6), "1 to 5"),
        (rating(3.5), "3.5"),  # a person clicks a whole one
        (rating(True, scale="binary"), "True"),
        (rating(float("nan"), source="scorer"), "nan"),
        (rating(3, scale="1-7"), "scale '1-7'"),
        (ranking([A], [B]), "misses 2 of 4"),
        (ranking([A], [B], [C], [D, A]), "twice"),
        (ranking([A], [], [B, C, D]), "tiers"),
        (said("ranking", (A, B, C, D), "abcd"), "tiers"),
        (said("skip", (A,), "no", question="pair"), "no value"),
        (said("undo", (), None, question="pair"), "takes back"),
        (said("guess", (A,), None, question="pair"), "no judgement of kind 'guess'"),
        (dataclasses.replace(pair("first"), set_id="other"), "another one than was judged"),
    ],
)
def test_what_makes_no_sense_is_refused(j, message):
    with pytest.raises(FeedbackError, match=message):
        j.check(SET)


def test_rows_of_newer_and_broken_files():
    row = pair("first").as_row()
    with pytest.raises(FeedbackError, match=r"f:1: .*newer version.*Update"):
        Judgement.from_row(row | {"schema": 2}, "f:1")
    with pytest.raises(FeedbackError, match=r"no field 'valeu'.*'value'"):
        Judgement.from_row(row | {"valeu": 1})
    for field in ("set_id", "kind", "outputs", "value", "annotator", "question"):
        with pytest.raises(FeedbackError, match=f"'{field}' is missing"):
            Judgement.from_row({k: v for k, v in row.items() if k != field})


def test_every_judgement_has_an_id_of_its_own():
    assert len({pair("first").id for _ in range(100)}) == 100


# -- what still holds -------------------------------------------------------------------------------------------------


def test_a_later_answer_replaces_an_earlier_one_of_the_same_person_alone():
    first, other, again = pair("first"), pair("first", who="bo"), pair("second", (B, A))
    assert effective_judgements([first, other, again]) == [other, again]
    flag = said("flag", (A, B), None, question="pair")
    assert effective_judgements([first, flag]) == [first, flag]


def test_an_undo_brings_back_the_earlier_answer():
    first, again = pair("first"), pair("second")
    undo = said("undo", (), again.id, question="pair")
    assert effective_judgements([first, again, undo]) == [first]


# -- conversions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("first", [("a", "b", 1.0)]),
        ("second", [("b", "a", 1.0)]),
        (0.8, [("a", "b", 0.8)]),
        (0.25, [("b", "a", 0.75)]),
        ("tie", []),
        (0.5, []),
        ("both_bad", []),
    ],
)
def test_pairs(value, expected):
    made = to_pairs([pair(value)], SETS)
    assert [(p.chosen.text, p.rejected.text, p.probability) for p in made.preferences] == expected
    assert sum(made.left_out.values()) == (not expected)


def test_a_ranking_gives_the_pairs_across_its_tiers_which_weigh_as_one():
    made = to_pairs([ranking([D], [A, B], [C])], SETS)
    assert sorted(texts(made)) == [("a", "c"), ("b", "c"), ("d", "a"), ("d", "b"), ("d", "c")]
    assert sum(p.weight for p in made.preferences) == pytest.approx(1) and made.left_out == {"ties": 1}


def test_ratings_give_pairs_with_margins_in_parts_of_the_scale():
    made = to_pairs([rating(2, A), rating(5, B), rating(5, C), rating(4, D, "bo")], SETS)
    assert texts(made) == [("b", "a"), ("c", "a")] and [p.margin for p in made.preferences] == [0.75, 0.75]
    assert made.left_out == {"ties": 1, "ratings with no other of the same set and annotator": 1}


def test_two_people_who_disagree_are_two_pairs():
    assert texts(to_pairs([pair("first"), pair("second", who="bo")], SETS)) == [("a", "b"), ("b", "a")]


def test_rankings_of_each_kind():
    made = to_rankings(
        [ranking([D], [A, B], [C]), pair("second", who="bo"), rating(1, A, "cy"), rating(3, C, "cy")], SETS
    )
    assert [[[o.text for o in t] for t in p.tiers] for p in made.preferences] == [
        [["d"], ["a", "b"], ["c"]],
        [["b"], ["a"]],
        [["c"], ["a"]],
    ]
    assert to_rankings([ranking([A, B, C, D])], SETS).left_out == {"rankings in which all are equal": 1}


def test_labels_are_the_halves_of_the_scale_and_both_bad():
    made = to_labels([rating(1, A), rating(3, B), rating(4, C), pair("both_bad", (B, D)), pair("tie")], SETS)
    assert [(p.output.text, p.good) for p in made.preferences] == [
        ("a", False),
        ("c", True),
        ("b", False),
        ("d", False),
    ]
    assert made.left_out == {"ratings in the middle of the scale": 1, "ties": 1}


def test_an_unknown_form_names_the_known_ones():
    with pytest.raises(FeedbackError, match=r"'pair'.*'pairs'"):
        convert("pair", [], SETS)


# -- properties -------------------------------------------------------------------------------------------------------

levels = st.lists(st.integers(1, 5), min_size=4, max_size=4)
values = st.sampled_from(["first", "second", "tie", "both_bad"]) | st.floats(0, 1)


def tiers_of(numbers):
    return [
        [n for n, x in zip((A, B, C, D), numbers, strict=True) if x == level] for level in sorted(set(numbers))[::-1]
    ]


@settings(deadline=None)
@given(levels)
def test_ratings_and_the_ranking_they_make_prefer_the_same(numbers):
    rated = to_pairs([rating(x, n) for x, n in zip(numbers, (A, B, C, D), strict=True)], SETS)
    ranked = to_pairs([ranking(*tiers_of(numbers))], SETS)
    expected = {(x, y) for (x, p), (y, q) in itertools.permutations(zip("abcd", numbers, strict=True), 2) if p > q}
    assert set(texts(rated)) == set(texts(ranked)) == expected
    assert len(expected) + ranked.left_out.get("ties", 0) == 6


@settings(deadline=None)
@given(values, st.booleans())
def test_it_does_not_matter_which_was_shown_first(value, ties):
    turned = {"first": "second", "second": "first"}.get(value, value) if isinstance(value, str) else 1 - value
    one = to_pairs([pair(value)], SETS, ties=ties).preferences
    other = to_pairs([pair(turned, (B, A))], SETS, ties=ties).preferences
    if 0.5 not in (value, turned) and value != "tie":  # of a tie either may stand first; 1 - value may round to one
        assert [p.chosen for p in one] == [p.chosen for p in other]
        assert [p.probability for p in one] == pytest.approx([p.probability for p in other])
    assert all(0.5 <= p.probability <= 1 for p in one + other)


@settings(deadline=None)
@given(levels, st.permutations(range(4)))
def test_the_order_of_rating_changes_nothing(numbers, order):
    all_of = [rating(x, n) for x, n in zip(numbers, (A, B, C, D), strict=True)]
    assert to_pairs(all_of, SETS).preferences == to_pairs([all_of[k] for k in order], SETS).preferences


@settings(deadline=None)
@given(st.lists(values, max_size=6), st.sampled_from(["rankings", "ratings", "labels"]))
def test_every_judgement_is_used_or_counted(given_values, form):
    held = [pair(v, who=f"p{k}") for k, v in enumerate(given_values)]
    made = convert(form, held, SETS)
    used = len({p.annotator for p in made.preferences})
    assert used + sum(made.left_out.values()) == len(held)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ann", "bo"]), st.sampled_from([A, B]), st.integers(1, 5)), max_size=12))
def test_the_last_rating_is_the_one_that_holds(clicks):
    last = {(who, output): value for who, output, value in clicks}
    made = to_ratings([rating(v, o, who) for who, o, v in clicks], SETS)
    assert {(p.annotator, p.output.id): p.rating for p in made.preferences} == last and len(made.preferences) == len(
        last
    )


@settings(deadline=None)
@given(st.sampled_from(sorted(SCALES)), st.data())
def test_a_thumb_is_up_exactly_above_the_middle(scale, data):
    low, high = SCALES[scale]
    value = data.draw(st.integers(low, high))
    labels = [p.good for p in to_labels([rating(value, scale=scale)], SETS).preferences]
    assert labels == ([] if 2 * value == low + high else [2 * value > low + high])
