"""A damaged folder ends in an error that names file and mend, or in a model that answers right."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmlm.assistant import load
from mmlm.errors import CheckpointError, MMLMError
from mmlm.hub import load_parts, save_mmlm
from tests.tiny import compose_tiny, picture

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One stock folder, one of MMLM's own and one delta of the same assistant."""
    place = tmp_path_factory.mktemp("saved")
    assistant = compose_tiny(place)
    assistant.save(place / "stock")
    save_mmlm(assistant.model, assistant.processor, place / "own")
    assistant.save(place / "delta", delta=True)
    return place


@pytest.fixture
def copy(saved, tmp_path):
    """Return a function that gives a copy of a saved folder to break."""

    def of(kind: str) -> Path:
        # The base parts stand beside a delta, so they are copied too.
        for name in ("clip", "llama", kind):
            shutil.copytree(saved / name, tmp_path / name)
        return tmp_path / kind

    return of


def edit(file: str, **changes):
    """Return a mutation that changes keys of a JSON file; a dotted key reaches into it."""

    def mutate(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        for dotted, value in changes.items():
            inner = values
            *path, last = dotted.split("__")
            for key in path:
                inner = inner[key]
            if value is ...:
                inner.pop(last)
            else:
                inner[last] = value
        (folder / file).write_text(json.dumps(values))

    return mutate


def remove(*names: str):
    def mutate(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return mutate


def cut(file: str, share: float):
    def mutate(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * share)])

    return mutate


def write(file: str, text: str):
    def mutate(folder: Path) -> None:
        (folder / file).write_text(text)

    return mutate


def tensors(change, file: str = WEIGHTS):
    """Return a mutation of the tensors of a folder that carries no checksums."""

    def mutate(folder: Path) -> None:
        state = load_file(folder / file)
        change(state)
        save_file(state, folder / file, metadata={"format": "pt"})
        (folder / "mmlm.json").unlink(missing_ok=True)

    return mutate


def flip(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / WEIGHTS).write_bytes(data)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def as_index(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


PROJECTOR = "multi_modal_projector.linear_1.weight"
STOCK = {
    "no config": (remove("config.json"), r"config\.json is missing"),
    "empty config": (write("config.json", ""), r"config\.json cannot be read as JSON"),
    "config is a list": (write("config.json", "[]"), r"must hold a JSON object"),
    "config cut off": (cut("config.json", 0.5), r"config\.json cannot be read as JSON"),
    "config with deep nesting": (write("config.json", "[" * 100_000), "cannot be read as JSON"),
    "unknown model type": (edit("config.json", model_type="warp"), "'warp', which MMLM does not"),
    "no model type": (edit("config.json", model_type=...), "model_type 'None'"),
    "another class": (
        edit("config.json", architectures=["LlavaNextForConditionalGeneration"]),
        "names LlavaNextForConditionalGeneration",
    ),
    "another width": (edit("config.json", text_config__hidden_size=64), "has the shape"),
    "more layers": (edit("config.json", text_config__num_hidden_layers=3), "missing"),
    "fewer layers": (edit("config.json", text_config__num_hidden_layers=1), "not known to the"),
    "another tower": (
        edit("config.json", vision_config__model_type="siglip_vision_model"),
        "CheckpointError|missing|not known",
    ),
    "layers joined": (edit("config.json", vision_feature_layer=[-2, -1]), "joins several layers"),
    "layer out of reach": (edit("config.json", vision_feature_layer=-9), "-9 is beyond the tower"),
    "width is a word": (edit("config.json", text_config__hidden_size="wide"), "cannot be loaded"),
    "no text config": (edit("config.json", text_config=...), "missing|not known|shape"),
    "other placeholder": (edit("config.json", image_token_index=3), "the id 259, and config.json"),
    "no weights": (remove(WEIGHTS), r"mmlm\.json lists it"),
    "empty weights": (cut(WEIGHTS, 0), "sha256 differs"),
    "half the weights": (cut(WEIGHTS, 0.5), "sha256 differs"),
    "a flipped bit": (flip, "sha256 differs"),
    "pickled weights": (pickled, r"mmlm\.json lists it|pickled"),
    "missing shard": (as_index, "1 of 1 shards are missing"),
    "a tensor too few": (tensors(lambda s: s.pop(PROJECTOR)), "1 missing"),
    "a tensor too many": (
        tensors(lambda s: s.update({"adapter.weight": torch.ones(2)})),
        "1 of .* tensors have no place.*adapter.weight",
    ),
    "a tensor of another shape": (
        tensors(lambda s: s.update({PROJECTOR: torch.ones(3, 3)})),
        r"layers\.0\.weight has the shape \(3, 3\)",
    ),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer"),
    "half a tokenizer": (cut("tokenizer.json", 0.5), "cannot be loaded"),
    "no processor config": (
        lambda f: remove("processor_config.json", "mmlm.json")(f),
        r"processor_config\.json is missing",
    ),
    "image processor of no size": (
        lambda f: (
            edit("processor_config.json", image_processor__size={})(f),
            remove("mmlm.json")(f),
        ),
        "size cannot be read",
    ),
    "pictures are not resized": (
        lambda f: (
            edit("processor_config.json", image_processor__do_resize=False)(f),
            remove("mmlm.json")(f),
        ),
        "`do_resize` is false",
    ),
    "prefix count is a word": (
        lambda f: (
            edit("processor_config.json", num_additional_image_tokens="one")(f),
            remove("mmlm.json")(f),
        ),
        "must be a whole number",
    ),
    "generation config cut off": (cut("generation_config.json", 0.3), r"generation_config\.json"),
    "note cut off": (cut("mmlm.json", 0.3), r"mmlm\.json cannot be read"),
    "template with an error": (write("chat_template.jinja", "{% for"), r"chat_template\.jinja"),
}


@pytest.mark.parametrize("name", STOCK)
def test_a_damaged_stock_folder_is_refused(copy, name):
    mutate, said = STOCK[name]
    folder = copy("stock")
    mutate(folder)
    with pytest.raises(MMLMError, match=said) as caught:
        load_parts(folder)
    assert str(folder) in str(caught.value) or "template" in str(caught.value)


OWN = {
    "no facts": (edit("config.json", vision_facts=None), "VisionFacts"),
    "unknown connector": (edit("config.json", connector={"use": "mpl"}), "Did you mean 'mlp'"),
    "another connector": (edit("config.json", connector={"use": "linear"}), "missing"),
    "unknown policy": (edit("config.json", image={"use": "squish"}), "squash"),
    "a reducer that was not there": (
        edit("config.json", reducer={"use": "pixel_shuffle", "factor": 2}),
        "has the shape",
    ),
    "a tensor too few": (tensors(lambda s: s.pop("model.connector.layers.0.bias")), "1 missing"),
}


@pytest.mark.parametrize("name", OWN)
def test_a_damaged_folder_of_our_own_is_refused(copy, name):
    mutate, said = OWN[name]
    folder = copy("own")
    mutate(folder)
    with pytest.raises(MMLMError, match=said):
        load_parts(folder)


def other_base(folder: Path) -> None:
    path = folder.parent / "llama" / WEIGHTS
    state = load_file(path)
    state["model.norm.weight"] += 0.5
    save_file(state, path, metadata={"format": "pt"})


DELTA = {
    "no delta tensors": (remove("delta.safetensors"), "delta.safetensors is missing|holds no"),
    "half the tensors": (cut("delta.safetensors", 0.5), "sha256 differs"),
    "no bases": (edit("delta.json", bases=...), "`bases` is missing or damaged"),
    "delta.json cut off": (cut("delta.json", 0.5), "cannot be read as JSON"),
    "the base is gone": (
        lambda f: shutil.rmtree(f.parent / "llama"),
        "language .* cannot be loaded again",
    ),
    "the base is another": (other_base, "language part was learnt on another base"),
}


@pytest.mark.parametrize("name", DELTA)
def test_a_damaged_delta_is_refused(copy, name):
    mutate, said = DELTA[name]
    folder = copy("delta")
    mutate(folder)
    with pytest.raises(CheckpointError, match=said):
        load_parts(folder)


@pytest.mark.parametrize("source", ["nowhere/at/all", "./nowhere", "just-a-name"])
def test_what_is_neither_folder_nor_hub_id_is_said(source):
    with pytest.raises(CheckpointError, match=r"no folder .* no Hub id"):
        load_parts(source)


def test_a_file_is_not_a_folder(saved):
    with pytest.raises(CheckpointError, match=r"is a file\. Name the folder"):
        load_parts(saved / "stock" / "config.json")


def test_a_stale_note_is_not_believed(copy, saved):
    """Somebody re-trained the folder with other tools; the note describes what it was."""
    folder = copy("stock")
    edit("mmlm.json", composition__image={"use": "letterbox"}, weights={})(folder)
    edit("config.json", projector_hidden_act="relu")(folder)
    model, _ = load_parts(folder)
    assert model.config.connector["activation"] == "relu"
    assert model.config.image == {"use": "squash"}


@pytest.mark.parametrize("kind", ["stock", "own"])
@pytest.mark.parametrize("seed", range(12))
def test_random_damage_ends_in_an_error_of_ours_or_in_the_right_answer(copy, saved, kind, seed):
    """Bytes of the small files are overwritten at random places, as a bad disk does."""
    folder, draw = copy(kind), random.Random(seed)
    small = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".safetensors"))
    for path in draw.sample(small, 2):
        data = bytearray(path.read_bytes())
        for _ in range(3):
            data[draw.randrange(min(len(data), 4000))] = draw.randrange(256)
        path.write_bytes(data)
    try:
        model, processor = load_parts(folder)
    except MMLMError as error:
        assert str(error)  # noqa: PT017
        return
    assert model.config.image_token_id == processor.image_token_id


def test_the_copy_without_damage_answers(copy, saved):
    question = ("What is it?", [picture(3)])
    wanted = load(saved / "stock", device="cpu").answer(*question, max_new_tokens=6)
    for kind in ("stock", "own", "delta"):
        assert load(saved / kind, device="cpu").answer(*question, max_new_tokens=6) == wanted
