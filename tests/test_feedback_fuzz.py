"""Spoilt files of preferences, judgements and output sets: refused in words or read whole, and never half."""

import copy
import random

import pytest

from lossmith.errors import FeedbackError
from lossmith.feedback.convert import convert
from lossmith.feedback.exchange import import_file
from lossmith.feedback.gather import gather
from lossmith.feedback.judgement import Judgement
from lossmith.feedback.output_set import OutputSet, named, read_sets
from lossmith.feedback.preferences import write_preferences
from lossmith.feedback.store import Store
from lossmith.prompts import Prompt
from test_preference_layouts import LAYOUTS, write

ODD = [
    None,
    True,
    False,
    0,
    -1,
    3,
    1.5,
    10**400,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\0",
    "\x1b[2J",
    "\ud800",
    "\ufeff",
    "NaN",
    "null",
    "[",
    "[]",
    "{}",
    '[{"role": "user"}]',
    '[{"from": "gpt", "value": 1}]',
    "\n\nHuman: a\n\nAssistant:",
    "\n\nHuman:\n\nHuman:",
    "١",
    "a" * 5000,
    [],
    {},
    [[]],
    [{}],
    [None],
    ["a", ["b"]],
    {"value": None},
    [{"role": "user"}],
    [{"role": ["user"], "content": "a"}],
    [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "assistant", "content": "a"}] * 2,
    {"from": "gpt", "value": "a"},
    [[["a"]]],
    "first",
    "1-5",
    10**20,
    "1e999",
]
KEYS = ["prompt", "chosen", "rejected", "completion", "label", "rating", "ranking", "low", "high", "messages",
        "conversations", "instruction", "input", "history", "system", "query", "response", "completions", "annotator",
        "probability", "margin", "weight", "chosen_tokens", "chosen_id", "fields", "responses", "data", "annotations",
        "set_id", "kind", "outputs", "value", "tools", "id", "question", "scale", "columns", "prompt_id"]  # fmt: skip


def own_rows():
    """A judgement file's lines: a set, and a judgement of each kind."""
    prompt = Prompt("Why?")
    of = OutputSet(prompt, (named(prompt, "Air."), named(prompt, "No.")))
    a, b = (o.id for o in of.outputs)
    said = [
        Judgement(of.id, "pair", (a, b), "first", "ada", "pair"),
        Judgement(of.id, "rating", (a,), 3, "ada", "rating", scale="1-5"),
        Judgement(of.id, "ranking", (a, b), [[a], [b]], "ada", "ranking"),
        Judgement(of.id, "skip", (a, b), None, "ada", "pair"),
    ]
    undone = Judgement(of.id, "undo", (), said[0].id, "ada", "pair")
    return [of.as_row(), *(j.as_row() for j in [*said, undone])]


def task(kind, value, to="answer1,answer2"):
    result = {"type": kind, "from_name": "x", "to_name": to, "value": value}
    data = {"prompt": "Why?", "answer1": "Air.", "answer2": "No."}
    return {"data": data, "annotations": [{"completed_by": 1, "lead_time": 2.5, "result": [result]}]}


FIELDS = {"prompt": "Why?", "a": "Air.", "b": "No."}
FILES = [
    *([row] for row, _ in LAYOUTS.values()),
    [{"prompt": "Why?", "ranking": [["Air.", "So."], ["No."]]}, {"prompt": "Why?", "ranking": ["Air.", "No."]}],
    [{"prompt": "Why?", "completion": text, "rating": 3, "low": 1, "high": 10} for text in ("Air.", "No.")],
    [{"instruction": "Why?", "completions": [{"response": "Air.", "overall_score": 8.5}]}],
    [task("pairwise", {"selected": "left"}), task("rating", {"rating": 4}, "answer1")],
    [task("choices", {"choices": ["tie"]}), task("choices", {"choices": ["answer1"]})],
    [{"fields": FIELDS, "responses": {"ranking": [{"value": [{"value": "a", "rank": 1}, {"value": "b", "rank": 2}]}]}}],
    [{"fields": FIELDS, "responses": [{"user_id": "u", "values": {"a_quality": {"value": 4}}}]}, {"fields": FIELDS}],
    own_rows(),
]


def spoil(rng, value, depth=0):
    """The value with something in it replaced, left out, doubled or renamed."""
    if isinstance(value, (dict, list)) and value and (depth == 0 or rng.random() < 0.7):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, how = rng.choice(list(keys)), rng.random()
        if how < 0.15:
            del value[key]
        elif how < 0.3 and isinstance(value, dict):
            value[rng.choice(KEYS)] = value.pop(key)
        elif how < 0.4 and isinstance(value, list):
            value.append(copy.deepcopy(value[key]))
        elif how < 0.5 and isinstance(value, dict):
            value[rng.choice(KEYS)] = copy.deepcopy(rng.choice(ODD))
        else:
            value[key] = spoil(rng, value[key], depth + 1)
        return value
    return copy.deepcopy(rng.choice(ODD))


def spoilt_file(rng, folder):
    rows = copy.deepcopy(rng.choice(FILES))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rows = spoil(rng, rows)
    rows = rows if isinstance(rows, list) else [rows]
    path = folder / f"in{rng.choice(('.jsonl', '.jsonl', '.json', '.csv', '.tsv', '.parquet'))}"
    try:
        write(path, rows)
    except (TypeError, AttributeError, ValueError, IndexError, OverflowError, UnicodeError, KeyError, ImportError):
        path = write(folder / "in.jsonl", rows)  # no such table
    except Exception as error:  # pyarrow's own, of columns of several types
        assert type(error).__module__.startswith("pyarrow"), error
        path = write(folder / "in.jsonl", rows)
    if rng.random() < 0.25:  # the disk's own way
        data = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data) or 1)
            how = rng.random()
            if how < 0.5 and data:
                data[at] = rng.randrange(256)
            elif how < 0.75:
                del data[at:]
            else:
                data[at:at] = rng.choice((b"\0", b"\xff", b'"', b"\n", b"\r", b",", b"\xef\xbb\xbf", b"{}"))
        path.write_bytes(data)
    return path


def try_file(path, folder):
    """How many doors read it. Only a FeedbackError may come out of one that does not."""
    read = 0
    for skip in (False, True):
        with Store(":memory:") as store:
            try:
                import_file(store, path, skip_bad=skip)
                read += 1
            except FeedbackError as error:
                assert str(error).strip() and "Traceback" not in str(error)
                assert not store.judgements() and not store.sets(), "half of a file was imported"
            sets, judgements = store.sets(), store.judgements()
            assert all(j.check(sets[j.set_id]) for j in judgements)
            for form in ("pairs", "rankings", "ratings", "labels"):
                _goes_round(convert(form, judgements, sets).preferences, folder)
        try:
            found = gather(path, skip_bad=skip)
            read += 1
        except FeedbackError as error:
            assert str(error).strip()
        else:
            _goes_round(found.preferences, folder)
    try:
        sets = read_sets(path)
        with Store(":memory:") as store:
            store.add_sets(sets)
            assert list(store.sets()) == [s.id for s in sets]
        read += 1
    except FeedbackError as error:
        assert str(error).strip()
    return read


def _goes_round(preferences, folder):
    """What was read can be written and read again, and is the same. A prompt that spells out messages is messages."""
    spelled = any(isinstance(p.prompt.content, str) and p.prompt.content.startswith("[{") for p in preferences)
    if preferences and not spelled:
        write_preferences(folder / "again.jsonl", preferences)
        assert [p.as_row() for p in gather(folder / "again.jsonl").preferences] == [p.as_row() for p in preferences]


def fuzz(count, seed, folder):
    read = 0
    for k in range(count):
        rng = random.Random(f"{seed} {k}")
        path = spoilt_file(rng, folder)
        try:
            read += try_file(path, folder) > 0
        except Exception as error:
            raise AssertionError(f"input {k}: {type(error).__name__}: {error}\n{path.read_bytes()[:2000]!r}") from error
    return read


def test_spoilt_files_are_refused_in_words_or_read_whole(tmp_path):
    assert 50 < fuzz(300, 0, tmp_path) < 290, "the inputs are all fine, or all hopeless"


def spoilt_databases(count, folder):
    """How many of them were read, each whole or in words. None is read as something else."""
    path = folder / "whole.db"
    with Store(path) as store:
        prompts = [Prompt(f"{k}?") for k in range(20)]
        sets = [OutputSet(p, (named(p, "Air."), named(p, "No."))) for p in prompts]
        store.add_sets(sets)
        names = {s.id: tuple(o.id for o in s.outputs) for s in sets}
        store.add([Judgement(s.id, "pair", names[s.id], "first", "ada", "pair", comment="why " * 9) for s in sets])
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole, read = path.read_bytes(), 0
    for k in range(count):
        rng, data = random.Random(f"db {k}"), bytearray(whole)
        for _ in range(rng.choice((1, 1, 3, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        spoilt = folder / f"{k}.db"
        spoilt.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        for skip in (False, True):
            try:
                found = gather(spoilt, skip_bad=skip).preferences
            except FeedbackError as error:
                assert str(error).strip()
            else:
                assert {(p.chosen.text, p.rejected.text) for p in found} == {("Air.", "No.")}
                assert len(found) == 20 or skip
                read += 1
    return read


def test_spoilt_judgement_files_are_read_rightly_or_not_at_all(tmp_path):
    assert 10 < spoilt_databases(60, tmp_path) < 110


@pytest.mark.slow
def test_ten_thousand_spoilt_files(tmp_path):
    fuzz(10_000, 1, tmp_path)
