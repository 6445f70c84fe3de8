"""Writes are whole or did not happen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmlm.storage.atomic import AppendLog, atomic_folder, recover, write_atomic

ROOT = Path(__file__).parents[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "one.txt").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "deep" / "one.txt").read_text() == "1"
    assert names(tmp_path / "a") == ["b"]


def test_a_folder_replaces_the_earlier_one_as_a_whole(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "a") as unfinished:
            (unfinished / f"{text}.txt").write_text(text)
    assert names(tmp_path / "a") == ["new.txt"]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_earlier_folder(tmp_path, error):
    with atomic_folder(tmp_path / "a") as unfinished:
        (unfinished / "old.txt").write_text("old")
    with pytest.raises(type(error)), atomic_folder(tmp_path / "a") as unfinished:  # noqa: PT012
        (unfinished / "new.txt").write_text("half")
        raise error
    assert names(tmp_path / "a") == ["old.txt"]
    assert names(tmp_path) == ["a"]


def test_a_rename_that_fails_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "a") as unfinished:
        (unfinished / "old.txt").write_text("old")
    original = Path.rename

    def rename(self, target):
        if self.name.startswith(".unfinished-"):
            raise OSError("the disk is gone")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="gone"), atomic_folder(tmp_path / "a") as unfinished:
        (unfinished / "new.txt").write_text("new")
    assert names(tmp_path / "a") == ["old.txt"]


KILLED = """
import os, sys, signal
from pathlib import Path
from mmlm.storage import atomic
moment = sys.argv[2]
original = Path.rename
def rename(self, target):
    if moment == "between" and self.name.startswith(".unfinished-"):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, target)
Path.rename = rename
with atomic.atomic_folder(sys.argv[1]) as unfinished:
    (unfinished / "new.txt").write_text("new")
    if moment == "inside":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["inside", "between"])
def test_a_killed_process_loses_nothing(tmp_path, moment):
    with atomic_folder(tmp_path / "a") as unfinished:
        (unfinished / "old.txt").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "a"), moment],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    recover(tmp_path / "a")
    assert names(tmp_path / "a") == ["old.txt"]
    with atomic_folder(tmp_path / "a") as unfinished:
        (unfinished / "new.txt").write_text("new")
    assert names(tmp_path / "a") == ["new.txt"]
    assert names(tmp_path) == ["a"]  # what the dead process left is gone


def test_a_living_process_is_not_disturbed(tmp_path):
    with atomic_folder(tmp_path / "a") as first:
        (first / "one.txt").write_text("1")
        with atomic_folder(tmp_path / "a") as second:
            (second / "two.txt").write_text("2")
        assert first.exists()
    assert names(tmp_path / "a") == ["one.txt"]


@pytest.mark.parametrize("content", ["text ü", b"\x00\xff"], ids=["text", "bytes"])
def test_a_file_is_written_whole(tmp_path, content):
    write_atomic(tmp_path / "deep" / "a.txt", "old")
    write_atomic(tmp_path / "deep" / "a.txt", content)
    expected = content.encode() if isinstance(content, str) else content
    assert (tmp_path / "deep" / "a.txt").read_bytes() == expected
    assert names(tmp_path / "deep") == ["a.txt"]


def test_a_file_that_cannot_be_flushed_stays_as_it_was(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.txt", "old")

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_log_keeps_its_rows(tmp_path):
    log = AppendLog(tmp_path / "runs" / "log.jsonl")
    assert log.read() == ([], 0)
    log.append({"step": 1}, {"step": 2, "text": "ü\n"})
    log.append({"step": 3})
    assert log.read() == ([{"step": 1}, {"step": 2, "text": "ü\n"}, {"step": 3}], 0)


def test_a_torn_line_is_counted_and_spoils_no_other(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(json.dumps({"step": 1}).encode() + b'\n{"step": 2, "te')
    log = AppendLog(path)
    log.append({"step": 3})
    assert log.read() == ([{"step": 1}, {"step": 3}], 1)
