"""Checkpoints of a running stage: private, atomic, and complete.

A checkpoint appears whole or not at all: it is written beside its place, forced to disk, and
renamed. The one before is deleted only after that, so a full disk leaves the last good one.
It holds every weight that learns or has learnt (in float32), the optimiser, the state of the
random numbers, the place in the data, and how long the logs were. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlm.errors import TrainingError
from mmlm.storage import atomic_folder

_STATE = "state.json"


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Args:
        state: Plain values: stage, step, place in the data, counts.
        weights: What learns or has learnt, by stable name.
        optimizer: The moments, by name.
        random: The states of the random number generators.
    """

    state: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]


def random_state() -> dict[str, Tensor]:
    """Return the states of torch's random numbers on this process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: dict[str, Tensor]) -> None:
    """Go back to states of torch's random numbers."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint and delete the oldest ones beyond `keep`.

    Args:
        folder: The folder of the stage.
        checkpoint: What to write; its step gives the name.
        keep: How many whole checkpoints stay.

    Raises:
        TrainingError: if it cannot be written; earlier checkpoints stay as they are.
    """
    place = folder / f"step-{checkpoint.state['step']:08d}"
    try:
        with atomic_folder(place) as unfinished:
            _write(unfinished, checkpoint)
    except (OSError, SafetensorError) as error:
        left = last_checkpoint(folder)
        stays = f"The last good one is {left.name}. " if left else "There is no earlier one. "
        raise TrainingError(
            f"The checkpoint {place} could not be written: {error}. {stays}Free some space and "
            f"run the same command again: it goes on from there."
        ) from error
    delete_old(folder, keep=keep)
    return place


def delete_old(folder: Path, *, keep: int) -> None:
    """Delete all checkpoints of a stage but the newest, and what a cut-off deletion left behind."""
    kept = _whole(folder)[-keep:]
    for old in set(folder.glob("step-*")) - set(kept):
        shutil.rmtree(old)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    for name in ("weights", "optimizer", "random"):
        tensors = getattr(checkpoint, name)
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(_untied(plain), folder / f"{name}.safetensors")
    text = json.dumps(checkpoint.state, indent=1) + "\n"
    (folder / _STATE).write_text(text, encoding="utf-8")


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory; the format refuses them."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for key, value in tensors.items():
        plain[key] = value.clone() if value.untyped_storage().data_ptr() in seen else value
        seen.add(plain[key].untyped_storage().data_ptr())
    return plain


def _whole(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / _STATE).is_file())


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a stage, or None."""
    found = _whole(folder) if folder.is_dir() else []
    return found[-1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        TrainingError: if a file of it is missing or damaged.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        parts = [load_file(path / f"{n}.safetensors") for n in ("weights", "optimizer", "random")]
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"The checkpoint {path} cannot be read: {error}. Delete this folder to go on from the "
            f"one before it, or begin anew with --fresh."
        ) from None
    return Checkpoint(state, *parts)
