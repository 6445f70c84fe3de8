"""A folder appears whole or not at all."""

from __future__ import annotations

import errno

import pytest

from mmlm.errors import CheckpointError
from mmlm.hub.aside import written_aside
from mmlm.storage import atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save(folder, text):
    with written_aside(folder) as place:
        (place / "config.json").write_text(text)


def test_a_folder_is_written_and_nothing_is_left_beside_it(tmp_path):
    save(tmp_path / "model", "one")
    save(tmp_path / "model", "two")
    assert (tmp_path / "model" / "config.json").read_text() == "two"
    assert names(tmp_path) == ["model"]


def test_an_error_while_writing_leaves_the_earlier_folder(tmp_path):
    save(tmp_path / "model", "one")
    with pytest.raises(RuntimeError, match="broke"), written_aside(tmp_path / "model") as place:  # noqa: PT012
        (place / "config.json").write_text("two")
        raise RuntimeError("broke")
    assert (tmp_path / "model" / "config.json").read_text() == "one"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("step", ["_sync", "_swap"])
def test_a_full_disk_leaves_the_earlier_folder(tmp_path, monkeypatch, step):
    save(tmp_path / "model", "one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, step, full)
    with pytest.raises(CheckpointError, match=r"No space left.*earlier folder is as it was"):
        save(tmp_path / "model", "two")
    assert (tmp_path / "model" / "config.json").read_text() == "one"
    assert names(tmp_path) == ["model"]


def test_when_the_last_rename_fails_the_earlier_folder_returns(tmp_path, monkeypatch):
    save(tmp_path / "model", "one")
    path_class = type(tmp_path)
    rename = path_class.rename

    def sometimes(self, target):
        if self.name.startswith(".unfinished-"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(path_class, "rename", sometimes)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path / "model", "two")
    assert (tmp_path / "model" / "config.json").read_text() == "one"


def test_what_somebody_else_put_into_the_folder_stays(tmp_path):
    save(tmp_path / "model", "one")
    (tmp_path / "model" / ".git").mkdir()
    (tmp_path / "model" / "results.json").write_text("[]")
    (tmp_path / "model" / "model-00001-of-00002.safetensors").write_text("of the earlier save")
    save(tmp_path / "model", "two")
    assert names(tmp_path / "model") == [".git", "config.json", "results.json"]


def test_a_folder_that_holds_no_model_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"'thesis\.tex', and no model"):
        save(tmp_path, "one")
    assert names(tmp_path) == ["thesis.tex"]
