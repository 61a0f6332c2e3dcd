"""One reader for preferences, whoever wrote them: the same file means the same at every door, or says why not."""

import json
import random

import pytest

import tiny
from lossmith.errors import FeedbackError
from lossmith.feedback.exchange import export_file, import_file
from lossmith.feedback.gather import gather
from lossmith.feedback.judgement import Judgement
from lossmith.feedback.output_set import OutputSet, named
from lossmith.feedback.preferences import Label, Pair, Rating
from lossmith.feedback.store import Store
from lossmith.prompts import Prompt
from lossmith.reward_model.train import RewardRecipe, train_reward_model
from lossmith.training.offline.loop import PreferenceRecipe, open_preferences, plan_preferences


def write(path, rows):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8-sig")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    return path


def said(p):
    """(prompt, better, worse) or (prompt, text, good or rating), as plain data."""
    content = p.prompt.content if isinstance(p.prompt.content, str) else [dict(m) for m in p.prompt.content]
    if isinstance(p, Pair):
        return content, p.chosen.text, p.rejected.text
    return content, p.output.text, p.good if isinstance(p, Label) else p.rating


def chat(*texts, system=None):
    roles = [{"role": "system", "content": system}] if system else []
    return roles + [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def sharegpt(*texts):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def transcript(*texts):
    return "".join(f"\n\n{('Human', 'Assistant')[k % 2]}: {text}" for k, text in enumerate(texts))


LAYOUTS = {
    "trl": ({"prompt": "Why?", "chosen": "Air.", "rejected": "No."}, ("Why?", "Air.", "No.")),
    "trl chat": (
        {"prompt": chat("Why?"), "chosen": chat("Why?", "Air.")[1:], "rejected": chat("Why?", "No.")[1:]},
        (chat("Why?"), "Air.", "No."),
    ),
    "trl implicit": (
        {"chosen": chat("Hi", "Hello", "Why?", "Air.", system="Be brief."),
         "rejected": chat("Hi", "Hello", "Why?", "No.", system="Be brief.")},
        (chat("Hi", "Hello", "Why?", system="Be brief."), "Air.", "No."),
    ),
    "trl kto": ({"prompt": "Why?", "completion": "Air.", "label": True}, ("Why?", "Air.", True)),
    "hh-rlhf": (
        {"chosen": transcript("Hi", "Hello", "Why?", "Air.\n\nTruly."),
         "rejected": transcript("Hi", "Hello", "Why?", "No.")},
        (chat("Hi", "Hello", "Why?"), "Air.\n\nTruly.", "No."),
    ),
    "hh-rlhf with its prompt": (
        {"prompt": transcript("Why?") + "\n\nAssistant:", "chosen": transcript("Why?", "Air."),
         "rejected": transcript("Why?", "No.")},
        (chat("Why?"), "Air.", "No."),
    ),
    "a prompt that is a transcript": (
        {"prompt": transcript("Why?") + "\n\nAssistant:", "chosen": " Air.", "rejected": " No."},
        (transcript("Why?") + "\n\nAssistant:", " Air.", " No."),
    ),
    "llama-factory sharegpt": (
        {"conversations": sharegpt("Why?"), "chosen": sharegpt("", "Air.")[1], "rejected": sharegpt("", "No.")[1],
         "system": "Be brief."},
        (chat("Why?", system="Be brief."), "Air.", "No."),
    ),
    "llama-factory sharegpt lists": (
        {"conversations": sharegpt("Why?"), "chosen": sharegpt("", "Air.")[1:], "rejected": sharegpt("", "No.")[1:]},
        (chat("Why?"), "Air.", "No."),
    ),
    "llama-factory openai": (
        {"messages": chat("Why?"), "chosen": chat("", "Air.")[1], "rejected": chat("", "No.")[1]},
        (chat("Why?"), "Air.", "No."),
    ),
    "llama-factory alpaca": (
        {"instruction": "Answer.", "input": "Why?", "chosen": "Air.", "rejected": "No.", "system": "Be brief.",
         "history": [["Hi", "Hello"]]},
        (chat("Hi", "Hello", "Answer.\nWhy?", system="Be brief."), "Air.", "No."),
    ),
    "llama-factory alpaca kto": (
        {"instruction": "Why?", "input": "", "output": "Air.", "kto_tag": False}, ("Why?", "Air.", False)
    ),
    "llama-factory sharegpt kto": (
        {"conversations": sharegpt("Why?", "Air."), "label": False}, (chat("Why?"), "Air.", False)
    ),
    "ms-swift": ({"messages": chat("Why?", "Air."), "rejected_response": "No."}, (chat("Why?"), "Air.", "No.")),
    "ms-swift messages": (
        {"messages": chat("Why?", "Air."), "rejected_messages": chat("Why?", "No.")}, (chat("Why?"), "Air.", "No.")
    ),
    "ms-swift query": (
        {"query": "Why?", "response": "Air.", "rejected_response": "No.", "history": [["Hi", "Hello"]]},
        (chat("Hi", "Hello", "Why?"), "Air.", "No."),
    ),
    "ms-swift kto": ({"messages": chat("Why?", "Air."), "label": True}, (chat("Why?"), "Air.", True)),
    "ultrafeedback binarized": (
        {"prompt": "Why?", "chosen": chat("Why?", "Air."), "rejected": chat("Why?", "No."),
         "messages": chat("Why?", "Air."), "score_chosen": 8.0},
        ("Why?", "Air.", "No."),
    ),
    "openai": (
        {"input": {"messages": chat("Why?"), "tools": []}, "preferred_output": chat("", "Air.")[1:],
         "non_preferred_output": chat("", "No.")[1:]},
        (chat("Why?"), "Air.", "No."),
    ),
    "orca": (
        {"system": "", "question": "Why?", "chosen": "Air.", "rejected": "No."}, ("Why?", "Air.", "No.")
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_tools_layout_means_the_same_at_every_door(name, suffix, tmp_path):
    row, wanted = LAYOUTS[name]
    path = write(tmp_path / f"in{suffix}", [row])
    (found,) = gather(path).preferences  # what prefer and reward train read
    assert said(found) == wanted
    with Store(tmp_path / "j.db") as store:
        import_file(store, path)
        export_file(store, tmp_path / "out.jsonl", form="pairs" if isinstance(found, Pair) else "labels")
    (again,) = gather(tmp_path / "out.jsonl").preferences  # what annotate --import read
    assert said(again) == wanted
    (third,) = gather(tmp_path / "j.db", None if isinstance(found, Pair) else "labels").preferences
    assert said(third) == wanted


def extract_prompt(chosen, rejected):
    """TRL's rule for preferences without a prompt: the messages that both begin with."""
    shared = next(k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def test_an_implicit_prompt_is_the_one_that_trl_extracts():
    rng = random.Random(0)
    for _ in range(50):
        turns = [rng.choice("abc") for _ in range(2 * rng.randint(0, 3) + 1)]
        chosen, rejected = chat(*turns, "yes"), chat(*turns, "no")
        prompt, (better,), (worse,) = extract_prompt(chosen, rejected)
        (found,) = gather([{"chosen": chosen, "rejected": rejected}]).preferences
        assert said(found) == (prompt, better["content"], worse["content"])


def test_ratings_of_ultrafeedback_are_on_its_scale():
    answers = [{"response": "Air.", "overall_score": 8.5}, {"response": "No.", "overall_score": "2"}]
    found = gather([{"source": "x", "instruction": "Why?", "models": ["a", "b"], "completions": answers}])
    assert [(said(p), p.low, p.high) for p in found.preferences] == [
        (("Why?", "Air.", 8.5), 1, 10), (("Why?", "No.", 2.0), 1, 10)
    ]  # fmt: skip
    assert found.notes == ["columns not read, which no preference has: models, source"]


def test_messages_as_pandas_writes_them_into_a_table(tmp_path):
    row = {"prompt": "Why?", "chosen": str(chat("Why?", "It's air.")[1:]), "rejected": '[{"name": "json"}]'}
    path = write(tmp_path / "in.csv", [row])
    assert [said(p) for p in gather(path).preferences] == [("Why?", "It's air.", '[{"name": "json"}]')]
    path = write(tmp_path / "in.csv", [row | {"chosen": str(chat("Why?", "Air.")).replace(", {", " {")}])
    with pytest.raises(FeedbackError, match=r"in.csv:2: chosen begins like chat messages, but is no JSON"):
        gather(path)


GOOD = {"prompt": "Why?", "chosen": "Air.", "rejected": "No."}
BAD = {
    "the same text": (GOOD | {"rejected": "Air."}, "the same text"),
    "an empty side": (GOOD | {"rejected": " "}, "rejected is empty"),
    "no side": ({"prompt": "Why?", "chosen": "Air."}, "chosen and rejected"),
    "a number": (GOOD | {"chosen": 3}, "chosen"),
    "none": (GOOD | {"chosen": None}, "chosen and rejected"),
    "no prompt": ({"chosen": "It is air.", "rejected": "It is not."}, "prompt is missing.*Add a column prompt"),
    "other conversations": (
        {"chosen": chat("Hi", "Hello", "Why?", "Air."), "rejected": chat("Hi", "Ho", "Why?", "No.")}, "part before",
    ),
    "one transcript longer": (
        {"chosen": transcript("Why?", "Air.", "So?", "Yes."), "rejected": transcript("Why?", "No.")}, "part before",
    ),
    "a transcript of a human's end": (
        {"chosen": transcript("Why?", "Air.", "So?"), "rejected": transcript("Why?", "No.")}, "assistant's",
    ),
    "half a surrogate pair": (GOOD | {"chosen": "\ud800"}, "surrogate"),
    "an unknown label": ({"prompt": "Why?", "completion": "a", "label": "perhaps"}, "neither true nor false"),
    "true as a rating": ({"prompt": "Why?", "completion": "a", "rating": True}, "rating"),
    "a huge number": ({"prompt": "Why?", "completion": "a", "rating": 10**400}, "rating"),
    "tools": (GOOD | {"tools": [{"name": "search"}]}, "tools is part of what was judged"),
    "images": (GOOD | {"images": ["a.png"]}, "images is part"),
    "a tool call": (
        GOOD | {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}, "tool_calls",
    ),
    "prompt and input": (GOOD | {"input": "the text"}, "prompt and input"),
    "two systems": ({**GOOD, "prompt": chat("Why?", system="a"), "system": "b"}, "only system message"),
    "tokens that are none": (GOOD | {"chosen_tokens": ["a"]}, "token ids"),
    "a ranking's tokens": ({"prompt": "Why?", "ranking": ["a", "b"], "ranking_tokens": [1, 2]}, "ranking_tokens"),
    "ultrafeedback without scores": ({"instruction": "Why?", "completions": [{"response": "a"}]}, "overall_score"),
    "a list": ([1], "object"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_with_its_line_or_left_out_and_counted_at_every_door(name, tmp_path):
    row, message = BAD[name]
    path = write(tmp_path / "in.jsonl", [GOOD, row, GOOD | {"prompt": "How?"}])
    with Store(tmp_path / "j.db") as store:
        for read in (gather, lambda *a, **k: import_file(store, *a, **k)):
            with pytest.raises(FeedbackError, match=rf"1 of its rows(.|\n)*in\.jsonl:2: .*{message}"):
                read(path)
        assert not store.sets()
        assert "left out: 1 rows" in import_file(store, path, skip_bad=True) and len(store.judgements()) == 2
    found = gather(path, skip_bad=True)
    assert len(found.preferences) == 2 and "1 of 3 rows left out" in found.notes[0] and ":2:" in found.notes[0]


def test_bad_rows_of_a_table_are_left_out_too(tmp_path):
    (tmp_path / "in.csv").write_text("prompt,chosen,rejected\na?,1,2\nb?,1\nc?,1,2\n")
    (tmp_path / "in.json").write_text(json.dumps([GOOD, 5, GOOD]))
    for name, where in (("in.csv", "in.csv:3"), ("in.json", "in.json: row 2")):
        with pytest.raises(FeedbackError, match=where):
            gather(tmp_path / name)
        assert len(gather(tmp_path / name, skip_bad=True).preferences) == 2


def test_a_bad_row_stops_before_any_model_is_loaded(tmp_path):
    path = write(tmp_path / "in.jsonl", [GOOD, GOOD | {"rejected": "Air."}])
    for go in (
        lambda: plan_preferences(PreferenceRecipe.make(preferences=str(path), model=str(tiny.folder()))),
        lambda: train_reward_model(path, tmp_path / "RM", RewardRecipe(model=str(tmp_path / "no model"))),
    ):
        with pytest.raises(FeedbackError, match=r"in\.jsonl:2: .*same text"):
            go()


def test_prefer_and_reward_train_count_what_was_left_out(tmp_path):
    rows = [GOOD | {"prompt": f"{k}?"} for k in range(12)] + [GOOD | {"rejected": "Air."}]
    path = write(tmp_path / "in.jsonl", rows)
    fields = dict(model=str(tiny.folder()), dtype="float32", device="cpu", runs=str(tmp_path), held_out=4)
    run = open_preferences(plan_preferences(PreferenceRecipe.make(preferences=str(path), skip_bad=True, **fields)))
    assert any("1 of 13 rows left out" in note and "in.jsonl:13" in note for note in run.notes)
    lines = []
    recipe = RewardRecipe(model=str(tiny.folder()), dtype="float32", device="cpu", epochs=1, skip_bad=True)
    manifest = train_reward_model(path, tmp_path / "RM", recipe, lines.append)
    assert "1 of 13 rows left out" in manifest["data"]["left_out"] and "1 of 13 rows left out" in lines[0]


def test_exports_of_label_studio_and_argilla_train_as_they_are(tmp_path):
    task = {
        "data": {"prompt": "Why?", "answer1": "Air.", "answer2": "No."},
        "annotations": [{"result": [{"type": "pairwise", "from_name": "w", "to_name": "answer1,answer2",
                                     "value": {"selected": "right"}}]}],
    }  # fmt: skip
    (found,) = gather(write(tmp_path / "tasks.json", [task])).preferences
    assert said(found) == ("Why?", "No.", "Air.")
    record = {"fields": {"prompt": "Why?", "answer": "Air."}, "responses": {"quality": [{"value": 4, "user_id": "u"}]}}
    bare = {"fields": {"prompt": "How?", "answer": "So."}}
    path = write(tmp_path / "records.jsonl", [bare, record, bare | {"responses": None}])
    found = gather(path)
    assert said(found.preferences[0]) == ("Why?", "Air.", 4)
    assert "2 records without a response" in found.notes[0]


def test_files_that_are_no_preferences(tmp_path):
    (tmp_path / "utf16.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    (tmp_path / "notes.txt").write_text("Why?")
    (tmp_path / "outputs.jsonl").write_text(json.dumps({"prompt": "Why?", "outputs": ["a", "b"]}))
    for name, message in (
        ("utf16.jsonl", "not UTF-8"),
        ("notes.txt", "are read from .jsonl"),
        ("outputs.jsonl", "nobody has judged"),
        ("utf61.jsonl", "Did you mean 'utf16.jsonl'"),
    ):
        with pytest.raises(FeedbackError, match=message):
            gather(tmp_path / name)
    with pytest.raises(FeedbackError, match="not dict"):
        gather({})
    with pytest.raises(FeedbackError, match="memory:1: a preference is a row"):
        gather([3])


# -- damaged judgement files ------------------------------------------------------------------------------------------


@pytest.fixture
def judged(tmp_path):
    """A file of three judgements."""
    path = tmp_path / "j.db"
    with Store(path) as store:
        prompts = [Prompt(f"{k}?") for k in range(3)]
        sets = [OutputSet(p, (named(p, "a"), named(p, "b"))) for p in prompts]
        store.add_sets(sets)
        names = [tuple(o.id for o in s.outputs) for s in sets]
        both = zip(sets, names, strict=True)
        store.add([Judgement(s.id, "pair", ids, "first", "ada", "pair", comment="kept") for s, ids in both])
    return path


@pytest.mark.parametrize("row", ["{", "[]", "null", "3", '{"set_id": 1}', "", b"\xff\xfe", "CHANGED"])
@pytest.mark.parametrize("table", ["judgements", "sets"])
def test_a_damaged_row_is_named_and_the_rest_can_be_saved(judged, tmp_path, table, row):
    with Store(judged) as store:
        db = store._db
        db.execute("DROP TRIGGER no_change")
        (whole,) = db.execute(f"SELECT row FROM {table} WHERE number = 2").fetchone()
        spoilt = whole.replace("kept", "kapt").replace('"completion": "a"', '"completion": "c"').replace(
            '"id": ', '"x": ') if row == "CHANGED" else row  # fmt: skip
        assert spoilt != whole
        db.execute(f"UPDATE {table} SET row = CAST(? AS TEXT) WHERE number = 2", (spoilt,))
        read = store.judgements if table == "judgements" else store.sets
        with pytest.raises(FeedbackError, match=r"j\.db: (judgement|set) \w+ is damaged: .*--skip-bad"):
            read()
        bad = []
        assert len(read(bad=bad)) == 2 and len(bad) == 1
    with pytest.raises(FeedbackError, match="is damaged"):
        gather(judged)
    found = gather(judged, skip_bad=True)
    assert len(found.preferences) == 2 and "1 damaged rows left out" in found.notes[0]
    with Store(tmp_path / "new.db") as store:
        with pytest.raises(FeedbackError, match="is damaged"):
            import_file(store, judged)
        assert "imported: 2" in import_file(store, judged, skip_bad=True)


def test_a_file_of_an_older_version_has_no_checksums_and_is_read(judged):
    with Store(judged) as store:
        store._db.execute("ALTER TABLE judgements DROP COLUMN checksum")
    with Store(judged) as store:
        assert [j.comment for j in store.judgements()] == ["kept"] * 3
        store._db.execute("UPDATE meta SET value = 'x'")
    with pytest.raises(FeedbackError, match="is damaged: its version"):
        Store(judged)


def test_passwords_are_for_the_owner_of_the_file(judged):
    assert judged.stat().st_mode & 0o777 == 0o644 or judged.stat().st_mode & 0o077 == 0  # as the umask says
    with Store(judged) as store:
        store.set_account("ada", "a hash")
        assert {p.stat().st_mode & 0o777 for p in judged.parent.glob("j.db*")} == {0o600}
    with Store(judged) as store:
        store.add_sets([])
        assert {p.stat().st_mode & 0o777 for p in judged.parent.glob("j.db*")} == {0o600}


def test_ratings_stay_ratings_and_a_margin_stays(tmp_path):
    rows = [GOOD | {"margin": 2.5, "weight": 0.5, "probability": 0.75}]
    (pair,) = gather(write(tmp_path / "in.jsonl", rows)).preferences
    assert (pair.margin, pair.weight, pair.probability) == (2.5, 0.5, 0.75)
    (rating,) = gather([{"prompt": "Why?", "completion": "Air.", "rating": "3", "low": 1, "high": 7}]).preferences
    assert isinstance(rating, Rating) and (rating.rating, rating.low, rating.high) == (3, 1, 7)
