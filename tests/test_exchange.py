"""Judgements of other programs come in, ours go out, and nothing is guessed or lost on the way."""

import csv
import json
import random
import sys
import types

import pytest

from lossmith.cli.annotate import annotate
from lossmith.errors import FeedbackError
from lossmith.feedback.exchange import export_file, import_file
from lossmith.feedback.exchange.foreign import pick
from lossmith.feedback.gather import gather
from lossmith.feedback.judgement import Judgement
from lossmith.feedback.output_set import OutputSet, named
from lossmith.feedback.store import Store
from lossmith.prompts import Prompt
from shell import lossmith


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "j.db") as made:
        yield made


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def pairs(store, tmp_path, **options):
    """(prompt, chosen, rejected, probability) of what the store gives a loss."""
    out = tmp_path / f"out{random.random()}.jsonl"
    export_file(store, out, **options)
    return [(p.prompt.content, p.chosen.text, p.rejected.text, p.probability) for p in gather(out).preferences]


USER = [{"role": "user", "content": "Why?"}]
BECAUSE = [{"role": "assistant", "content": "Because."}]
NO = [{"role": "assistant", "content": "No."}]
SHAREGPT = {
    "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}],
    "chosen": {"from": "gpt", "value": "Because."},
    "rejected": {"from": "gpt", "value": "No."},
}
BRIEF = ({"role": "system", "content": "Be brief."}, *USER)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, "Why?"),
        ({"prompt": USER, "chosen": BECAUSE, "rejected": NO}, tuple(USER)),
        ({"chosen": USER + BECAUSE, "rejected": USER + NO}, tuple(USER)),  # the prompt is in both
        (SHAREGPT, BRIEF),
        (SHAREGPT | {"conversations": SHAREGPT["conversations"][1:], "system": "Be brief."}, BRIEF),
        ({"prompt": "Why?", "ranking": ["Because.", "No."]}, "Why?"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_preference_in_each_layout_is_the_same_preference(store, tmp_path, row, prompt, suffix):
    said = import_file(store, write(tmp_path / f"in{suffix}", [row]))
    assert "imported: 1" in said and "duplicates: 0" in said
    assert pairs(store, tmp_path) == [(prompt, "Because.", "No.", 1.0)]
    (j,) = store.judgements()
    assert j.source == "import" and j.annotator == "import"


def test_the_same_from_a_table(store, tmp_path):
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "chosen", "rejected", "annotator"])
        table.writerow(["Why,\nthough?", '[1] "because"', "[{", "ann"])  # a text that begins with a bracket is a text
        table.writerow([json.dumps(USER), json.dumps(BECAUSE), json.dumps(NO), ""])
    import_file(store, tmp_path / "in.csv", annotator="bo")
    assert [j.annotator for j in store.judgements()] == ["ann", "bo"]
    assert pairs(store, tmp_path) == [
        ("Why,\nthough?", '[1] "because"', "[{", 1.0),
        (tuple(USER), "Because.", "No.", 1.0),
    ]


def test_a_probability_stays_what_it_was_whichever_way_round_it_is_kept(store, tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b", "probability": 0.75} for i in range(12)]
    import_file(store, write(tmp_path / "in.jsonl", rows))
    assert {j.value for j in store.judgements()} == {0.75, 0.25}, "the preferred text always stands at the same place"
    assert pairs(store, tmp_path) == [(f"{i}?", "a", "b", 0.75) for i in range(12)]


def test_a_tie_is_a_tie(store, tmp_path):
    row = {"prompt": "Why?", "chosen": "a", "rejected": "b", "probability": 0.5}
    assert "no signal: 1 ties" in import_file(store, write(tmp_path / "in.jsonl", [row]))
    assert store.judgements()[0].value == "tie"
    with pytest.raises(FeedbackError, match=r"no signal: 1 judgements give no pairs \(1 ties\)"):
        export_file(store, tmp_path / "out.jsonl")
    assert pairs(store, tmp_path, ties=True)[0][3] == 0.5


def test_ratings_of_one_prompt_are_held_against_each_other(store, tmp_path):
    rows = [{"prompt": "Why?", "completion": text, "rating": n} for text, n in [("a", 2), ("b", 5), ("c", 4.5)]]
    import_file(store, write(tmp_path / "in.jsonl", rows))
    found = {(chosen, rejected) for _, chosen, rejected, _ in pairs(store, tmp_path)}
    assert found == {("b", "a"), ("b", "c"), ("c", "a")}


@pytest.mark.parametrize(("low", "high", "scale"), [(1, 5, "1-5"), (1, 10, "1-10"), (0, 1, "binary")])
def test_the_scale_comes_from_its_ends(store, tmp_path, low, high, scale):
    row = {"prompt": "Why?", "completion": "a", "rating": 1, "low": low, "high": high}
    import_file(store, write(tmp_path / "in.jsonl", [row]))
    assert store.judgements()[0].scale == scale


def test_another_scale_is_refused_not_stretched(store, tmp_path):
    row = {"prompt": "Why?", "completion": "a", "rating": 3, "low": 1, "high": 7}
    with pytest.raises(FeedbackError, match=r"in.jsonl:1: low = 1 and high = 7 is no scale .* 1-5, 1-10, 0-1"):
        import_file(store, write(tmp_path / "in.jsonl", [row]))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER, "completion": BECAUSE, "label": False},
        {"messages": USER + BECAUSE, "label": False},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}], "label": False},
    ],
)
def test_thumbs(store, tmp_path, row):
    import_file(store, write(tmp_path / "in.json", [row]))
    export_file(store, tmp_path / "out.jsonl", form="labels")
    (label,) = gather(tmp_path / "out.jsonl").preferences
    assert (label.prompt.content, label.output.text, label.good) == (tuple(USER), "Because.", False)


# -- bad rows ---------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "Why?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Why?", "chosen": "a"}, "chosen"),
        ({"prompt": "Why?", "chosen": "a", "rejected": "a"}, "same text"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "Why?", "chosen": "a", "rejected": "b", "probability": 0.2}, "probability"),
        ({"prompt": "Why?", "completion": "a", "rating": 6}, "rating"),
        ({"prompt": "Why?", "completion": "a", "label": "perhaps"}, "label"),
        ({"prompt": "Why?", "ranking": ["a"]}, "ranking"),
        (SHAREGPT | {"chosen": {"from": "observation", "value": "x"}}, "chosen"),
        (SHAREGPT | {"chosen": {"from": "human", "value": "x"}}, "chosen must be the assistant's"),
        ({"messages": USER, "label": True}, "messages"),
        ({"messages": [], "label": True}, "messages"),
        ([1], "object"),
        ({"prompt": "Why?", "chosen": "a", "rejected": "\ud800"}, "surrogate"),
        ({"messages": [{"role": ["user"], "content": "Why?"}], "label": True}, "messages"),
    ],
)
def test_one_bad_row_keeps_the_file_out_and_says_where(store, tmp_path, row, message):
    path = write(tmp_path / "in.jsonl", [GOOD, row])
    with pytest.raises(FeedbackError, match=rf"nothing was taken(.|\n)*in\.jsonl:2: .*{message}"):
        import_file(store, path)
    assert not store.judgements() and not store.sets()
    said = import_file(store, path, skip_bad=True)
    assert "imported: 1" in said and "left out: 1 rows" in said and "in.jsonl:2" in said


def test_only_the_first_three_bad_rows_are_shown(store, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + "{oops\n" * 9)
    said = import_file(store, path, skip_bad=True)
    assert said.count("not JSON") == 3 and "... and 6 more" in said and "left out: 9 rows" in said


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("in.txt", "Why?", "are read from"),
        ("in.jsonl", "", "is empty"),
        ("in.json", "[]", "holds no judgement"),
        ("in.json", "{", "not JSON"),
        ("in.jsonl", b"\xff\xfe", "not UTF-8"),
        ("in.csv", "prompt,chosen\n", "header"),
    ],
)
def test_files_that_cannot_be_read(store, tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FeedbackError, match=message):
        import_file(store, tmp_path / name)
    with pytest.raises(FeedbackError, match="there is no preferences file"):
        import_file(store, tmp_path / "absent.jsonl")
    with pytest.raises(FeedbackError, match=r"no format 'argila'.*argilla"):
        import_file(store, tmp_path / name, format="argila")


# -- the account ------------------------------------------------------------------------------------------------------


def test_the_account_counts_what_is_planted(store, tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b", "annotator": "ann"} for i in range(10)]
    rows += rows[:2]  # two again
    rows += [
        {"prompt": f"{i}?", "chosen": "b", "rejected": "a", "annotator": "ann"} for i in range(3)
    ]  # three opposite
    rows += [
        {"prompt": f"{i}?", "chosen": "b", "rejected": "a", "annotator": "bo"} for i in range(3, 7)
    ]  # bo may differ
    rows += [{"prompt": "t?", "ranking": [["a", "b"]]}]
    said = import_file(store, write(tmp_path / "in.jsonl", rows))
    assert "imported: 18" in said and "duplicates: 2" in said
    assert "contradictory: 3 pairs" in said and "no signal: 1 ties" in said and "replaced: 3 answers" in said
    assert "imported: 0" in import_file(store, tmp_path / "in.jsonl")


def test_a_contradiction_of_what_is_already_there(store, tmp_path):
    import_file(store, write(tmp_path / "one.jsonl", [GOOD]))
    said = import_file(store, write(tmp_path / "two.jsonl", [{"prompt": "Why?", "ranking": ["b", "c", "a"]}]))
    assert "contradictory: 1 pairs" in said


def test_margins_are_not_dropped_silently(store, tmp_path):
    assert "1 values of margin dropped" in import_file(store, write(tmp_path / "i.jsonl", [GOOD | {"margin": 0.5}]))


def test_ratings_that_are_all_equal_teach_nothing(store, tmp_path):
    rows = [{"prompt": f"{i // 3}?", "completion": f"text {i}", "rating": 4} for i in range(12)]
    assert "no signal: all 12 ratings are equal" in import_file(store, write(tmp_path / "in.jsonl", rows))
    for form in ("pairs", "rankings"):
        with pytest.raises(FeedbackError, match="no signal: all 12 ratings are equal"):
            export_file(store, tmp_path / "out.jsonl", form=form)
    assert not (tmp_path / "out.jsonl").exists()
    assert "no signal: all 12 ratings are equal" in export_file(store, tmp_path / "out.jsonl", form="ratings")
    assert "no signal: all 12 labels are equal" in export_file(store, tmp_path / "out.csv", form="labels")


# -- Label Studio -----------------------------------------------------------------------------------------------------


def task(result, *, data=None, **annotation):
    fields = data or {"prompt": "Why?", "answer2": "No.", "answer1": "Because."}  # not in the order of the tags
    return {"id": 1, "data": fields, "annotations": [{"completed_by": 7, "result": [result], **annotation}]}


def result(kind, value, to="answer1,answer2"):
    return {"from_name": "it", "to_name": to, "type": kind, "value": value, "id": "x"}


@pytest.mark.parametrize(
    ("selected", "to", "chosen"),
    [
        ("left", "answer1,answer2", "Because."),
        ("right", "answer1,answer2", "No."),
        ("left", "txt-2, txt-1", "No."),
        ("left", ["Answer 1", "Answer 2"], "Because."),
    ],
)
def test_label_studio_pairs(store, tmp_path, selected, to, chosen):
    one = task(result("pairwise", {"selected": selected}, to), lead_time=3.5, created_at="2026-01-01T00:00:00Z")
    import_file(store, write(tmp_path / "in.json", [one]))
    assert pairs(store, tmp_path)[0][1] == chosen
    (j,) = store.judgements()
    assert (j.annotator, j.seconds, j.time) == ("7", 3.5, "2026-01-01T00:00:00Z")


def test_label_studio_stars_choices_and_ranker(store, tmp_path):
    items = [{"id": "x", "body": "Because."}, {"id": "y", "body": "No."}, {"id": "z", "body": "Perhaps."}]
    who = {"completed_by": {"id": 3, "email": "ann@example.org"}}
    rows = [
        task(result("rating", {"rating": 9}, "answer1"), **who),
        task(result("choices", {"choices": ["answer2"]}, "prompt"), **who),
        task(result("choices", {"choices": ["Good"]}, "answer1"), **who),
        task(result("ranker", {"ranker": {"best first": ["z", "x", "y"], "_": []}}), data={"prompt": "W?", "l": items}),
        task(result("pairwise", {"selected": "left"}), was_cancelled=True),
        task(result("textarea", {"text": ["well"]})),
    ]
    said = import_file(store, write(tmp_path / "in.json", rows))
    assert "imported: 4" in said and "1 skipped tasks" in said and "1 answers of type textarea" in said
    assert "1 ratings taken as 1-10" in said
    stars, choice, thumb, ranking = store.judgements()
    assert (stars.value, stars.scale, stars.annotator) == (9, "1-10", "ann@example.org")
    assert (thumb.value, thumb.scale) == (1, "binary")
    sets = store.sets()
    winner = choice.outputs[0 if choice.value == "first" else 1]
    assert sets[choice.set_id].output(winner).text == "No."
    texts = [sets[ranking.set_id].output(name).text for (name,) in ranking.value]
    assert texts == ["Perhaps.", "Because.", "No."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (task(result("pairwise", {"selected": "left"}, "x,y")), "to_name 'x,y'"),
        (task(result("pairwise", {"selected": "up"})), "neither left nor right"),
        (task(result("rating", {"rating": "4"}, "answer1")), "not a number"),
        (task(result("rating", {"rating": 4}, "prompt")), "to_name 'prompt'"),
        (task(result("rating", {"rating": 11}, "answer1")), "rating 11"),
        (task(result("ranker", {"ranker": {"good": ["x"], "bad": ["y"]}})), "2 lists"),
        (task(result("pairwise", {"selected": "left"}), data={"a": "x", "b": "y"}), "prompt"),
        ({"data": {}, "annotations": 3}, "annotations must be a list"),
    ],
)
def test_label_studio_is_refused_rather_than_guessed(store, tmp_path, row, message):
    with pytest.raises(FeedbackError, match=rf"in\.json: row 1.*{message}"):
        import_file(store, write(tmp_path / "in.json", [row]))


@pytest.mark.parametrize(
    ("name", "field"),
    [("b", "b"), ("txt-2", "text2"), ("Response B", "b"), ("text", None), ("nothing", None), ("text_2", "text2")],
)
def test_a_name_means_one_field_or_none(name, field):
    assert pick(name, {"text1": "", "text2": "", "b": ""}) == field


# -- Argilla ----------------------------------------------------------------------------------------------------------

FIELDS = {"instruction": "Why?", "response-1": "Because.", "response-2": "No."}


def test_argilla_in_both_layouts(store, tmp_path):
    two = {
        "fields": FIELDS,
        "responses": {
            "best": [{"value": ["response-2", "response-1"], "user_id": "u1"}],
            "response-1-rating": [{"value": 4, "user_id": "u1"}, {"value": 2, "user_id": "u2"}],
            "response-2-rating": [{"value": 5, "user_id": "u1", "status": "discarded"}],
            "comment": [{"value": "well, well", "user_id": "u1"}],
        },
    }
    ranks = [{"value": "response-1", "rank": 1}, {"value": "response-2", "rank": 1}]
    values = {"best": {"value": ranks}, "which": {"value": "response-2"}}
    one = {"fields": FIELDS, "responses": [{"user_id": "u3", "status": "submitted", "values": values}]}
    said = import_file(store, write(tmp_path / "in.json", [two, one]))
    assert "imported: 5" in said and "1 answers with the status discarded" in said and "1 answers to 'comment'" in said
    got = [(j.kind, j.annotator) for j in store.judgements()]
    assert got == [("ranking", "u1"), ("rating", "u1"), ("rating", "u2"), ("ranking", "u3"), ("pair", "u3")]
    sets = store.sets()
    first, four, *_, tie, pair = store.judgements()
    assert [sets[first.set_id].output(n).text for (n,) in first.value] == ["No.", "Because."]
    assert sets[four.set_id].output(four.outputs[0]).text == "Because." and four.value == 4
    assert len(tie.value) == 1 and len(tie.value[0]) == 2
    assert sets[pair.set_id].output(pair.outputs[pair.value == "second"]).text == "No."


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ({"quality": [{"value": 3, "user_id": "u"}]}, "does not say which"),
        ({"q": [{"value": [{"value": "response-9", "rank": 1}, {"value": "response-1", "rank": 2}]}]}, "response-9"),
        ({"q": 4}, "must be a list"),
        ([3], "must be an object"),
    ],
)
def test_argilla_is_refused_rather_than_guessed(store, tmp_path, responses, message):
    row = {"fields": FIELDS, "responses": responses}
    with pytest.raises(FeedbackError, match=rf"in\.jsonl:1.*{message}"):
        import_file(store, write(tmp_path / "in.jsonl", [row]))


# -- our own ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path):
    """A store with everything that can be said."""
    made = {"model": "m", "seed": 3, "temperature": 0.7}
    prompt = Prompt(({"role": "user", "content": "Why ☂?"},), {"topic": "rain"}, "x")
    of = OutputSet(
        prompt, tuple(named(prompt, t, [ord(t)], made | {"sample": k}, sample=k) for k, t in enumerate("abc")), made
    )
    names = tuple(o.id for o in of.outputs)
    with Store(tmp_path / "full.db") as store:
        store.add_sets([of])
        pair = Judgement(of.id, "pair", names[:2], "second", "ann", "pair", seconds=1.25, page="2", comment="ü\n")
        store.add(
            [
                pair,
                Judgement(of.id, "pair", names[1:], 0.25, "m", "pair", source="model"),
                Judgement(of.id, "pair", names[::2], "both_bad", "ann", "pair"),
                Judgement(of.id, "ranking", names, [[names[2]], [names[0], names[1]]], "bo", "ranking"),
                Judgement(of.id, "rating", names[:1], 0.5, "s", "rating", source="scorer", scale="binary"),
                Judgement(of.id, "skip", names, None, "ann", "ranking"),
                Judgement(of.id, "flag", names[:1], None, "ann", "rating", comment="rude"),
                Judgement(of.id, "undo", (), pair.id, "ann", "pair"),
            ]
        )
        yield store


def test_judgements_come_back_as_they_were(full, store, tmp_path):
    assert "8 judgements of 1 sets" in export_file(full, tmp_path / "all.jsonl", form="judgements")
    assert "imported: 8" in import_file(store, tmp_path / "all.jsonl")
    assert store.judgements() == full.judgements() and store.sets() == full.sets()
    export_file(store, tmp_path / "again.jsonl", form="judgements")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()
    assert "duplicates: 8" in import_file(store, tmp_path / "all.jsonl")


def spoilt(full, tmp_path, **change):
    export_file(full, tmp_path / "all.jsonl", form="judgements")
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    return write(tmp_path / "spoilt.jsonl", [rows[0], rows[1] | change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "newer version of lossmith"),
        ({"outputs": None}, "spoilt.jsonl:2"),
        ({"value": "third"}, "probability"),
        ({"set_id": "elsewhere"}, "neither in the file nor in"),
        ({"mood": "good"}, "no field 'mood'"),
        ({"source": "persona"}, "no source 'persona'.*'person'"),
        ({"source": [{}]}, "source = .* is of the wrong type"),
        ({"id": ""}, "id is empty"),
        ({"seconds": float("nan")}, "seconds must be a number"),
    ],
)
def test_a_judgement_that_cannot_be_right_is_refused(full, store, tmp_path, change, message):
    with pytest.raises(FeedbackError, match=message):
        import_file(store, spoilt(full, tmp_path, **change))
    assert not store.judgements()


def test_a_set_that_cannot_be_right_is_refused(store, tmp_path):
    row = {"set_id": "x", "prompt": "Why?", "outputs": ["a", "b"], "near_duplicates": "many"}
    with pytest.raises(FeedbackError, match=r"in\.jsonl:1: .*many"):
        import_file(store, write(tmp_path / "in.jsonl", [row]))


def test_an_older_file_is_read_and_an_id_is_one_judgements_alone(full, store, tmp_path):
    assert "imported: 1" in import_file(store, spoilt(full, tmp_path, schema=0))
    (tmp_path / "all.jsonl").unlink()
    with pytest.raises(FeedbackError, match="belongs to another judgement"):
        import_file(store, spoilt(full, tmp_path, value="first"))


# -- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pairs", "rankings", "ratings", "labels"])
def test_a_table_holds_what_the_lines_hold(full, store, tmp_path, form):
    export_file(full, tmp_path / "p.jsonl", form=form)
    export_file(full, tmp_path / "p.csv", form=form)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) > 0
    for cells, row in zip(table, rows, strict=True):
        for key, value in row.items():
            assert (cells[key] if isinstance(value, str) else json.loads(cells[key])) == value
    with Store(tmp_path / "lines.db") as lines:
        import_file(lines, tmp_path / "p.jsonl")
        import_file(store, tmp_path / "p.csv")
        assert [j.id for j in lines.judgements()] == [j.id for j in store.judgements()]


def test_export_refuses(full, store, tmp_path):
    (tmp_path / "there.jsonl").write_text("mine")
    for message, path, options in [
        ("is not overwritten", "there.jsonl", {}),
        ("no form 'pair'", "o.jsonl", {"form": "pair"}),
        ("--ties", "o.jsonl", {"form": "labels", "ties": True}),
        (r"written to \.jsonl files", "o.csv", {"form": "judgements"}),
        (r"\.jsonl and \.csv", "o.parquet", {}),
        ("is a file", "there.jsonl/o.jsonl", {}),
    ]:
        with pytest.raises(FeedbackError, match=message):
            export_file(full, tmp_path / path, **options)
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    with pytest.raises(FeedbackError, match="there is no judgement to export"):
        export_file(store, tmp_path / "o.jsonl")


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_brings_in_and_takes_out(tmp_path):
    sets = write(tmp_path / "s.jsonl", [{"prompt": "Why?", "outputs": ["a", "b", "c"]}])
    path = write(tmp_path / "in.jsonl", [GOOD])
    assert "imported: 1" in lossmith("annotate", sets, "--import", path, "--annotator", "ann").stdout
    out = tmp_path / "out.jsonl"
    assert "1 pairs written" in lossmith("annotate", "--db", tmp_path / "s.db", "--export", out).stdout
    assert json.loads(out.read_text())["annotator"] == "ann"
    with Store(tmp_path / "s.db") as store:
        assert len(store.sets()) == 2


def test_the_command_says_what_does_not_go_together(tmp_path):
    for arguments, message in [
        (("--export", "o.jsonl"), "which judgements?"),
        (("--export", "o.jsonl", "--import", "i.jsonl", "--db", "j.db"), "one at a time"),
        (("--form", "pairs", "--db", "j.db"), "no file is given"),
        (("--export", "o.jsonl", "--db", "j.db"), "there is no judgement file"),
        (("s.jsonl", "--criteria", "@absent.txt"), "there is no file of output sets"),
    ]:
        assert message in lossmith("annotate", *arguments, code=2, cwd=tmp_path).stderr


def test_a_projects_judgements_are_found_and_its_order_is_kept(tmp_path):
    (tmp_path / "p.txt").write_text("Why?\n")
    lossmith("init", tmp_path / "demo", "--prompts", tmp_path / "p.txt")
    path = write(tmp_path / "in.jsonl", [GOOD])
    early = lossmith("annotate", tmp_path / "demo" / "outputs.jsonl", "--import", path, code=2)
    assert "annotation comes after sampling" in early.stderr
    lossmith("annotate", "--import", path, cwd=tmp_path / "demo")
    with Store(tmp_path / "demo" / "judgements.db", create=False) as store:
        assert len(store.judgements()) == 1


@pytest.fixture
def stub(monkeypatch):
    """Another module in the place of one that the command calls."""

    def put(name, **functions):
        module = types.ModuleType(f"lossmith.feedback.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


def test_the_page_is_served_until_it_is_stopped_and_then_says_what_is_next(tmp_path, stub, capsys):
    sets = write(tmp_path / "s.jsonl", [{"prompt": "Why?", "outputs": ["a", "b"]}])
    (tmp_path / "c.txt").write_text("Which is true?")
    asked = []

    def serve(sets, store_path, *, on_ready, **options):
        asked.append((len(sets), store_path, options))
        on_ready("http://127.0.0.1:9/x")
        with Store(store_path) as store:
            (of,) = sets
            store.add([Judgement(of.id, "pair", tuple(o.id for o in of.outputs), "first", "ann", "pair")])
        raise KeyboardInterrupt

    stub("page", serve=serve)
    annotate(sets, question="rating", scale="binary", criteria=f"@{tmp_path / 'c.txt'}", port=9)
    said = capsys.readouterr().out
    assert "1 sets to judge at http://127.0.0.1:9/x" in said
    assert "1 judgements in" in said and f"next: lossmith annotate --db {tmp_path / 's.db'} --report" in said
    count, path, options = asked[0]
    assert (count, path) == (1, tmp_path / "s.db") and options["criteria"] == "Which is true?"
    assert (options["question"], options["scale"], options["port"]) == ("rating", "binary", 9)
    assert options["host"] == "127.0.0.1" and options["allow_remote"] is False and options["sets_path"] == sets


def test_judge_report_and_accounts_are_asked_for_what_was_given(tmp_path, stub, capsys, monkeypatch):
    sets = write(tmp_path / "s.jsonl", [{"prompt": "Why?", "outputs": ["a", "b"]}])
    stub("judges", judge=lambda spec, sets, store, on_progress, **o: f"{spec} {len(sets)} {sorted(o.items())}")
    annotate(sets, judge="length", judge_model="m", question="ranking")
    assert (
        "length 1 [('criteria', None), ('model', 'm'), ('question', 'ranking'), ('scale', '1-5')]"
        in capsys.readouterr().out
    )

    report = types.SimpleNamespace(as_dict=lambda: {"alpha": 0.5}, render=lambda: "alpha [0.5]")
    stub("agreement", agreement_report=lambda judgements, sets: report)
    annotate(db=tmp_path / "s.db", report=True)
    annotate(db=tmp_path / "s.db", report=True, as_json=True)
    text, data = capsys.readouterr().out.splitlines()
    assert text == "alpha [0.5]" and json.loads(data) == {"alpha": 0.5}

    made = []
    stub("page", add_account=lambda store, name, password: made.append((name, password)))
    monkeypatch.setenv("LOSSMITH_PASSWORD", "secret")
    annotate(db=tmp_path / "s.db", add_account="ann")
    assert made == [("ann", "secret")] and "secret" not in capsys.readouterr().out
    monkeypatch.delenv("LOSSMITH_PASSWORD")
    typed = iter(["one", "two"])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(typed))
    with pytest.raises(FeedbackError, match="differ"):
        annotate(db=tmp_path / "s.db", add_account="bo")
    assert len(made) == 1
