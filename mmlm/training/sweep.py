"""A sweep: the same recipe with other words in some places, each on the same number of tokens.

A grid names keys of the recipe and the values to try; every combination is a cell, trained by
`train` into a folder of its own. The first cell learns as long as the recipe says; each stage of
the others stops after as many tokens as that one took, for parts that see a picture in fewer
tokens would otherwise learn from less in the same number of epochs. A cell that is done is not
trained again; one that was stopped goes on. Scores are no concern of this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

from mmlm.errors import ConfigError, MMLMError
from mmlm.training.entry import train
from mmlm.training.recipe import read_recipe
from mmlm.training.result import RunResult

_MOST_NAME = 60


@dataclass(frozen=True)
class Cell:
    """One combination.

    Args:
        name: Its folder, made of its values; other values never share it.
        values: Each key of the grid with its value, as written.
    """

    name: str
    values: dict[str, str]


@dataclass
class Outcome:
    """What came of a cell.

    Args:
        cell: Which one.
        result: The training, or None.
        error: Why there is none.
        scores: Rows of a results.json, if anything was measured.
    """

    cell: Cell
    result: RunResult | None = None
    error: str | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return one line of the table, as plain values."""
        row: dict[str, Any] = {"name": self.cell.name, **self.cell.values, "error": self.error}
        if self.result is None:
            return row
        last = self.result.stages[-1]
        return {
            **row,
            "tokens": {stage.name: stage.tokens for stage in self.result.stages},
            "learning": last.learning,
            "seconds": round(sum(stage.seconds for stage in self.result.stages), 1),
            "loss": last.last_loss,
            "validation_loss": last.validation_loss,
            "mfu": last.seen.get("mfu"),
            "peak_gib": last.seen.get("peak_gib"),
            "folder": self.cell.name,
            "scores": self.scores,
        }


def split_values(text: str) -> list[str]:
    """Split at the commas that stand in no brackets.

    >>> split_values("mlp,linear"), split_values("{use: mlp, depth: 2},{use: linear}")
    (['mlp', 'linear'], ['{use: mlp, depth: 2}', '{use: linear}'])
    """
    depth, found = 0, [""]
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [value.strip() for value in found]


def cells_of(grid: Mapping[str, str]) -> list[Cell]:
    """Return every combination of the values, the last key turning fastest.

    Raises:
        ConfigError: if no key has two values, or one has the same twice.

    >>> [cell.name for cell in cells_of({"model.connector.use": "mlp,linear", "run.seed": "1"})]
    ['use=mlp', 'use=linear']
    """
    choices = {key: split_values(value) for key, value in grid.items()}
    for key, values in choices.items():
        if len(set(values)) < len(values) or "" in values:
            raise ConfigError(
                f"{key}={grid[key]}: the values have to differ, and none is empty. Write e.g. "
                f"{key}=one,two."
            )
    if all(len(values) == 1 for values in choices.values()):
        raise ConfigError(
            "Nothing varies in this sweep. Name a key with several values, such as "
            "model.connector.use=mlp,linear."
        )
    varied = [key for key, values in choices.items() if len(values) > 1]
    return [
        Cell(_name({key: found[key] for key in varied}, varied), found)
        for combination in product(*choices.values())
        if (found := dict(zip(choices, combination, strict=True)))
    ]


def _name(values: Mapping[str, str], keys: Sequence[str]) -> str:
    ends = [key.rpartition(".")[2] for key in keys]
    short = [end if ends.count(end) == 1 else key for end, key in zip(ends, keys, strict=True)]
    words = [f"{one}={values[key]}" for one, key in zip(short, keys, strict=True)]
    name = re.sub(r"[^A-Za-z0-9=_.-]+", "_", "+".join(words).replace("+", "--")).strip("_")
    plain = "--".join(words)
    if name == plain and len(name) <= _MOST_NAME:
        return name
    return f"{name[:_MOST_NAME]}-{blake2b(plain.encode(), digest_size=4).hexdigest()}"


def run_cell(
    recipe: str | Path | Mapping[str, Any],
    cell: Cell,
    out: Path,
    *,
    tokens: Mapping[str, int],
    quiet: bool = False,
) -> Outcome:
    """Train one cell, go on with it, or read what it came to.

    Args:
        recipe: What is varied.
        cell: How.
        out: The folder of the sweep.
        tokens: After how many tokens each stage stops; what is left out ends as the recipe says.
        quiet: Show nothing.
    """
    overrides: dict[str, Any] = dict(cell.values)
    for stage, count in tokens.items():
        key = f"stages.{stage}.until"
        if not any(own == key or own.startswith(f"{key}.") for own in cell.values):
            overrides[key] = {"tokens": count}
    try:
        read_recipe(recipe, overrides)
        return Outcome(cell, train(recipe, out / cell.name, overrides=overrides, quiet=quiet))
    except MMLMError as error:
        return Outcome(cell, error=f"{type(error).__name__}: {error}")


def tokens_of(result: RunResult) -> dict[str, int]:
    """Return how many tokens each stage took."""
    return {stage.name: stage.tokens for stage in result.stages}
