"""Where the cache is, and what files and folders hash to."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from mmlm.errors import ConfigError
from mmlm.storage import cache_folder, cache_root, sha256_of_file, sha256_of_folder


def test_the_environment_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    assert cache_folder("gguf") == tmp_path / "mine" / "gguf"
    assert (tmp_path / "mine" / "gguf").is_dir()


def test_without_it_the_users_cache_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("MMLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "mmlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_root() == Path.home() / ".cache" / "mmlm"


def test_a_cache_that_cannot_be_made_is_refused_with_the_mend(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="MMLM_CACHE"):
        cache_folder("gguf")


def test_a_file_hashes_as_everywhere(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_folder_hashes_by_names_and_contents(tmp_path):
    def folder(name, **files):
        for file, content in files.items():
            path = tmp_path / name / file.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return sha256_of_folder(tmp_path / name)

    first = folder("one", b="2", a="1", deep__c="3")
    assert folder("two", a="1", deep__c="3", b="2") == first
    assert folder("three", a="1", deep__c="3", b="x") != first
    assert folder("four", a="1", deep__d="3", b="2") != first
    assert folder("two", **{".hidden": "x"}) == first
