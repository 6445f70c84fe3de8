"""The folder of a run: what lies in it, whose it is, and what `--fresh` deletes.

A folder belongs to the recipe that was begun in it. The same recipe goes on; a changed one is an
error that says what changed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from mmlm.config import read_yaml
from mmlm.errors import TrainingError
from mmlm.storage import write_atomic
from mmlm.training.recipe import Recipe

_RESOLVED = "recipe.resolved.yaml"
RESULT = "result.json"
_MADE_HERE = (
    "checkpoints", "model", "delta", "nonfinite", "tensorboard",
    "log.jsonl", "growth.jsonl", "quarantine.jsonl", RESULT, _RESOLVED,
)  # fmt: skip
# Settings that change no bit of the result may differ when a run goes on.
_FREE = (
    "run.checkpoint_every", "run.checkpoint_minutes", "run.keep_checkpoints", "run.log_to",
    "run.threads", "run.sharding", "run.offload", "run.deepspeed", "run.feature_cache_gib",
    "run.ask",
)  # fmt: skip


def claim_folder(out: Path, recipe: Recipe, *, is_main: bool) -> None:
    """Write the recipe down, or compare it with the one that was run here before.

    Raises:
        TrainingError: if the folder was begun with another recipe.
    """
    path = out / _RESOLVED
    values = recipe.to_dict()
    if path.is_file():
        changes = changed(read_yaml(path), values)
        if changes:
            raise TrainingError(
                f"{out} was begun with another recipe. Changed:\n"
                + "\n".join(f"  {change}" for change in changes)
                + "\nName another folder with --out, or begin anew with --fresh."
            )
    elif is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, resolved_text(values))


def resolved_text(values: dict[str, Any]) -> str:
    """Write a resolved recipe as YAML that reads back to the same values."""
    head = (
        "# What was run, every value written out.  Run it again:  mmlm train recipe.resolved.yaml\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def changed(old: Any, new: Any) -> list[str]:
    """Return, line by line, in what two recipes differ where it matters.

    >>> changed({"run": {"seed": 0}}, {"run": {"seed": 1}})
    ['run.seed: 0 -> 1']
    """
    before, after = _flat(old), _flat(new)
    keys = [*after, *(key for key in before if key not in after)]
    missing = "(none)"
    return [
        f"{key}: {before.get(key, missing)} -> {after.get(key, missing)}"
        for key in keys
        if before.get(key, missing) != after.get(key, missing)
        and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Lay nested values out as ``a.b.c: value``; stages are named by their names."""
    if isinstance(values, dict) and values:
        pairs = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values and all(isinstance(v, dict) for v in values):
        pairs = [(str(v.get("name", i)), v) for i, v in enumerate(values)]
    else:
        return {path: values}
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= _flat(value, f"{path}.{key}" if path else key)
    return flat


def forget_run(out: Path) -> None:
    """Delete what a run left in its folder, and nothing else that lies there."""
    for name in _MADE_HERE:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
