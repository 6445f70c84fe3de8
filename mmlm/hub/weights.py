"""Weights on disk: safetensors and nothing else, whole or not at all.

This module reads and writes the tensors of a model folder. It knows file names, shards and
checksums, and no model: which key belongs where is the work of `mmlm.hub.keymaps`. Nothing is
ever unpickled, and a folder from which a tensor is missing is refused before a model is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmlm.errors import CheckpointError
from mmlm.storage.parts import hash_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "mmlm.json"
PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
SHARD_SIZE = "4GB"


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of a model folder.

    Raises:
        CheckpointError: if the file is missing, unreadable, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing, so {path.parent} is not a complete model folder. Copy or "
            f"download the folder again, or name the folder one level deeper."
        ) from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}). The file is damaged: copy or download "
            f"the folder again."
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object (got {type(values).__name__}). Copy or download "
            f"the folder again."
        )
    return values


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, in order.

    Raises:
        CheckpointError: if there are none, if a shard is missing, or if the folder holds
            only pickled weights.
    """
    index = folder / INDEX
    if index.is_file():
        return _shards(index)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled:
        raise CheckpointError(
            f"{folder} holds its weights as {pickled[0]}, a pickled file, which can run any code "
            f"when it is opened. MMLM reads safetensors only: convert the file with a tool that "
            f"you trust, in a place that you can lose."
        )
    raise CheckpointError(
        f"{folder} holds no {WEIGHTS} (or {INDEX} with its shards). The folder is half written "
        f"or is no model folder: save or download it again."
    )


def _shards(index: Path) -> list[Path]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(
            f"{index}: `weight_map` must map tensor names to file names. The file is damaged: "
            f"copy or download the folder again."
        )
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: `weight_map` names the file {name!r}; expected a .safetensors file in "
                f"the same folder. Copy or download the folder again."
            )
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent}: {len(absent)} of {len(names)} shards are missing: "
            f"{', '.join(absent[:4])}. Copy or download them beside {INDEX}."
        )
    return [index.parent / name for name in names]


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder into memory-mapped CPU tensors.

    Raises:
        CheckpointError: naming the file that is truncated, damaged or in disagreement with
            the index.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for key, value in read_file(path).items():
            if key in state:
                raise CheckpointError(
                    f"{path}: the tensor {key!r} stands in two shards. Copy or download the "
                    f"folder again."
                )
            state[key] = value
    if (folder / INDEX).is_file():
        promised = set(read_json(folder / INDEX)["weight_map"])
        if absent := sorted(promised - set(state)):
            raise CheckpointError(
                f"{folder / INDEX} promises {len(absent)} tensors that no shard holds, such as "
                f"{absent[0]!r}. A shard is of another model: download the folder again."
            )
    return state


def read_file(path: Path) -> dict[str, Tensor]:
    """Read one safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(
            f"{path} ({size:,} bytes) is no whole safetensors file: {error}. It was cut off or "
            f"damaged: copy or download it again."
        ) from None


def write_state(state: Mapping[str, Tensor], folder: Path, *, stem: str = "model") -> None:
    """Write tensors as one safetensors file, or as shards with an index where they are large."""
    from huggingface_hub import save_torch_state_dict

    plain = {key: value.detach().to("cpu").contiguous() for key, value in state.items()}
    _refuse_not_finite(plain)
    save_torch_state_dict(
        _apart(plain),
        folder,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
        metadata={"format": "pt"},
    )


def _refuse_not_finite(state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"The tensor {key!r} holds values that are not finite. The training diverged: "
                f"start again from an earlier checkpoint with a smaller `peak_lr`."
            )


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor a memory of its own: two names of one tensor are both written."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for key, value in state.items():
        pointer = value.data_ptr()
        apart[key] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return apart


def hash_weights(folder: Path) -> dict[str, str]:
    """Return the sha256 of every safetensors file of a folder."""
    return {path.name: hash_of(path) for path in sorted(folder.glob("*.safetensors"))}


def check_weights(folder: Path, hashes: Mapping[str, str]) -> None:
    """Compare the safetensors files with the sha256 that was written when they were saved.

    Raises:
        CheckpointError: naming the file that is missing or has changed.
    """
    for name, wanted in hashes.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing; {MANIFEST} lists it. Copy or download the folder again."
            )
        if hash_of(path) != wanted:
            raise CheckpointError(
                f"{path} is not the file that was saved: its sha256 differs from the one in "
                f"{MANIFEST}, so it is damaged or was replaced. Copy or download it again; if you "
                f"replaced it on purpose, delete {folder / MANIFEST}."
            )
