"""Finds recipes by name: in a checkout, and inside the installed package.

The YAML files live in the outer folders of the repository, where people look for them; the
wheel carries the same files as ``mmlm/_recipes/``. This module finds and lists files. What
they mean is known to the rooms that read them: `mmlm.training`, `mmlm.data`,
`mmlm.evaluation`.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

from mmlm.errors import ConfigError

Kind = Literal["train", "eval", "mixtures", "sources"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_PACKAGE = Path(__file__).parent
_CHECKOUT_FOLDERS: dict[Kind, str] = {
    "train": "train/recipes",
    "eval": "eval/benchmarks",
    "mixtures": "data_recipes/mixtures",
    "sources": "data_recipes/sources",
}
_WORDS: dict[Kind, str] = {
    "train": "recipe",
    "eval": "benchmark",
    "mixtures": "mixture",
    "sources": "data source",
}


def recipe_folder(kind: Kind) -> Path:
    """Return the folder that holds the recipes of a kind."""
    if _is_checkout():
        return _PACKAGE.parent / _CHECKOUT_FOLDERS[kind]
    return _PACKAGE / "_recipes" / kind


def deepspeed_folder() -> Path:
    """Return the folder that holds the settings of DeepSpeed, one JSON file a sharding."""
    if _is_checkout():
        return _PACKAGE.parent / "train" / "deepspeed"
    return _PACKAGE / "_recipes" / "deepspeed"


def list_recipes(kind: Kind) -> dict[str, Path]:
    """Return every recipe of a kind: its name and its file, in order of the names."""
    return {path.stem: path for path in sorted(recipe_folder(kind).glob("*.yaml"))}


def find_recipe(kind: Kind, name: str | Path) -> Path:
    """Return the file of a recipe, given its name or any path.

    Raises:
        ConfigError: if it is neither; the message lists the names there are.
    """
    known = list_recipes(kind)
    if str(name) in known:
        return known[str(name)]
    if Path(name).is_file():
        return Path(name)
    near = get_close_matches(Path(name).stem, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"No {_WORDS[kind]} is named {str(name)!r}, and there is no such file.{hint} "
        f"Known: {', '.join(known) or 'none'}."
    )


def first_line(path: Path) -> str:
    r"""Return the first comment line of a recipe: what it is, in a sentence.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.yaml"
    >>> _ = path.write_text("# CLIP and a small Llama.\nmodel: {}\n")
    >>> first_line(path)
    'CLIP and a small Llama.'
    """
    with path.open(encoding="utf-8") as lines:
        line = next(lines, "")
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def _is_checkout() -> bool:
    """Whether this file lies in a clone of the repository (and not in an installed package)."""
    return (_PACKAGE.parent / "pyproject.toml").is_file() and (
        _PACKAGE.parent / _CHECKOUT_FOLDERS["train"]
    ).is_dir()
