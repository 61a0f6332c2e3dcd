"""The judgement file: append-only, on the disk before it is acknowledged, and plain about what went wrong."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from lossmith.errors import FeedbackError
from lossmith.feedback.judgement import SCHEMA, Judgement
from lossmith.feedback.output_set import OutputSet, named
from lossmith.feedback.store import Store
from lossmith.prompts import Prompt

PROMPT = Prompt("Why?", {"topic": "x"}, "here")
MADE = {"model": "m"}
ONE = OutputSet(PROMPT, (named(PROMPT, "a", made=MADE), named(PROMPT, "b", made=MADE)), MADE)
A, B = (output.id for output in ONE.outputs)


def rating(value=3, **more):
    said = dict(set_id=ONE.id, kind="rating", outputs=(A,), value=value, annotator="Ada", question="rating")
    return Judgement(**(said | {"scale": "1-5"} | more))


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "j.db", patience=0.05) as opened:
        opened.add_sets([ONE])
        yield opened


def test_what_was_written_is_read_back(store):
    said = [rating(comment="é \U0001f600 \x00"), rating(4, annotator="Bob", seconds=1.5)]
    assert store.add(said) == 2
    with Store(store.path, create=False) as again:
        assert again.judgements() == said and again.judgements("Bob") == said[1:]
        (of,) = again.sets().values()
        assert of.as_row() == ONE.as_row()


def test_the_same_id_counts_once_and_the_first_stands(store):
    first = rating()
    assert store.add([first]) == 1
    assert store.add([first, rating(5, id=first.id), rating()]) == 1
    assert [j.value for j in store.judgements()] == [3, 3]


def test_all_or_none(store):
    with pytest.raises(FeedbackError, match="not on the scale"):
        store.add([rating(), rating(9)])
    with pytest.raises(FeedbackError, match="does not hold"):
        store.add([rating(), rating(set_id="0" * 16)])
    assert store.judgements() == []


@pytest.mark.parametrize("change", ["UPDATE judgements SET annotator = 'Eve'", "DELETE FROM judgements"])
def test_judgements_are_never_changed(store, change):
    store.add([rating()])
    with sqlite3.connect(store.path) as other, pytest.raises(sqlite3.IntegrityError, match="never"):
        other.execute(change)
    other.close()
    assert [j.annotator for j in store.judgements()] == ["Ada"]


def test_it_is_durable_by_its_settings(store):
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_an_exit_without_a_word_loses_nothing(tmp_path):
    code = (
        "import os, sys, test_store as t\n"
        "s = t.Store(sys.argv[1]); s.add_sets([t.ONE]); s.add([t.rating()]); os._exit(1)"
    )
    path = tmp_path / "j.db"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parent)
    with Store(path) as store:
        assert len(store.judgements()) == 1


def test_half_a_surrogate_pair_can_be_kept(store):
    odd = OutputSet(PROMPT, (named(PROMPT, "\ud800"), named(PROMPT, "é")))
    assert store.add_sets([odd, odd]) == 1
    assert store.sets()[odd.id].outputs == odd.outputs


def test_a_set_that_could_not_be_read_again_is_not_written(store):
    with pytest.raises(FeedbackError, match="another output"):
        store.add_sets([OutputSet(PROMPT, (named(PROMPT, "c"),), MADE)])  # named without how it was made
    assert list(store.sets()) == [ONE.id]


def test_a_locked_file_says_so_and_goes_on(store):
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(FeedbackError, match=r"locked.*nothing was lost"):
        store.add([rating()])
    assert store.judgements() == []  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    assert store.add([rating()]) == 1


def test_a_full_disk_says_so(store):
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(FeedbackError, match="Free some space"):
        store.add([rating(comment="x" * 100_000)])
    store._db.execute("PRAGMA max_page_count = 100000")
    assert store.add([rating()]) == 1


def test_a_newer_file_and_another_file_are_refused(store, tmp_path):
    with sqlite3.connect(store.path) as other:
        other.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (str(SCHEMA + 1),))
    other.close()
    with pytest.raises(FeedbackError, match="newer version"):
        Store(store.path)
    text = tmp_path / "notes.txt"
    text.write_text("not a database " * 100)
    with pytest.raises(FeedbackError, match="no judgement file"):
        Store(text)
    with pytest.raises(FeedbackError, match="folder"):
        Store(tmp_path / "nowhere" / "j.db")
    with pytest.raises(FeedbackError, match="Annotate first"):
        Store(tmp_path / "none.db", create=False)


def test_one_server_a_file(store):
    with Store(store.path) as second, store.served():
        with pytest.raises(FeedbackError, match="another server"), second.served():
            pass
        assert second.add([rating()]) == 1  # importing meanwhile is no second server
    with store.served():
        pass


def test_accounts(store):
    store.set_account("Ada", "hash")
    store.set_account("Ada", "other")
    assert store.accounts() == {"Ada": "other"}
