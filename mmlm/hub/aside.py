"""A model folder appears whole or not at all.

`mmlm.storage.atomic` writes beside the target, flushes and renames; this module adds what a
model folder needs: it refuses to replace what is no model, keeps what others put beside one, and
says in the user's words what the disk refused. It knows file names and nothing of models.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from mmlm.errors import CheckpointError
from mmlm.storage.atomic import atomic_folder

OURS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "*.gguf",
    "Modelfile",
    "adapter_config.json",
    "delta.json",
    "mmlm.json",
    "recipe.resolved.yaml",
    "README.md",
    ".eval_results",
)


@contextmanager
def written_aside(folder: Path) -> Generator[Path]:
    """Give an empty folder to write into; put it in the place of `folder` at the end.

    Files of an earlier save in `folder` go away with it; what somebody else put there stays.

    Raises:
        CheckpointError: if `folder` holds something that is no model folder, or if the disk
            refuses; an earlier folder is then as it was.
    """
    folder = folder.absolute()
    _refuse_foreign(folder)
    try:
        with atomic_folder(folder) as unfinished:
            yield unfinished
            _keep_what_is_not_ours(folder, unfinished)
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}. "
            f"{'The earlier folder is as it was. ' if folder.exists() else ''}Free some space or "
            f"name another place, and save again."
        ) from error


def _refuse_foreign(folder: Path) -> None:
    """Keep a slip of the pen from replacing somebody's home."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a model is saved as a folder. Name another.")
    names = {path.name for path in folder.iterdir()}
    known = {"config.json", "delta.json", "Modelfile"}
    if names and not names & known:
        raise CheckpointError(
            f"{folder} holds {len(names)} entries, such as {sorted(names)[0]!r}, and no model. "
            f"Saving would replace it. Name an empty or a new folder."
        )


def _keep_what_is_not_ours(folder: Path, unfinished: Path) -> None:
    """Carry over entries that no earlier save wrote; linked, so that nothing is copied."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        ours = any(fnmatchcase(entry.name, pattern) for pattern in OURS)
        if ours or (unfinished / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, unfinished / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, unfinished / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target, follow_symlinks=False)
