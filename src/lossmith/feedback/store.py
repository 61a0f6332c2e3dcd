"""Where judgements are kept: one SQLite file, append-only, on the disk before it is acknowledged.

WAL with synchronous=FULL: a process that is killed, or a machine that loses power, loses at most what was in flight.
The sets are in the same file, so judgements and the texts that were read cannot be separated. Triggers refuse to change
or delete a judgement; an undo is a judgement of its own. A checksum beside each judgement shows whether the disk
damaged it; sets are named by what they hold.

The file is as readable as the umask says, until it holds the hashes of passwords: then its owner alone may read it.
"""

from __future__ import annotations

import hashlib
import json
import os
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
    annotator TEXT NOT NULL, row TEXT NOT NULL, checksum TEXT);
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
        if self.path.is_dir():
            raise FeedbackError(f"{str(path)!r} is a folder; give the name of a judgement file.")
        with self._explained("opened"):
            self._db = sqlite3.connect(self.path, timeout=patience, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.executescript(_TABLES)
            if "checksum" not in {row[1] for row in self._db.execute("PRAGMA table_info(judgements)")}:
                self._db.execute("ALTER TABLE judgements ADD COLUMN checksum TEXT")  # an older file's have none
            row = self._db.execute("SELECT CAST(value AS BLOB) FROM meta WHERE key = 'schema'").fetchone()
        if not row[0].isdigit():
            raise FeedbackError(f"{self.path} is damaged: its version is {row[0]!r}. Restore a copy of it.")
        if int(row[0]) > SCHEMA:
            raise FeedbackError(
                f"{self.path} was written by a newer version of lossmith (schema {int(row[0])}; this one reads up to "
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

    def sets(self, bad: list[FeedbackError] | None = None) -> dict[str, OutputSet]:
        """{set id: set}, in the order in which they came. A damaged one is a FeedbackError, or goes to `bad`."""
        with self._explained("read"):
            rows = self._db.execute("SELECT id, CAST(row AS BLOB) FROM sets ORDER BY number").fetchall()
        sets: dict[str, OutputSet] = {}
        for name, row in rows:
            try:
                output_set = read_set(_text(row), f"{self.path.name}: set {name}")
                if output_set.id != name:
                    raise FeedbackError(f"{self.path.name}: set {name} holds another prompt or other outputs.")
                sets[name] = output_set
            except (FeedbackError, UnicodeDecodeError) as error:
                self._damaged(f"{self.path.name}: set {name}", error, bad)
        return sets

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
            row = json_line(j.as_row())
            rows.append((j.id, j.set_id, j.annotator, row, _checksum(row)))
        with self._writing():
            before = self._db.total_changes
            self._db.executemany(
                "INSERT OR IGNORE INTO judgements (id, set_id, annotator, row, checksum) VALUES (?, ?, ?, ?, ?)", rows
            )
            return self._db.total_changes - before

    def judgements(self, annotator: str | None = None, bad: list[FeedbackError] | None = None) -> list[Judgement]:
        """All, or one annotator's, in the order in which they came; undone ones and their undos included.

        A damaged one is a FeedbackError, or goes to `bad`.
        """
        where, values = ("WHERE annotator = ?", (annotator,)) if annotator is not None else ("", ())
        with self._explained("read"):
            rows = self._db.execute(
                f"SELECT number, CAST(row AS BLOB), checksum FROM judgements {where} ORDER BY number", values
            ).fetchall()
        judgements = []
        for number, row, checksum in rows:
            name = f"{self.path.name}: judgement {number}"
            try:
                text = _text(row)
                if checksum is not None and checksum != _checksum(text):
                    raise FeedbackError(f"{name}: its checksum is another than when it was written.")
                judgements.append(Judgement.from_row(json.loads(text), name))
            except (ValueError, RecursionError) as error:  # FeedbackError, and what json and Unicode raise
                self._damaged(name, error, bad)
        return judgements

    def _damaged(self, name: str, error: Exception, bad: list[FeedbackError] | None) -> None:
        what = str(error).removeprefix(f"{name}: ") if isinstance(error, FeedbackError) else "it cannot be read."
        if bad is None:
            raise FeedbackError(
                f"{name} is damaged: {what} Restore a copy of {self.path}, or bring what is whole into a new file: "
                f"lossmith annotate --db NEW.db --import {self.path} --skip-bad"
            ) from None
        bad.append(FeedbackError(f"{name} is damaged: {what}"))

    # -- accounts -----------------------------------------------------------------------------------------------------

    def set_account(self, annotator: str, secret: str) -> None:
        """`secret` is a hash of a password, never the password. From now on only the file's owner can read it."""
        try:
            for suffix in ("", "-wal", "-shm"):
                beside = self.path.with_name(self.path.name + suffix)
                if beside.exists():
                    os.chmod(beside, 0o600)  # SQLite gives those that it makes later the rights of the first
        except OSError as error:
            raise FeedbackError(
                f"{self.path} would hold the hash of a password, and cannot be kept from others: {error.strerror}. "
                "Let its owner make the account."
            ) from None
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
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the second: SQLite quotes what is damaged
            text = "the file is malformed" if isinstance(error, UnicodeDecodeError) else str(error)
            cure = next((cure for sign, cure in _CURES.items() if sign in text), "Nothing was written.")
            raise FeedbackError(f"{self.path} cannot be {done}: {text}. {cure}") from None


def _text(cell: bytes | None) -> str:
    return "" if cell is None else cell.decode()


def _checksum(row: str) -> str:
    return hashlib.blake2b(row.encode(), digest_size=8).hexdigest()


_CURES = {
    "locked": "Another process has been writing to it for long; nothing was lost here: try again, or stop the other.",
    "full": "The disk is full; what was acknowledged is safe. Free some space and try again.",
    "not a database": "It is no judgement file; choose another with --db.",
    "malformed": "The file is damaged; restore a copy, or recover it with sqlite3's .recover.",
    "unable to open": "Is the folder there, and may you write in it?",
    "readonly": "You may not write to it.",
}
