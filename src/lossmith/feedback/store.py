"""Where judgements are kept: one SQLite file, append-only, on the disk before it is acknowledged.

WAL with synchronous=FULL: a process that is killed, or a machine that loses power, loses at most what was in flight.
The sets stand in the same file, so judgements and the texts that were read can never part. Triggers refuse to change
or delete a judgement; an undo is a judgement of its own.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lossmith.errors import FeedbackError
from lossmith.feedback.judgement import SCHEMA, Judgement
from lossmith.feedback.output_set import OutputSet, json_line, read_set
from lossmith.files import at_home

__all__ = ["Store"]

_TABLES = f"""
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT OR IGNORE INTO meta VALUES ('schema', '{SCHEMA}');
CREATE TABLE IF NOT EXISTS sets (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, row TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS judgements (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, set_id TEXT NOT NULL REFERENCES sets(id),
    annotator TEXT NOT NULL, row TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_annotator ON judgements (annotator, number);
CREATE TABLE IF NOT EXISTS accounts (annotator TEXT PRIMARY KEY, secret TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS no_change BEFORE UPDATE ON judgements BEGIN
    SELECT RAISE(ABORT, 'judgements are never changed'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON judgements BEGIN
    SELECT RAISE(ABORT, 'judgements are never deleted'); END;
"""


class Store:
    """The judgements of a file. One connection a thread: open a Store in each."""

    def __init__(self, path: str | Path, *, create: bool = True, patience: float = 5.0) -> None:
        """patience: seconds to wait for another process that is writing."""
        self.path = at_home(path, FeedbackError)
        if not create and not self.path.exists():
            raise FeedbackError(f"there is no judgement file {str(path)!r}. Annotate first: lossmith annotate SETS.")
        with self._explained("opened"):
            self._db = sqlite3.connect(self.path, timeout=patience, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.executescript(_TABLES)
            schema = self._db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0]
        if not str(schema).isdecimal():
            raise FeedbackError(f"{self.path} is damaged: its schema is {schema!r}. Restore a copy of the file.")
        if int(schema) > SCHEMA:
            raise FeedbackError(
                f"{self.path} was written by a newer version of lossmith (schema {schema}; this one reads up to "
                f"{SCHEMA}). Update lossmith."
            )

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- sets ---------------------------------------------------------------------------------------------------------

    def add_sets(self, sets: Iterable[OutputSet]) -> int:
        """How many were new. A set is named by what it holds, so one that is there already is left alone.

        FeedbackError: a set that could not be read again, for its outputs were named otherwise than by what they hold.
        """
        rows = [(s.id, json_line(s.as_row())) for s in sets]
        for name, row in rows:
            read_set(row, f"set {name}")
        with self._writing():
            before = self._db.total_changes
            self._db.executemany("INSERT OR IGNORE INTO sets (id, row) VALUES (?, ?)", rows)
            return self._db.total_changes - before

    def sets(self) -> dict[str, OutputSet]:
        """{set id: set}, in the order in which they came."""
        with self._explained("read"):
            rows = self._db.execute("SELECT id, row FROM sets ORDER BY number").fetchall()
        return {name: read_set(_text(row), f"{self.path.name}: set {name}") for name, row in rows}

    # -- judgements ---------------------------------------------------------------------------------------------------

    def add(self, judgements: Iterable[Judgement], sets: dict[str, OutputSet] | None = None) -> int:
        """Write all or none; returns how many were new. When it returns, they are on the disk.

        The same id again is the same click again, and counts once. FeedbackError: a judgement that makes no sense of
        its set, or of a set that is not here; the database is locked; the disk is full.
        """
        known = self.sets() if sets is None else sets
        rows = []
        for j in judgements:
            if j.set_id not in known:
                raise FeedbackError(
                    f"the judgement is about the set {j.set_id!r}, which {self.path} does not hold. Add its sets first."
                )
            j.check(known[j.set_id])
            rows.append((j.id, j.set_id, j.annotator, json_line(j.as_row())))
        with self._writing():
            before = self._db.total_changes
            self._db.executemany(
                "INSERT OR IGNORE INTO judgements (id, set_id, annotator, row) VALUES (?, ?, ?, ?)", rows
            )
            return self._db.total_changes - before

    def judgements(self, annotator: str | None = None) -> list[Judgement]:
        """All, or one annotator's, in the order in which they came; undone ones and their undos included."""
        where, values = ("WHERE annotator = ?", (annotator,)) if annotator is not None else ("", ())
        with self._explained("read"):
            rows = self._db.execute(f"SELECT number, row FROM judgements {where} ORDER BY number", values).fetchall()
        found = []
        for number, row in rows:
            where = f"{self.path.name}: judgement {number}"
            try:
                read = json.loads(_text(row))
            except (ValueError, RecursionError) as error:
                raise FeedbackError(f"{where} is damaged: {error}. Restore a copy of the file.") from None
            found.append(Judgement.from_row(read, where))
        return found

    # -- accounts -----------------------------------------------------------------------------------------------------

    def set_account(self, annotator: str, secret: str) -> None:
        """`secret` is a hash of a password, never the password."""
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO accounts VALUES (?, ?)", (annotator, secret))

    def accounts(self) -> dict[str, str]:
        with self._explained("read"):
            return dict(self._db.execute("SELECT annotator, secret FROM accounts").fetchall())

    # -- one server a file --------------------------------------------------------------------------------------------

    @contextmanager
    def served(self) -> Iterator[None]:
        """Held while a server runs on the file; a second one is refused. The lock dies with its process."""
        import fcntl  # POSIX; reading and converting work without it

        with self.path.with_name(self.path.name + ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FeedbackError(
                    f"another server is already running on {self.path}: use its link, or stop it first. Several "
                    "annotators can use one server at once."
                ) from None
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._explained("written"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        """SQLite's errors with what to do about them."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            cure = next((cure for sign, cure in _CURES.items() if sign in text), "Nothing was written.")
            raise FeedbackError(f"{self.path} cannot be {done}: {text}. {cure}") from None


def _text(row: object) -> str:
    """A row of a damaged file may be anything; what is no text is no JSON either."""
    return row if isinstance(row, str) else ""


_CURES = {
    "locked": "Another process is writing to it for long; nothing was lost here: try again, or stop the other one.",
    "full": "The disk is full; what was acknowledged is safe. Free some space and try again.",
    "not a database": "It is no judgement file; choose another with --db.",
    "malformed": "The file is damaged; restore a copy, or recover it with sqlite3's .recover.",
    "unable to open": "Is the folder there, and may you write in it?",
    "readonly": "You may not write to it.",
}
