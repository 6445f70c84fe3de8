"""A benchmark is a YAML file: where the rows are, what is asked, and how it is scored.

    schema, tables ──► items ──► benchmark ──► conditions ──► runner
                                 you are here

`load_benchmark` reads the file and every row of it, and checks that each can be asked and
scored before anything is answered. Nothing is left out in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmlm.config import read_yaml
from mmlm.errors import ConfigError, DataError, EvaluationError
from mmlm.evaluation.benchmarks.items import Item, fill, make_items, raise_faults
from mmlm.evaluation.benchmarks.schema import BenchmarkConfig, DatasetConfig
from mmlm.evaluation.benchmarks.tables import Table, exploded, joined, read_hub, read_table
from mmlm.evaluation.scorers import ScorerConfig, read_scorer
from mmlm.generation import GenerationSettings
from mmlm.recipes import find_recipe, list_recipes


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with its rows read and checked."""

    name: str
    config: BenchmarkConfig
    items: tuple[Item, ...]
    scorers: Mapping[str, ScorerConfig]
    settings: GenerationSettings
    revision: str = ""
    """The commit of a dataset from the Hub, as it was read."""

    @property
    def kinds(self) -> list[str]:
        """The kinds of question, in order of first appearance."""
        return list(dict.fromkeys(item.kind for item in self.items))

    def prompt(self, item: Item, choices: Sequence[str] | None = None) -> str:
        """Return the question as the model reads it, with the choices in the given order."""
        column = self.config.prompt_by
        which = item.kind if column is None else str(item.columns.get(column))
        template = _by_kind(self.config.question, which, f"{self.name}: question")
        return fill(template, item.columns, item.target.choices if choices is None else choices)


def load_benchmark(
    source: str | Path | BenchmarkConfig, *, data: Path | None = None, name: str = ""
) -> Benchmark:
    """Read a benchmark and every row of it.

    Args:
        source: The name of a benchmark of ours, the path of a YAML file, or a config.
        data: Where the rows are, instead of what the file says.
        name: What to call it; by default what the file says, else the file's name.

    Raises:
        ConfigError: if the file is wrong.
        DataError: if the rows cannot be read.
        EvaluationError: if rows cannot be asked or scored; the message names them.
    """
    folder = Path.cwd()
    if isinstance(source, BenchmarkConfig):
        config = source
    else:
        path = find_recipe("eval", source)
        config = load_config(path)
        folder, name = path.parent, name or config.set or path.stem
    name = name or config.set or "benchmark"
    rows, picture_folders, revision = _rows(config, folder, data)
    rows = _keep(rows, config.dataset.where, name)
    kinds = [_kind(config, row, number) for number, row in enumerate(rows)]
    scorers = {
        kind: _beside(
            read_scorer(_by_kind(config.scorer, kind, f"{name}: scorer"), origin=f"{name}: scorer"),
            picture_folders,
        )
        for kind in dict.fromkeys(kinds)
    }
    items = make_items(name, config, rows, kinds, picture_folders)
    settings = GenerationSettings.from_dict(
        {"max_new_tokens": 32, **config.generate}, origin=f"{name}: generate"
    )
    benchmark = Benchmark(name, config, items, scorers, settings, revision)
    _check_scorable(benchmark)
    return benchmark


def load_config(source: str | Path) -> BenchmarkConfig:
    """Read the file of a benchmark, and none of its rows."""
    path = find_recipe("eval", source)
    return BenchmarkConfig.from_dict(_mapping(read_yaml(path), path), origin=str(path))


def suite(name: str) -> list[str]:
    """Return the benchmarks of ours that belong to a suite.

    Raises:
        ConfigError: if none does; names the suites that there are.
    """
    suites: dict[str, list[str]] = {}
    for member in list_recipes("eval"):
        for each in load_config(member).suites:
            suites.setdefault(each, []).append(member)
    if name not in suites:
        near = get_close_matches(name, suites, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"No suite is named {name!r}.{hint} Known: {', '.join(sorted(suites))}.")
    return suites[name]


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} must hold keys and values, as a benchmark does (got {value!r:.60})."
        )
    return value


def _rows(
    config: BenchmarkConfig, folder: Path, data: Path | None
) -> tuple[Table, list[Path], str]:
    """Return the rows, the folders in which picture paths may begin, and the commit."""
    dataset = config.dataset
    named = [name for name in ("path", "build", "hub") if getattr(dataset, name) is not None]
    if data is None and len(named) != 1:
        raise ConfigError(
            f"dataset: name exactly one of path, build and hub (got {', '.join(named) or 'none'})."
        )
    if data is None and dataset.hub is not None:
        rows, revision = _read(dataset, Path(), from_hub=True)
        return rows, [Path(dataset.images or ".")], revision
    path = data or _local(dataset, folder)
    base = path if path.is_dir() else path.parent
    folders = [base]
    if dataset.images is not None:
        folders = [base / dataset.images, folder / dataset.images, Path(dataset.images), base]
    return _read(dataset, path, from_hub=False)[0], folders, ""


def _read(dataset: DatasetConfig, path: Path, *, from_hub: bool) -> tuple[Table, str]:
    """Read the rows of all subsets, with the columns of a second table, one row for each entry."""

    def read(config: str | None, split: str, source: Path = path) -> tuple[Table, str]:
        if not from_hub:
            return read_table(source, config=config, split=split), ""
        assert dataset.hub is not None
        return read_hub(dataset.hub, config=config, split=split, revision=dataset.revision)

    several = isinstance(dataset.config, tuple)
    if several and not from_hub:
        # A copy in one file, or without a folder for each subset, is read once.
        several = path.is_dir() and any((path / name).is_dir() for name in dataset.config or ())
    if several:
        parts = [(name, *read(name, dataset.split)) for name in dataset.config or ()]
        rows = [{**row, "subset": name} for name, each, _ in parts for row in each]
        revision = parts[0][2]
    else:
        only = dataset.config if isinstance(dataset.config, str) else None
        rows, revision = read(only, dataset.split)
    join = dataset.join
    # A copy in one file brings the columns of both tables.
    if join is not None and (from_hub or join.path or path.is_dir()):
        beside = path if path.is_dir() else path.parent
        source = beside / join.path if join.path else path
        if not from_hub and not source.exists():
            raise DataError(
                f"There is no second table at {source}. `dataset.join.path` names it; a relative "
                f"path begins at the rows' folder, {beside}."
            )
        rows = joined(rows, read(join.config, join.split or dataset.split, source)[0], join)
    return (rows if dataset.each is None else exploded(rows, dataset.each)), revision


def _local(dataset: DatasetConfig, folder: Path) -> Path:
    """Return the file or folder of rows on this machine."""
    if dataset.build is None:
        path = Path(str(dataset.path)).expanduser()
        return folder / path if (folder / path).exists() else path
    if dataset.rows is None:
        raise ConfigError(
            f"dataset: `build: {dataset.build}` needs `rows`, the name of one of its sets of rows."
        )
    from mmlm.data.builders import build

    return build(dataset.build, say=_say).rows(dataset.rows)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _keep(rows: Table, where: Mapping[str, Any], name: str) -> Table:
    """Keep the rows that `dataset.where` asks for."""
    for column, wanted in where.items():
        if not any(column in row for row in rows):
            raise EvaluationError(
                f"{name}: dataset.where names the column {column!r}, which no row has. "
                f"Columns: {', '.join(rows[0])}."
            )
        allowed = wanted if isinstance(wanted, list) else [wanted]
        rows = [row for row in rows if row.get(column) in allowed]
        if not rows:
            raise EvaluationError(f"{name}: no row has {column} in {allowed!r}.")
    return rows


def _by_kind(value: Any, kind: str, origin: str) -> Any:
    """Return a setting for one kind of question."""
    if not isinstance(value, dict) or "use" in value:
        return value
    if kind not in value:
        raise EvaluationError(
            f"{origin} says nothing about the kind {kind!r}; it knows "
            f"{', '.join(map(str, value))}. Add a line for it, or leave those rows out with "
            f"dataset.where."
        )
    return value[kind]


def _beside(scorer: ScorerConfig, folders: Sequence[Path]) -> ScorerConfig:
    """Turn the files that a scorer names into paths beside the rows.

    One that begins at the current folder stays; one that is nowhere is looked for, in vain, beside
    the rows, so that the fault names that place.
    """
    found: dict[str, str] = {}
    for field in scorer.file_fields:
        named = getattr(scorer, field)
        place = next((each / named for each in folders if named and (each / named).is_file()), None)
        if place is None and named and not Path(named).expanduser().is_file():
            place = folders[0] / Path(named).expanduser()
        if place is not None:
            found[field] = str(place)
    return scorer.model_copy(update=found)


def _kind(config: BenchmarkConfig, row: Mapping[str, Any], number: int) -> str:
    if config.kind is None:
        scorer = config.scorer.get("use") if isinstance(config.scorer, dict) else config.scorer
        return scorer if isinstance(scorer, str) else "answer"
    if not isinstance(row.get(config.kind), str):
        raise EvaluationError(
            f"Row {number} has no text in the column {config.kind!r}, which `kind` names "
            f"(got {row.get(config.kind)!r})."
        )
    return row[config.kind]


def _check_scorable(benchmark: Benchmark) -> None:
    faults: list[str] = []
    for item in benchmark.items:
        fault = benchmark.scorers[item.kind].fault(item.target)
        if fault is None and benchmark.config.decide == "likelihood" and not item.target.choices:
            fault = "decide: likelihood needs choices, and it has none"
        if fault is not None:
            faults.append(f"id {item.id}: {fault}")
    raise_faults(benchmark.name, faults, len(benchmark.items))
    for kind in benchmark.kinds:
        benchmark.prompt(next(item for item in benchmark.items if item.kind == kind))
