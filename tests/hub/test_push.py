"""Sending to the Hub, spoken with a server: whole folders arrive, and nothing is run over."""

from __future__ import annotations

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from mmlm.errors import CheckpointError
from mmlm.hub import push_folder
from tests.hub.fake_hub import running
from tests.tiny import compose_tiny

SCORE = {
    "set": "POPE", "question": "f1", "condition": "image", "n": 9000, "score": 0.859,
    "low": 0.851, "high": 0.867, "dataset_id": "lmms-lab/POPE", "task_id": "pope",
}  # fmt: skip
NOTES = {
    "scores": [SCORE],
    "licence": "apache-2.0",
    "licences": {"vision": "mit", "language": "apache-2.0"},
    "dropped": {"image cannot be opened": 3},
    "title": "A small assistant",
}


@pytest.fixture
def hub(monkeypatch):
    with running() as fake:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("push")
    assistant = compose_tiny(place)
    assistant.notes = NOTES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmlm.hub.weights.SHARD_SIZE", "60KB")
        assistant.save(place / "model", recipe={"model": {"vision": {"use": "hf"}}})
    return place / "model"


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_new_repository_gets_the_whole_folder(hub, folder):
    assert push_folder(folder, "me/vlm", private=True) == f"{hub.address}/me/vlm"
    assert hub.repos["me/vlm"] == content(folder) | {".gitattributes": b""}
    assert hub.private["me/vlm"]
    assert hub.commits == ["Upload a model made with MMLM"]


def test_what_arrives_has_shards_recipe_card_and_scores(hub, folder):
    push_folder(folder, "me/vlm")
    files = hub.repos["me/vlm"]
    shards = {name for name in files if name.endswith(".safetensors")}
    assert len(shards) > 1
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == shards
    assert yaml.safe_load(files["recipe.resolved.yaml"])["model"]["vision"] == {"use": "hf"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "apache-2.0"
    for words in ("85.1 % to 86.7 %", "image cannot be opened", "mit", "## Opens in"):
        assert words in card.text
    (entry,) = yaml.safe_load(files[".eval_results/pope.yaml"])
    assert entry["dataset"] == {"id": "lmms-lab/POPE", "task_id": "pope"}
    assert entry["value"] == 85.9


def test_a_second_push_replaces_the_first_and_its_shards(hub, folder):
    push_folder(folder, "me/vlm")
    hub.repos["me/vlm"]["model-00009-of-00009.safetensors"] = b"of an earlier, larger model"
    push_folder(folder, "me/vlm")
    assert hub.repos["me/vlm"] == content(folder) | {".gitattributes": b""}


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"thesis.tex": b""}, r"'thesis\.tex'"),
        ({"README.md": b"my diary"}, r"'README\.md'"),
        ({"config.json": b"{}", "model.safetensors": b""}, r"2 files .* 'config\.json'"),
        ({"mmlm.json": b"{}", "notebook.ipynb": b""}, r"1 files .* 'notebook\.ipynb'"),
    ],
    ids=["something else", "a page", "somebody's model", "a notebook beside a model of ours"],
)
def test_what_somebody_else_put_there_stays_unless_forced(hub, folder, there, said):
    hub.repos["me/vlm"] = {".gitattributes": b"", **there}
    with pytest.raises(CheckpointError, match=said):
        push_folder(folder, "me/vlm")
    assert hub.repos["me/vlm"] == {".gitattributes": b"", **there}
    push_folder(folder, "me/vlm", force=True)
    assert hub.repos["me/vlm"] == content(folder) | {".gitattributes": b""}


def test_who_writes_there_in_the_meantime_is_not_run_over(hub, folder):
    push_folder(folder, "me/vlm")
    hub.before_commit = lambda: hub.repos["me/vlm"].update({"new.txt": b"just written"})
    with pytest.raises(CheckpointError, match="Nothing was changed there"):
        push_folder(folder, "me/vlm")
    assert hub.repos["me/vlm"]["new.txt"] == b"just written"


def test_a_licence_that_stands_there_is_kept(hub, folder):
    hub.repos["me/vlm"] = {".gitattributes": b"", "LICENSE": b"mine"}
    push_folder(folder, "me/vlm")
    assert hub.repos["me/vlm"]["LICENSE"] == b"mine"


def test_a_refusal_of_the_hub_is_said_with_the_mend(hub, folder):
    with pytest.raises(CheckpointError, match=r"403[\s\S]*hf auth login"):
        push_folder(folder, "forbidden/vlm")
