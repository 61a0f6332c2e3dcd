"""Output sets: different outputs, named by what they hold, read back as they were written."""

import dataclasses
import datetime
import json

import pytest

import tiny
from lossmith.errors import FeedbackError
from lossmith.feedback.distinct import likeness, sample_sets, split_duplicates
from lossmith.feedback.output_set import OutputSet, named, read_sets, write_sets
from lossmith.policy import SamplingSettings, sample
from lossmith.prompts import load_prompts


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("Water rises as vapour.", "water rises, as VAPOUR", 1.0),
        ("one two three four", "one two three five", 1 / 3),  # triples 123, 234 and 123, 235
        ("yes", "no", 0.0),
        ("", "", 1.0),
        ("!!", "??", 0.0),
    ],
)
def test_likeness_is_the_share_of_common_triples(first, second, expected):
    assert likeness(first, second) == likeness(second, first) == pytest.approx(expected)


def test_the_first_of_each_kind_is_kept():
    rows = [
        dataclasses.replace(r, completion=t)
        for r, t in zip(tiny.rollouts()[:3], ["a b c d", "A b c d!", "x"], strict=True)
    ]
    kept, repeats = split_duplicates(rows)
    assert [r.completion for r in kept] == ["a b c d", "x"] and [r.completion for r in repeats] == ["A b c d!"]


def sets(n=4, **settings):
    policy = tiny.loaded()
    return sample_sets(
        policy, tiny.prompts(), n, SamplingSettings(**{"max_tokens": 8, **settings}), model="tiny", seed=3
    )


def test_sets_hold_n_different_outputs_with_what_is_needed_to_make_them_again():
    for made in sets():
        assert len({o.text for o in made.outputs}) == 4
        assert made.provenance["temperature"] == 1.0 and len(made.provenance["policy_checksum"]) == 16
        for o in made.outputs:
            step, k = divmod(o.sample, 4)
            again = sample(tiny.loaded(), [made.prompt], 4, SamplingSettings(max_tokens=8), seed=3, step=step)[k]
            assert again.completion_ids == o.tokens


def test_near_duplicates_are_drawn_again_and_exact_ones_are_left_out():
    # With one likely token, one-token outputs repeat: only a few different texts exist.
    cold = sets(n=6, max_tokens=1, temperature=0.2)
    assert all(len({o.text for o in made.outputs}) == len(made.outputs) for made in cold)
    assert any(len(made.outputs) < 6 for made in cold)
    assert any(o.sample >= 6 for made in cold for o in made.outputs), "nothing was drawn again"


def test_a_sets_file_comes_back_as_it_was(tmp_path):
    made = sets()
    write_sets(tmp_path / "s.jsonl", made)
    back = read_sets(tmp_path / "s.jsonl")
    assert back == made and [s.id for s in back] == [s.id for s in made]


def test_written_by_hand(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"prompt": "Why?", "outputs": ["Because.", "No reason."]}\n')
    (made,) = read_sets(tmp_path / "s.jsonl")
    assert [o.text for o in made.outputs] == ["Because.", "No reason."] and made.outputs[0].tokens is None


def test_an_edited_output_is_no_longer_the_one_that_was_judged(tmp_path):
    write_sets(tmp_path / "s.jsonl", sets()[:1])
    row = json.loads((tmp_path / "s.jsonl").read_text())
    row["outputs"][1]["completion"] += "!"
    (tmp_path / "s.jsonl").write_text(json.dumps(row))
    with pytest.raises(FeedbackError, match=r"s.jsonl:1: output 2: its text.*changed after it was written"):
        read_sets(tmp_path / "s.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"s.jsonl:1: not JSON"),
        ('{"prompt": "a", "completion": "b"}', "one completion, not a set"),
        ('{"prompt": " ", "outputs": ["b"]}', "is blank"),
        ('{"prompt": "a", "outputs": ["b", "b"]}', "two outputs are the same"),
        ('{"prompt": "a", "outputs": [3]}', "output 1: an output is text"),
        ('{"prompt": "a", "outputs": [{"completion": "b", "tokens": ["x"]}]}', "list of token ids"),
        (
            '{"prompt": "a", "outputs": [{"completion": "b", "tokens": [1], "behavior_logp": []}]}',
            "one number for each",
        ),
        ("", "holds no output set"),
    ],
)
def test_bad_sets_files(tmp_path, line, message):
    (tmp_path / "s.jsonl").write_text(line)
    with pytest.raises(FeedbackError, match=message):
        read_sets(tmp_path / "s.jsonl")


def test_the_same_text_for_another_prompt_is_another_output():
    first, second = tiny.prompts("a", "b")
    assert named(first, "x").id != named(second, "x").id
    assert OutputSet(first, (named(first, "x"),)).id != OutputSet(first, (named(first, "y"),)).id


def test_columns_are_written_down_and_are_no_part_of_a_name(tmp_path):
    """An annotator is shown prompt and outputs; sets that were written before ids knew of columns keep their names."""
    policy = tiny.loaded()
    (plain,) = tiny.prompts("Why?")
    (dated,) = load_prompts([{"prompt": "Why?", "day": datetime.date(2024, 2, 29), "raw": b"ab"}])
    settings = SamplingSettings(max_tokens=6)
    first, second = (sample_sets(policy, [p], 2, settings, model="m", seed=0)[0] for p in (plain, dated))
    assert first.id == second.id and first.prompt.id != second.prompt.id
    write_sets(tmp_path / "s.jsonl", [second])
    (again,) = read_sets(tmp_path / "s.jsonl")
    assert again.id == second.id and dict(again.prompt.columns) == {"day": "2024-02-29", "raw": "YWI="}
