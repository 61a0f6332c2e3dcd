"""Files are written whole or not at all, and a failure is one sentence."""

import errno
import os
import stat

import pytest

from lossmith import files
from lossmith.errors import RecipeError, RunError


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfsteps = 3\n")
    assert files.read_text(tmp_path / "a.toml", RecipeError, "recipe") == "steps = 3\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "there is no recipe"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_bytes(b"a\nb\xff"), ":2: not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, make, said):
    make(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match=said):
        files.read_text(tmp_path / "r.toml", RecipeError, "recipe")


def test_a_written_file_is_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there_and_says_so(tmp_path, monkeypatch, call):
    files.write_atomically(tmp_path / "a", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RunError, match="the disk is full"):
        files.write_atomically(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_line_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    files.append_line(tmp_path / "m", "1")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="the disk is full"):
        files.append_line(tmp_path / "m", "2")
    assert (tmp_path / "m").read_text() == "1\n"


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    assert files.check_writable(tmp_path / "new" / "o.jsonl").parent.is_dir()
    with pytest.raises(RunError, match="nothing can be written"):
        files.check_writable("/dev/null/x/o.jsonl")
    with pytest.raises(RunError, match="is a folder"):
        files.check_writable(tmp_path)
