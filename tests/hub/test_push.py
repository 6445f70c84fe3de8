"""Sending to the Hub never runs over what somebody else put there."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmlm.errors import CheckpointError
from mmlm.hub import push_folder
from tests.tiny import compose_tiny


class FakeHub:
    """Keeps one repository in memory, with the calls of `HfApi` that are used."""

    files: dict[str, bytes]

    def __init__(self) -> None:
        self.uploads = 0

    def create_repo(self, repo, *, private, exist_ok):
        if repo.startswith("forbidden/"):
            raise PermissionError("403 Forbidden")
        return f"https://hub.example/{repo}"

    def list_repo_files(self, repo):
        return sorted(self.files)

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        self.uploads += 1
        for name in delete_patterns:
            type(self).files.pop(name)
        for path in Path(folder_path).rglob("*"):
            if path.is_file():
                type(self).files[path.relative_to(folder_path).as_posix()] = path.read_bytes()


@pytest.fixture
def hub(monkeypatch):
    FakeHub.files = {".gitattributes": b""}
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    return FakeHub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("push")
    compose_tiny(place).save(place / "model", recipe={"model": {}})
    return place / "model"


def test_a_new_repository_gets_the_whole_folder(hub, folder):
    assert push_folder(folder, "me/vlm") == "https://hub.example/me/vlm"
    assert set(hub.files) == {path.name for path in folder.iterdir()} | {".gitattributes"}


def test_a_second_push_replaces_the_first_and_its_shards(hub, folder):
    push_folder(folder, "me/vlm")
    hub.files["model-00001-of-00002.safetensors"] = b"of an earlier, larger model"
    push_folder(folder, "me/vlm")
    assert "model-00001-of-00002.safetensors" not in hub.files


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"thesis.tex": b""}, r"'thesis\.tex'"),
        ({"config.json": b"{}", "model.safetensors": b""}, "MMLM did not write"),
    ],
    ids=["something else", "somebody's model"],
)
def test_what_somebody_else_put_there_stays_unless_forced(hub, folder, there, said):
    hub.files |= there
    with pytest.raises(CheckpointError, match=said):
        push_folder(folder, "me/vlm")
    assert set(hub.files) == {".gitattributes", *there}
    push_folder(folder, "me/vlm", force=True)
    assert "mmlm.json" in hub.files
    assert "thesis.tex" not in hub.files


def test_a_refusal_of_the_hub_is_said_with_the_mend(hub, folder):
    with pytest.raises(CheckpointError, match=r"403 Forbidden.*hf auth login"):
        push_folder(folder, "forbidden/vlm")
