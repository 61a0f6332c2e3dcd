"""The input-only data set: every format gives the same prompts, and everything wrong is named with its place."""

import csv
import datetime
import decimal
import enum
import json
import math
import pathlib
import sys
import uuid

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossmith.errors import PromptError
from lossmith.prompts import Prompt, PromptSet, default_prompts_path, load_prompts, plain
from lossmith.prompts.content import NOTHING, is_blank

ROWS = [
    {"prompt": "What is 2 + 2?", "topic": "numbers"},
    {"prompt": "Name a color, with an é.", "topic": "words"},
    {"prompt": 'Say "hi", please', "topic": "words"},
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def written(tmp_path, name, text, encoding="utf-8"):
    path = tmp_path / name
    path.write_text(text, encoding=encoding)
    return path


def jsonl(tmp_path, rows, name="p.jsonl"):
    return written(tmp_path, name, "".join(json.dumps(r) + "\n" for r in rows))


# -- formats ----------------------------------------------------------------------------------------------------------


def every_format(tmp_path):
    csv = 'prompt,topic\n"What is 2 + 2?",numbers\n"Name a color, with an é.",words\n"Say ""hi"", please",words\n'
    yield jsonl(tmp_path, ROWS)
    yield jsonl(tmp_path, ROWS, "p.ndjson")
    yield written(tmp_path, "p.json", json.dumps(ROWS))
    yield written(tmp_path, "q.json", json.dumps({"version": 1, "rows": ROWS}))
    yield written(tmp_path, "p.csv", csv)
    yield written(tmp_path, "p.tsv", "prompt\ttopic\n" + "".join(f"{r['prompt']}\t{r['topic']}\n" for r in ROWS[:2]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    yield tmp_path / "p.parquet"
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    yield tmp_path / "set"
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "sets")
    yield tmp_path / "sets"
    yield ROWS


def test_every_format_gives_the_same_prompts(tmp_path):
    for source in every_format(tmp_path):
        found = load_prompts(source)
        expected = ROWS[:2] if str(source).endswith(".tsv") else ROWS
        assert [(p.content, dict(p.columns)) for p in found] == [(r["prompt"], {"topic": r["topic"]}) for r in expected]
    lines = load_prompts(written(tmp_path, "p.txt", "What is 2 + 2?\n\n  Name a color, with an é.  \n"))
    assert [p.content for p in lines] == [r["prompt"] for r in ROWS[:2]]
    assert [p.source for p in lines] == ["p.txt:1", "p.txt:3"]


visible = st.text(min_size=1).filter(lambda text: not is_blank(text) and text.strip() not in NOTHING)
rows_of_text = st.lists(st.tuples(visible, st.text()), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(rows_of_text)
def test_whatever_was_written_comes_back_from_every_format(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"prompt": prompt, "note": note} for prompt, note in pairs]
    (folder / "p.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    (folder / "p.json").write_text(json.dumps(rows), "utf-8")
    for name, dialect in (("p.csv", "excel"), ("p.tsv", "excel-tab")):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "note"], dialect=dialect, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "p.parquet")
    distinct = set(pairs)
    for name in ("p.jsonl", "p.json", "p.csv", "p.tsv", "p.parquet"):
        found = load_prompts(folder / name)
        assert {(p.content, p.columns["note"]) for p in found} == distinct
        assert len(found) + len(found.duplicates) == len(pairs)
        assert [p.id for p in found] == [p.id for p in load_prompts(rows)]


def test_a_live_data_set_is_a_list_of_rows():
    assert [p.content for p in load_prompts(datasets.Dataset.from_list(ROWS))] == [r["prompt"] for r in ROWS]


def test_a_json_list_may_hold_bare_texts(tmp_path):
    assert load_prompts(written(tmp_path, "p.json", '["Why?"]'), column="question")[0].content == "Why?"


def test_chat_is_read_from_parquet_and_saved_data_sets(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": CHAT}]), tmp_path / "p.parquet")
    datasets.Dataset.from_list([{"prompt": CHAT}]).save_to_disk(tmp_path / "set")
    for source in (tmp_path / "p.parquet", tmp_path / "set"):
        assert list(load_prompts(source)[0].content) == CHAT


def test_a_nameless_column_as_pandas_writes_it_is_harmless(tmp_path):
    assert load_prompts(written(tmp_path, "p.csv", ",prompt\n0,hello\n"))[0].content == "hello"


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    assert load_prompts(written(tmp_path, "p.txt", "hello\n", "utf-8-sig"))[0].content == "hello"
    assert load_prompts(written(tmp_path, "p.csv", "prompt\nhello\n", "utf-8-sig"))[0].content == "hello"


def test_chat_messages_and_text():
    chat, text = load_prompts([{"prompt": CHAT}, "Why?"])
    assert chat.text == text.text == "Why?"
    assert list(chat.messages) == CHAT
    assert list(text.messages) == [{"role": "user", "content": "Why?"}]
    assert chat.id != text.id and len(chat.id) == 16


def test_a_unicode_line_separator_inside_a_row_splits_nothing(tmp_path):
    path = written(tmp_path, "p.jsonl", json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert [p.content for p in load_prompts(path)] == ["a\u2028b"]


def test_another_column_and_a_limit(tmp_path):
    path = jsonl(tmp_path, [{"question": f"q{i}", "n": i} for i in range(9)])
    found = load_prompts(path, column="question", limit=4)
    assert [p.content for p in found] == ["q0", "q1", "q2", "q3"] and found[2].columns == {"n": 2}


def test_exact_duplicates_are_left_out_and_reported(tmp_path):
    found = load_prompts(jsonl(tmp_path, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "a "}]))
    assert [p.content for p in found] == ["a", "b", "a "]
    assert found.duplicates == ("p.jsonl:3",)
    assert "4 rows are 3 prompts: 1 exact duplicate left out (p.jsonl:3)" in found.summary()


# -- split and batches ------------------------------------------------------------------------------------------------

texts = st.lists(visible, min_size=4, max_size=30, unique=True)


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(0, 3), st.data())
def test_a_split_depends_on_seed_and_content_alone(prompts, seed, data):
    count = data.draw(st.integers(1, len(prompts) - 1))
    train, held_out = load_prompts(prompts).split(count, seed)
    assert len(held_out) == count and len(train) + len(held_out) == len(prompts)
    assert not {p.id for p in train} & {p.id for p in held_out}
    shuffled = data.draw(st.permutations(prompts))
    assert {p.id for p in load_prompts(shuffled).split(count, seed)[1]} == {p.id for p in held_out}


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(1, 6), st.integers(0, 3), st.data())
def test_batches_are_epochs_without_repetition(prompts, size, seed, data):
    found = load_prompts(prompts)
    if size > len(found):
        with pytest.raises(PromptError, match="asks for"):
            found.batch(0, size, seed)
        return
    per_epoch = len(found) // size
    for epoch in range(2):
        ids = [p.id for s in range(per_epoch) for p in found.batch(epoch * per_epoch + s, size, seed)]
        assert len(set(ids)) == len(ids) == per_epoch * size
    shuffled = load_prompts(data.draw(st.permutations(prompts)))
    assert [p.id for p in shuffled.batch(1, size, seed)] == [p.id for p in found.batch(1, size, seed)]


def test_a_share_is_held_out_and_an_empty_side_is_refused():
    found = load_prompts([f"p{i}" for i in range(10)])
    assert [len(part) for part in found.split(0.3, 0)] == [7, 3]
    for bad in (0, -1, 10, 11, 0.01, 0.999, 1.5, math.nan, math.inf):
        with pytest.raises(PromptError, match="cannot hold out"):
            found.split(bad, 0)


@pytest.mark.parametrize(("step", "size"), [(0, 0), (0, -2), (-1, 3)])
def test_a_batch_that_means_nothing_is_refused(step, size):
    with pytest.raises(PromptError, match=f"a batch of {size} prompts at step {step}"):
        load_prompts(["a", "b", "c"]).batch(step, size, 0)


def test_ids_are_those_of_the_content_whatever_the_process():
    assert load_prompts(["What is 2 + 2?"])[0].id == "fb3eb78712d637f5"
    assert load_prompts([CHAT])[0].id == "aee6626bcfd620e7"


# -- input-only -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        "answer",
        "completion",
        "Label",
        "chosen",
        "ground_truth",
        "response",
        "target",
        "Ground Truth",
        "ground-truth",
        "groundTruth",
        "correct_answer",
        "expected_output",
        "canonical_solution",
        "answer_2",
    ],
)
def test_a_target_is_refused_unless_it_is_passed_on(tmp_path, column):
    path = jsonl(tmp_path, [{"prompt": "a", column: None}, {"prompt": "b", column: "4"}])
    with pytest.raises(
        PromptError, match=rf"p.jsonl:2: the column '{column}' looks like a target.*pass_columns = \[.{column}"
    ):
        load_prompts(path)
    assert load_prompts(path, pass_columns=[column])[1].columns == {column: "4"}


@pytest.mark.parametrize("nothing", [None, "", "  ", [], math.nan])
def test_an_empty_target_is_no_target(nothing):
    assert len(load_prompts([{"prompt": "a", "answer": nothing}])) == 1


def test_one_passed_column_may_be_a_plain_text():
    assert load_prompts([{"prompt": "a", "answer": "4"}], pass_columns="answer")[0].columns == {"answer": "4"}


def test_a_passed_column_must_be_there(tmp_path):
    with pytest.raises(PromptError, match=r"'answr', which no row has. Did you mean 'answer'"):
        load_prompts(jsonl(tmp_path, [{"prompt": "a", "answer": "4"}]), pass_columns=["answer", "answr"])


def test_a_scorers_argument_is_no_column_name(tmp_path):
    for name in ("prompts", "completions"):
        with pytest.raises(PromptError, match=f"p.jsonl:1: the column {name!r} has the name of a scorer's argument"):
            load_prompts(jsonl(tmp_path, [{"prompt": "a", name: "x"}]), pass_columns=[name])
        with pytest.raises(PromptError, match="rename it"):  # not: pass it on, which would be refused next
            load_prompts(jsonl(tmp_path, [{"prompt": "a", name: "x"}]))


# -- bad input --------------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", "", "p.jsonl is empty"),
        ("p.jsonl", GOOD + '{"prompt": "b"\n', r"p.jsonl:2: not JSON"),
        ("p.jsonl", GOOD + "[1, 2]\n", "p.jsonl:2: a row must be an object"),
        ("p.jsonl", GOOD + '\n{"promt": "b"}\n', "p.jsonl:3: no column 'prompt'. Did you mean 'promt'"),
        ("p.jsonl", GOOD + '{"prompt": "  "}\n', "p.jsonl:2: the column 'prompt' is blank"),
        ("p.jsonl", '{"prompt": 7}\n', "p.jsonl:1: the column 'prompt' holds int"),
        ("p.jsonl", '{"prompt": []}\n', "p.jsonl:1: .*empty list"),
        ("p.jsonl", '{"prompt": [{"role": "usr", "content": "x"}]}\n', "p.jsonl:1: message 1 of 'prompt'"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}\n', "p.jsonl:1: message 1 of 'prompt'"),
        (
            "p.jsonl",
            json.dumps({"prompt": [*CHAT, {"role": "assistant", "content": "4"}]}),
            "p.jsonl:1: .*a completion",
        ),
        ("p.json", '[\n{"prompt": "a"},\n{"prompt" "b"}]', "p.json:3: not JSON"),
        ("p.json", '{"a": [], "b": []}', "p.json: an object with 2 lists"),
        ("p.json", '[{"prompt": "a"}, 3]', "p.json: row 2: a row must be an object"),
        ("p.csv", "prompt,topic\na,b\nc\n", "p.csv:3: the row has not as many fields"),
        ("p.csv", "prompt\n", r"p.csv holds no prompt: its one line \(prompt\) is taken for the header.*rows below"),
        ("p.csv", 'prompt\na\n"b\nc\nd\n', "p.csv:3: the row that begins here is no CSV.*Close every quote"),
        ("p.csv", "prompt,t,t\na,b,c\n", "p.csv:1: two columns are named 't'; rename one"),
        ("p.csv", 'prompt,t\n"a\nb",x\n"  ",x\n', "p.csv:4: the column 'prompt' is blank"),
        ("p.csv", "What is it?\nWho?\n", "p.csv:2: no column 'prompt'. Known: What is it.*first line .* must name"),
        ("p.jsonl", GOOD + "{}\n", "p.jsonl:2: no column 'prompt'. The row is empty"),
        ("p.json", "[]", "p.json holds no prompt"),
        ("p.json", "3", "p.json: holds int, not a list of rows"),
        ("p.jsonl", '\n{"prompt": null}\n', "p.jsonl:2: the column 'prompt' holds NoneType"),
        ("p.jsonl", GOOD + '{"prompt": "half \\ud800"}\n', "p.jsonl:2: .*half of a surrogate pair at character 6"),
        ("p.jsonl", '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "p.jsonl:1: not JSON that can be read"),
        ("p.jsonl", GOOD + '{"prompt": "b", "n": ' + "9" * 5000 + "}", "p.jsonl:2: not JSON that can be read"),
        ("p.jsonl", '{"prompt": [{"role": "user", "content": " "}]}\n', "p.jsonl:1: the last message .* is blank"),
        ("p.txt", "\n\n", "p.txt is empty"),
        ("p.docx", "x", "prompts are read from .jsonl"),
        ("p.parquet", "not parquet", "p.parquet is not a parquet file"),
    ],
)
def test_bad_input_is_named_with_its_place(tmp_path, name, text, message):
    with pytest.raises(PromptError, match=message):
        load_prompts(written(tmp_path, name, text))


def test_bytes_that_are_no_utf8_are_named_with_their_line(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"fine\nnot \xff fine\n")
    with pytest.raises(PromptError, match=r"p.txt:2: not UTF-8"):
        load_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbffine\n\xff\n")
    with pytest.raises(PromptError, match=r"p.txt:2: not UTF-8"):
        load_prompts(tmp_path / "p.txt")


def test_a_parquet_text_that_is_no_utf8_is_named_with_its_row(tmp_path):
    cells = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).buffers()
    texts = pyarrow.StringArray.from_buffers(2, cells[1], cells[2])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=r"p.parquet: row 2, column 'prompt', is not UTF-8. Write the file again"):
        load_prompts(tmp_path / "p.parquet")


def test_a_row_of_parquet_or_of_a_saved_data_set_is_named(tmp_path):
    rows = [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "4"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    for name in ("p.parquet", "set"):
        with pytest.raises(PromptError, match=f"{name}: row 2: the column 'answer' .*pass_columns = ..answer"):
            load_prompts(tmp_path / name)


@pytest.mark.parametrize("damage", [("state.json", "{}"), ("dataset_info.json", "[]")])
def test_a_damaged_data_set_is_refused_and_a_missing_split_named(tmp_path, damage):
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "sets")
    with pytest.raises(PromptError, match=r"sets has no split 'tran'. Did you mean 'train'"):
        load_prompts(tmp_path / "sets", split="tran")
    (tmp_path / "sets" / "train" / damage[0]).write_text(damage[1])
    with pytest.raises(PromptError, match=r"or it is damaged .*save the data set again"):
        load_prompts(tmp_path / "sets")


class Frame:
    """What a pandas frame does here: iterating over it gives column names."""

    def iterrows(self):
        return iter(())

    def __iter__(self):
        return iter(["prompt", "topic"])


@pytest.mark.parametrize("source", [{"prompt": ["a"]}, Frame(), 7])
def test_what_is_no_list_of_rows_is_not_read_as_one(source):
    with pytest.raises(PromptError, match=f"not {type(source).__name__}"):
        load_prompts(source)


def test_other_mistakes_in_memory():
    with pytest.raises(PromptError, match=r"cannot be a path here: .*texts are given as a list"):
        load_prompts("What is the difference between weather and climate? " * 20)
    with pytest.raises(PromptError, match="memory:1: the column name 3 is int"):
        load_prompts([{"prompt": "a", 3: "x"}])


def test_a_home_folder_that_nobody_has():
    with pytest.raises(PromptError, match=r"'~nobody-has-this-name/p.jsonl': no home folder .* Write the path out"):
        load_prompts("~nobody-has-this-name/p.jsonl")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_keeps_nothing_is_refused(limit):
    with pytest.raises(PromptError, match=f"limit = {limit} keeps no prompt. Give 1 or more"):
        load_prompts(["a"], limit=limit)


def test_missing_files_and_foreign_folders(tmp_path, monkeypatch):
    written(tmp_path, "questions.jsonl", GOOD)
    with pytest.raises(PromptError, match=r"there is no prompt file .*Did you mean 'questions.jsonl'"):
        load_prompts(tmp_path / "question.jsonl")
    with pytest.raises(PromptError, match="not one that datasets' save_to_disk wrote"):
        load_prompts(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match=r"pip install 'lossmith\[datasets\]'"):
        load_prompts(tmp_path)


def test_a_hub_name_that_gives_nothing_says_how_it_was_understood(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(PromptError, match=r"taken as a hub name.*no route"):
        load_prompts("someone/prompts")

    def silent(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", silent)
    with pytest.raises(PromptError, match=r"'org/name-v1.1', so it was taken as a hub name.*: ConnectionError"):
        load_prompts("org/name-v1.1")
    rows = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows if (name, split) == ("a/b", "dev") else None)
    assert len(load_prompts("a/b", split="dev")) == 3


# -- what a prompt is ------------------------------------------------------------------------------------------------


def test_prompts_are_the_same_when_content_and_columns_are():
    one, two = load_prompts(["a", {"prompt": CHAT}]), load_prompts([{"prompt": "a", "topic": "x"}, CHAT])
    assert one[1] == two[1] and one[0] != two[0] and len({*one, *two}) == 3
    assert one[0].content_id == two[0].content_id == one[0].id
    assert Prompt(tuple(reversed(CHAT))) != Prompt(tuple(CHAT)) == Prompt(CHAT)


# -- what is shipped --------------------------------------------------------------------------------------------------


def test_the_shipped_prompts():
    found = load_prompts(default_prompts_path())
    assert len(found) >= 240 and not found.duplicates
    assert {name for p in found for name in p.columns} == {"topic"}
    assert len({p.columns["topic"] for p in found}) >= 10
    assert isinstance(found, PromptSet)
    words = [len(p.text.split()) for p in found]
    assert min(words) >= 3 and max(words) <= 80


# -- rows that differ in a column -------------------------------------------------------------------------------------

TARGETS = [{"prompt": "Write a poem.", "must_contain": word} for word in ("lamp", "river", "owl", "moon")]


def test_one_prompt_with_several_targets_is_several_prompts(tmp_path):
    found = load_prompts(jsonl(tmp_path, [*TARGETS, TARGETS[1], {"prompt": "Another."}]))
    assert [p.columns.get("must_contain") for p in found] == ["lamp", "river", "owl", "moon", None]
    assert found.duplicates == ("p.jsonl:5",)
    assert len({p.id for p in found}) == 5 and len({p.content_id for p in found}) == 2
    again = load_prompts([*reversed(TARGETS), {"prompt": "Another."}])
    assert {p.id for p in again} == {p.id for p in found}
    assert Prompt("a", {"x": 1}) != Prompt("a", {"x": 2}) and Prompt("a", {"x": None}) == Prompt("a")


def test_a_column_changes_nothing_that_is_sampled_unless_it_tells_two_rows_apart():
    """Random numbers are keyed by the content as long as that is enough to name the prompt."""
    bare, topic = load_prompts(["a", "b"]), load_prompts([{"prompt": "a", "topic": "x"}, {"prompt": "b", "topic": "y"}])
    assert [p.key for p in bare] == [p.key for p in topic] == [p.id for p in bare]
    assert [p.key for p in topic.batch(0, 2, 7)] == [p.key for p in bare.batch(0, 2, 7)]
    several = load_prompts(TARGETS)
    assert len({p.key for p in several}) == 4
    assert [p.key for p in default_prompts()] == [p.content_id for p in default_prompts()]


def default_prompts():
    return load_prompts(default_prompts_path())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 9)), min_size=3, unique=True), st.integers(0, 3))
def test_rows_of_one_content_stand_on_one_side_of_a_split(rows, seed):
    found = load_prompts([{"prompt": text, "n": n} for text, n in rows])
    if len({text for text, _ in rows}) < 2:
        with pytest.raises(PromptError, match="of 1 text, those of one text staying together"):
            found.split(2, seed)
        return
    train, held_out = found.split(2, seed)
    assert len(train) + len(held_out) == len(found) and len(train) > 0 and len(held_out) > 0
    assert not {p.content for p in train} & {p.content for p in held_out}


def test_too_few_prompts_to_hold_out_say_how_many_rows_were_duplicates():
    with pytest.raises(PromptError, match=r"cannot hold out 4 of 1 prompt \(20 rows, 19 of them exact duplicates\)"):
        load_prompts(["a"] * 20).split(4, 0)


# -- chat in a cell, and every field of a message -------------------------------------------------------------------


def test_chat_as_json_in_a_cell_is_chat(tmp_path):
    with open(tmp_path / "p.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt"], [json.dumps(CHAT)], ["[1, 2] is a list. What is its sum?"]])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [json.dumps(CHAT)]}), tmp_path / "p.parquet")
    found = load_prompts(tmp_path / "p.csv")
    assert list(found[0].content) == CHAT and found[0].id == load_prompts([CHAT])[0].id
    assert found[1].content.startswith("[1, 2]")
    assert list(load_prompts(tmp_path / "p.parquet")[0].content) == CHAT
    assert load_prompts([str(CHAT)])[0] == found[0]  # as pandas writes a list into a table
    assert load_prompts(['["a", "b"]', '{"a": 1}', "[{"])[0].content == '["a", "b"]'


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (str(CHAT)[:-9], "begins as chat messages do, but is not JSON"),
        (json.dumps(CHAT)[:-9], "begins as chat messages do, but is not JSON"),
        (json.dumps(CHAT[0]), r"holds one chat message as JSON; write a list"),
        (json.dumps([*CHAT, {"text": "x"}]), "the item 3 is none"),
        (json.dumps([{"role": "usr", "content": "x"}]), "message 1 of 'prompt' must be"),
        (json.dumps([*CHAT, {"role": "assistant", "content": "x"}]), "end with the assistant's"),
    ],
)
def test_a_cell_that_is_half_chat_is_refused(tmp_path, cell, message):
    with open(tmp_path / "p.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt"], [cell]])
    with pytest.raises(PromptError, match=rf"p.csv:2: .*{message}"):
        load_prompts(tmp_path / "p.csv")


CALL = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Ghent"}}}
TURNS = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "look"},
    {"role": "tool", "content": "", "tool_call_id": "1", "name": "rain"},
]


def test_every_field_of_a_message_is_kept(tmp_path):
    found = load_prompts(jsonl(tmp_path, [{"prompt": TURNS}]))
    assert list(found[0].content) == TURNS
    # a table gives every message every field; what is None is not there
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": TURNS}]), tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet")[0] == found[0]


def test_content_in_parts_is_their_text_and_pictures_are_refused():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
    assert load_prompts([[{"role": "user", "content": parts}]])[0].text == "What is this?"
    with pytest.raises(PromptError, match="message 1 of 'prompt' holds a part of type 'image'"):
        load_prompts([[{"role": "user", "content": [*parts, {"type": "image", "image": "a.png"}]}]])


def test_sharegpt_messages_are_chat_messages():
    rows = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}]
    assert list(load_prompts([{"conversations": rows}], column="conversations")[0].content) == CHAT
    with pytest.raises(PromptError, match="message 1 of 'prompt' must be"):
        load_prompts([[{"from": "narrator", "value": "Once"}]])


def test_arrays_of_messages_as_pandas_gives_them():
    assert list(load_prompts([{"prompt": numpy.array(CHAT, dtype=object)}])[0].content) == CHAT


# -- other layouts ----------------------------------------------------------------------------------------------------


def test_the_input_of_an_instruction_is_joined_to_it():
    rows = [{"instruction": "Sort these.", "input": "b, a"}, {"instruction": "Say hi.", "input": ""}]
    found = load_prompts(rows, column="instruction")
    assert [p.content for p in found] == ["Sort these.\nb, a", "Say hi."]
    assert "input joined to instruction in 1 of them" in found.summary()
    (long,) = load_prompts([rows[0] | {"history": [["Hi", "Hello"]]}], column="instruction")
    assert [(m["role"], m["content"]) for m in long.content] == [
        ("user", "Hi"), ("assistant", "Hello"), ("user", "Sort these.\nb, a"),
    ]  # fmt: skip
    with pytest.raises(PromptError, match="the column 'history' must hold a list of"):
        load_prompts([rows[0] | {"history": "Hi"}], column="instruction")


def test_a_system_column_is_the_system_message():
    found = load_prompts([{"prompt": "Why?", "system": "Be brief."}, {"prompt": "How?", "system": ""}])
    assert list(found[0].content) == CHAT and found[1].content == "How?"
    assert "system as the system message in 1 of them" in found.summary()
    # written down and read again it is the same
    again = load_prompts([{"prompt": [dict(m) for m in found[0].content], "system": "Be brief."}])
    assert again[0] == found[0]
    with pytest.raises(PromptError, match="begins with another system message than the column 'system'"):
        load_prompts([{"prompt": CHAT, "system": "Be long."}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "n": 1}, r"Is it 'question'\? prompt_column = .question"),
        ({"instruction": "a", "input": "b"}, 'prompt_column = "instruction"'),
        ({"messages": CHAT}, 'prompt_column = "messages"'),
        ({"conversations": []}, 'prompt_column = "conversations"'),
        ({"chosen": "a", "rejected": "b"}, "a file of preferences, to learn from with `lossmith prefer`"),
    ],
)
def test_other_layouts_are_told_what_to_do(row, message):
    with pytest.raises(PromptError, match=f"memory:1: no column 'prompt'.*{message}"):
        load_prompts([row])


def test_a_column_that_would_pass_for_the_prompt_is_refused():
    with pytest.raises(PromptError, match="a column 'prompt' beside 'question'"):
        load_prompts([{"prompt": "a", "question": "b"}], column="question")


@pytest.mark.parametrize("text", ["\u200b", "\ufeff \u2060", "\x00"])
def test_what_nobody_can_see_is_blank(text):
    with pytest.raises(PromptError, match="is blank"):
        load_prompts([text])


@pytest.mark.parametrize("text", ["NaN", "None", " null "])
def test_an_empty_cell_that_was_printed_is_no_prompt(tmp_path, text):
    with pytest.raises(PromptError, match=f"p.txt:2: .*holds '{text.strip()}', which is how a program"):
        load_prompts(written(tmp_path, "p.txt", f"Why?\n{text}\n"))


def test_a_long_cell_is_read_and_the_process_keeps_its_limit(tmp_path):
    limit = csv.field_size_limit()
    rows = load_prompts(written(tmp_path, "p.csv", f"prompt,document\nWhat?,{'x' * 150_000}\nAnd?,short\n"))
    assert [len(p.columns["document"]) for p in rows] == [150_000, 5] and csv.field_size_limit() == limit


# -- columns of any type ----------------------------------------------------------------------------------------------


class Level(enum.Enum):
    HIGH = "high"


@pytest.mark.parametrize(
    ("value", "made"),
    [
        (datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC), "2024-02-29T12:00:00+00:00"),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (datetime.timedelta(minutes=1.5), 90.0),
        (decimal.Decimal("0.10"), "0.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (b"\x00\xff", "AP8="),
        (numpy.int64(3), 3),
        (numpy.float32(0.5), 0.5),
        (numpy.array([[1, 2]]), [[1, 2]]),
        (numpy.datetime64("2024-02-29"), "2024-02-29"),
        (math.nan, None),
        (math.inf, "inf"),
        ((1, {"a": {2}}), [1, {"a": [2]}]),
        (Level.HIGH, "high"),
        (pathlib.PurePosixPath("a/b"), "a/b"),
    ],
)
def test_a_column_of_any_type_can_be_written_down(value, made):
    assert plain(value) == made
    json.dumps(plain(value), allow_nan=False)
    assert load_prompts([{"prompt": "a", "x": value}])[0].columns["x"] is value  # a scorer sees what was given


def test_a_column_that_cannot_be_written_down_is_named():
    with pytest.raises(PromptError, match="memory:1: the column 'x' holds a object, which cannot be written down"):
        load_prompts([{"prompt": "a", "x": object()}])
    itself = []
    itself.append(itself)
    with pytest.raises(PromptError, match="memory:1: the column 'x' holds itself"):
        load_prompts([{"prompt": "a", "x": itself}])
