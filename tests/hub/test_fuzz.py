"""Five hundred damaged folders: each ends in an error of ours, or in a model that answers.

Damage is drawn from what disks, hands and other tools do: bytes change, files end early, vanish
or stand in for one another, keys of JSON files get other values, tensors are lost, renamed, cast
or cut, shards are exchanged. What loads must answer about a picture, and in finite numbers where
the weights carry a checksum; there no flipped bit goes unnoticed.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmlm.assistant import load
from mmlm.errors import MMLMError
from mmlm.hub import save_mmlm
from mmlm.messages import user
from tests.tiny import compose_tiny, picture

KINDS = ("stock", "bare", "own", "sharded", "delta")
VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 10**7, 0.5, -1e30, "", "x", "gelu", "\u0000",
    [], [1], {}, {"a": 1}, [[1, 2], [3]],
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return folders of one assistant in every form, and what it answers."""
    place = tmp_path_factory.mktemp("saved")
    assistant = compose_tiny(place)
    assistant.save(place / "stock")
    shutil.copytree(place / "stock", place / "bare")
    (place / "bare" / "mmlm.json").unlink()
    save_mmlm(assistant.model, assistant.processor, place / "own")
    assistant.save(place / "delta", delta=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmlm.hub.weights.SHARD_SIZE", "40KB")
        assistant.save(place / "sharded")
    assert len(list((place / "sharded").glob("*.safetensors"))) > 2
    return place


def overwrite(draw: random.Random, folder: Path) -> None:
    path = any_file(draw, folder)
    data = bytearray(path.read_bytes()) or bytearray(b"\0")
    reach = min(len(data), draw.choice((200, 4000, len(data))))
    for _ in range(draw.choice((1, 3, 30))):
        data[draw.randrange(reach)] = draw.randrange(256)
    path.write_bytes(data)


def flip_a_bit(draw: random.Random, folder: Path) -> None:
    path = any_file(draw, folder, ".safetensors")
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def end_early(draw: random.Random, folder: Path) -> None:
    path = any_file(draw, folder)
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data) or 1)])


def vanish(draw: random.Random, folder: Path) -> None:
    any_file(draw, folder).unlink()


def stand_in(draw: random.Random, folder: Path) -> None:
    shutil.copyfile(any_file(draw, folder), any_file(draw, folder))


def other_value(draw: random.Random, folder: Path) -> None:
    path = any_file(draw, folder, ".json")
    values = json.loads(path.read_text())
    inner = values
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(inner[key], dict | list) and inner[key] and draw.random() < 0.7:
            inner = inner[key]
            continue
        if draw.random() < 0.25:
            del inner[key]
        else:
            inner[key] = draw.choice(VALUES)
        break
    path.write_text(json.dumps(values))


def other_tensors(draw: random.Random, folder: Path) -> None:
    path = any_file(draw, folder, ".safetensors")
    state = load_file(path)
    key = draw.choice(sorted(state))
    change = draw.randrange(6)
    value = state[key]
    if change == 0:
        del state[key]
    elif change == 1:
        state[key + draw.choice(("x", ".weight", "_scale"))] = state.pop(key)
    elif change == 2:
        state[key] = value.to(draw.choice((torch.float16, torch.float64, torch.int32, torch.bool)))
    elif change == 3:
        state[key] = value.flatten()[:-1].clone()
    elif change == 4:
        state[key] = value[None].repeat(2, *(1 for _ in value.shape)).contiguous()
    else:
        state["stranger"] = torch.zeros(3)
    save_file(state, path, metadata={"format": "pt"})
    if draw.random() < 0.7:
        (folder / "mmlm.json").unlink(missing_ok=True)  # else the checksum tells


def other_vocabulary(draw: random.Random, folder: Path) -> None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    for token in draw.sample(sorted(vocabulary), draw.choice((1, 20))):
        vocabulary[token] = draw.choice((vocabulary[token] + 1000, -1, 0))
    path.write_text(json.dumps(values))


MUTATIONS = (
    overwrite, flip_a_bit, end_early, vanish, stand_in,
    other_value, other_value, other_value, other_tensors, other_tensors, other_vocabulary,
)  # fmt: skip


def any_file(draw: random.Random, folder: Path, suffix: str = "") -> Path:
    names = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name.endswith(suffix)]
    return draw.choice([path for path in names if path.name != "README.md"] or names)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(5))
def test_five_hundred_damaged_folders_end_in_words_or_in_an_answer(saved, hundred, tmp_path):
    words = read_damaged(saved, range(100 * hundred, 100 * hundred + 100), tmp_path)
    assert 40 <= words < 100  # neither is everything refused, nor nothing noticed


def test_damaged_folders_end_in_words_or_in_an_answer(saved, tmp_path):
    """Fifteen more of them; the five hundred are a slow test."""
    assert 5 <= read_damaged(saved, range(1000, 1015), tmp_path) < 15


def read_damaged(place: Path, seeds: range, work: Path) -> int:
    """Damage a copy for each seed, read it, and count those that ended in words."""
    faults: list[str] = []
    words = 0
    for seed in seeds:
        draw = random.Random(seed)
        kind = KINDS[seed % len(KINDS)]
        copy = work / str(seed)
        for name in ("clip", "llama", kind) if kind == "delta" else (kind,):
            shutil.copytree(place / name, copy / name)
        done = damage(copy / kind, draw)
        said = outcome(copy / kind, done)
        shutil.rmtree(copy)
        words += said == "words"
        if said not in ("words", "answer"):
            faults.append(f"{seed} {kind} {done}: {said}")
    assert not faults, "\n".join(faults)
    return words


def damage(folder: Path, draw: random.Random) -> list[str]:
    """Change a folder once or twice, and return the names of the changes."""
    before = content(folder)
    wanted, done = draw.choice((1, 1, 2)), list[str]()
    while len(done) < wanted:
        change = draw.choice(MUTATIONS)
        try:
            change(draw, folder)
        except (ValueError, OSError, IndexError, KeyError, TypeError, AttributeError):
            continue  # the file that it needs was damaged by the change before
        except SafetensorError:
            continue
        if content(folder) != before:
            done.append(change.__name__)
    return done


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def outcome(folder: Path, done: list[str]) -> str:
    """Read a damaged folder: ``"words"``, ``"answer"``, or what went wrong."""
    try:
        assistant = load(folder, device="cpu")
        turns = [user("What is it?", [picture(3)])]
        encoded = assistant.processor.encode_chat(turns, add_generation_prompt=True)
        with torch.no_grad():
            logits = assistant.model(
                input_ids=torch.tensor([encoded.ids]),
                pixel_values=encoded.pixel_values,
                **assistant.processor.image_processor.sizes(encoded.image_sizes),
            ).logits
        if not torch.isfinite(logits).all() and kept_checksums(folder):
            return "numbers that are not finite, behind checksums"
        if done == ["flip_a_bit"] and kept_checksums(folder):
            return "a flipped bit behind a checksum was not noticed"
    except MMLMError as error:
        text = str(error)
        return "words" if len(text) > 30 else f"too few words: {text!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "answer"


def kept_checksums(folder: Path) -> bool:
    """Whether the folder still holds the hashes of its weights."""
    try:
        return bool(json.loads((folder / "mmlm.json").read_text()).get("weights"))
    except (OSError, ValueError, AttributeError):
        return False
