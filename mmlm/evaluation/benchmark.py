"""A benchmark is a YAML file: where the rows are, what is asked, and how it is scored.

    tables, pictures ──► benchmark ──► conditions ──► runner
                         you are here

`BenchmarkConfig` is the file, `Item` one question. Every row is checked before anything is
answered: a missing picture, a column that is not there, an id that stands twice or an answer
that is none of the choices stops the run, with the rows named. Nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from pydantic import Field

from mmlm.config import Config, parse_yaml, read_yaml
from mmlm.errors import ConfigError, DataError, EvaluationError
from mmlm.evaluation.pictures import find_picture, picture_key
from mmlm.evaluation.scorers import ScorerConfig, Target, read_scorer
from mmlm.evaluation.scorers.choice import LETTERS
from mmlm.evaluation.tables import Table, read_hub, read_table
from mmlm.generation import GenerationSettings
from mmlm.recipes import find_recipe

_FAULTS_SHOWN = 8


class DatasetConfig(Config):
    """Where the rows are: exactly one of `path` and `hub`."""

    path: str | None = None
    """A file or folder; relative to the YAML file, else to the current folder."""

    hub: str | None = None
    """A dataset on the Hub, ``org/name``."""

    config: str | None = None
    """Its subset, where it has several."""

    split: str = "test"
    """Its split."""

    revision: str | None = None
    """Its commit, so that the numbers stay comparable."""

    images: str | None = None
    """The folder in which relative picture paths begin; by default that of the file."""

    where: dict[str, Any] = Field(default_factory=dict)
    """Keep only rows with these values, such as ``{kind: choice}``; a list means any of it."""


class ReportConfig(Config):
    """What the report shows beside the score."""

    by: tuple[str, ...] = ()
    """Columns by which scores are also given."""


class BenchmarkConfig(Config):
    """One benchmark. `question` and `scorer` may also be mappings from kind to value."""

    title: str = ""
    """What it measures, in a few words."""

    set: str = ""
    """Its name in tables; by default the name of the file."""

    dataset: DatasetConfig
    """Where the rows are."""

    id: str | None = None
    """The column that names a row; by default `id`, else the row's number."""

    kind: str | None = None
    """The column that says which kind of question a row asks; by default there is one kind."""

    question: str | dict[str, str] = "{question}"
    """The prompt. Columns stand in braces; `{options}` is the choices with letters, a line each."""

    image: str | tuple[str, ...] | None = "image"
    """The column, or columns, of the pictures; null for text alone."""

    answer: str | tuple[str, ...] = "answer"
    """The column, or columns, of the accepted answers; a list in a column is several answers."""

    choices: str | tuple[str, ...] | None = "choices"
    """The column that lists the options, or one column for each option."""

    thing: str = "thing"
    """The column of what is in the picture; a shuffled picture never shows the same thing."""

    scorer: Any = "exact"
    """A scorer's name, ``{use: name, **settings}``, or a mapping from kind to either."""

    decide: Literal["generate", "likelihood"] = "generate"
    """The answer that is written, or the choice whose tokens are the likeliest on average."""

    generate: dict[str, Any] = Field(default_factory=dict)
    """Generation settings."""

    report: ReportConfig = ReportConfig()
    """What the report shows beside the score."""

    hub_id: str | None = None
    """The benchmark's dataset on the Hub, for the evaluation results of a model card."""

    expect: dict[str, Any] = Field(default_factory=dict)
    """Known scores: the canary of this file."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Args:
        id: The row's name; stable from run to run.
        kind: The kind of question, as tables call it.
        columns: The whole row, for the prompt and the report.
        images: The pictures, as references.
        image_keys: Hashes of their bytes.
        target: What the answer is marked against.
        thing: What is in the picture, as far as the row says so.
        groups: The values of the columns by which the report splits.
    """

    id: str
    kind: str
    columns: Mapping[str, Any] = field(repr=False)
    images: tuple[Any, ...] = field(repr=False)
    image_keys: tuple[str, ...] = field(repr=False)
    target: Target = field(repr=False)
    thing: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """The picture, as the unit of all statistics; a row without one stands for itself."""
        return "+".join(self.image_keys) or f"row {self.id}"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with its rows read and checked."""

    name: str
    config: BenchmarkConfig
    items: tuple[Item, ...]
    scorers: Mapping[str, ScorerConfig]
    settings: GenerationSettings

    @property
    def kinds(self) -> list[str]:
        """The kinds of question, in order of first appearance."""
        return list(dict.fromkeys(item.kind for item in self.items))

    def prompt(self, item: Item, choices: Sequence[str] | None = None) -> str:
        """Return the question as the model reads it, with the choices in the given order."""
        template = _by_kind(self.config.question, item.kind, f"{self.name}: question")
        return fill(template, item.columns, item.target.choices if choices is None else choices)


def fill(template: str, columns: Mapping[str, Any], choices: Sequence[str] = ()) -> str:
    r"""Fill a prompt; braces in the values stay as they are.

    >>> fill("{question}\n{options}", {"question": "What {is} it?"}, ["cat", "dog"])
    'What {is} it?\nA. cat\nB. dog'

    Raises:
        EvaluationError: if the template names a column that the row does not have.
    """
    options = "\n".join(f"{LETTERS[n]}. {text}" for n, text in enumerate(choices))
    listed = ", ".join(choices[:-1]) + (" or " + choices[-1] if len(choices) > 1 else "")
    values = {**columns, "options": options, "choices": listed}
    try:
        return Formatter().vformat(template, (), values)
    except (KeyError, IndexError, ValueError) as error:
        raise EvaluationError(
            f"The prompt {template!r} cannot be filled: {error}. Columns of the row: "
            f"{', '.join(columns)}; and options, choices. A brace that is meant is written twice."
        ) from None


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
        config = BenchmarkConfig.from_dict(_mapping(read_yaml(path), path), origin=str(path))
        folder, name = path.parent, name or config.set or path.stem
    name = name or config.set or "benchmark"
    rows, picture_folders = _rows(config, folder, data)
    rows = _keep(rows, config.dataset.where, name)
    kinds = [_kind(config, row, number) for number, row in enumerate(rows)]
    scorers = {
        kind: read_scorer(
            _by_kind(config.scorer, kind, f"{name}: scorer"), origin=f"{name}: scorer"
        )
        for kind in dict.fromkeys(kinds)
    }
    items = _items(name, config, rows, kinds, picture_folders)
    settings = GenerationSettings.from_dict(
        {"max_new_tokens": 32, **config.generate}, origin=f"{name}: generate"
    )
    benchmark = Benchmark(name, config, items, scorers, settings)
    _check_scorable(benchmark)
    return benchmark


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} must hold keys and values, as a benchmark does (got {value!r:.60})."
        )
    return value


def _rows(config: BenchmarkConfig, folder: Path, data: Path | None) -> tuple[Table, list[Path]]:
    """Return the rows, and the folders in which picture paths may begin."""
    dataset = config.dataset
    if data is None and (dataset.path is None) == (dataset.hub is None):
        raise ConfigError("dataset: name exactly one of `path` and `hub`.")
    if data is None and dataset.path is None:
        rows = read_hub(
            str(dataset.hub),
            config=dataset.config,
            split=dataset.split,
            revision=dataset.revision,
        )
        return rows, [Path(dataset.images or ".")]
    path = data or _first_that_exists(Path(str(dataset.path)).expanduser(), folder)
    base = path if path.is_dir() else path.parent
    folders = [base]
    if dataset.images is not None:
        folders = [base / dataset.images, folder / dataset.images, Path(dataset.images)]
    return read_table(path), folders


def _first_that_exists(path: Path, folder: Path) -> Path:
    return folder / path if (folder / path).exists() else path


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


def _items(
    name: str,
    config: BenchmarkConfig,
    rows: Table,
    kinds: Sequence[str],
    folders: list[Path],
) -> tuple[Item, ...]:
    """Turn rows into items, and complain about all faulty rows at once."""
    faults: list[str] = []
    items: list[Item] = []
    numbers: dict[str, int] = {}
    hashed: dict[Path, str] = {}
    for number, row in enumerate(rows):
        identity = str(row.get(config.id or "id", number))
        if config.id is not None and config.id not in row:
            faults.append(f"row {number}: it has no column {config.id!r}, which `id` names")
        if identity in numbers:
            faults.append(f"rows {numbers[identity]} and {number}: both have the id {identity!r}")
        numbers.setdefault(identity, number)
        try:
            items.append(_item(config, row, identity, kinds[number], folders, hashed))
        except (DataError, EvaluationError) as error:
            faults.append(f"row {number} (id {identity}): {error}")
    _raise_faults(name, faults, len(rows))
    vocabulary: dict[str, dict[str, None]] = {}
    for item in items:
        vocabulary.setdefault(item.kind, {}).update(dict.fromkeys(item.target.references))
    return tuple(_with_vocabulary(item, tuple(vocabulary[item.kind])) for item in items)


def _item(
    config: BenchmarkConfig,
    row: Mapping[str, Any],
    identity: str,
    kind: str,
    folders: list[Path],
    hashed: dict[Path, str],
) -> Item:
    pictures: list[Any] = []
    for column in _columns(config.image):
        for value in _several(_cell(row, column)):
            pictures.append(find_picture(value, folders))
    keys: list[str] = []
    for picture in pictures:
        if isinstance(picture, Path):
            keys.append(hashed.setdefault(picture, "") or picture_key(picture))
            hashed[picture] = keys[-1]
        else:
            keys.append(picture_key(picture))
    references = [text for column in _columns(config.answer) for text in _texts(_cell(row, column))]
    return Item(
        id=identity,
        kind=kind,
        columns=row,
        images=tuple(pictures),
        image_keys=tuple(keys),
        target=Target(tuple(references), _choices(config, row), facts=row),
        thing=str(row.get(config.thing) or ""),
        groups={column: str(_cell(row, column)) for column in config.report.by},
    )


def _with_vocabulary(item: Item, vocabulary: tuple[str, ...]) -> Item:
    return replace(item, target=replace(item.target, vocabulary=vocabulary))


def _choices(config: BenchmarkConfig, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the options of a row; none where the default column is not there."""
    if config.choices is None or (config.choices == "choices" and "choices" not in row):
        return ()
    columns = _columns(config.choices)
    if len(columns) == 1:
        choices = _texts(_cell(row, columns[0]))
    else:
        # MMBench and its kin leave the cells of missing options empty.
        cells = [_cell(row, column) for column in columns]
        choices = [str(cell) for cell in cells if cell is not None and str(cell) not in ("", "nan")]
    if len(choices) > len(LETTERS):
        raise EvaluationError(f"it has {len(choices)} choices; at most {len(LETTERS)} have letters")
    return tuple(choices)


def _columns(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise EvaluationError(f"it has no column {column!r} (columns: {', '.join(row)})")
    return row[column]


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _texts(value: Any) -> list[str]:
    """Return the texts of a cell: one, a list, VQA's list of objects, or a list in a CSV cell."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value = parse_yaml(value, origin="a list in a cell")
    texts: list[str] = []
    for each in _several(value):
        if isinstance(each, dict) and "answer" in each:
            each = each["answer"]
        if each is None or isinstance(each, dict | list):
            raise EvaluationError(f"a text or number was expected (got {each!r:.60})")
        texts.append(str(each))
    return texts


def _check_scorable(benchmark: Benchmark) -> None:
    faults: list[str] = []
    for item in benchmark.items:
        fault = benchmark.scorers[item.kind].fault(item.target)
        if fault is None and benchmark.config.decide == "likelihood" and not item.target.choices:
            fault = "decide: likelihood needs choices, and it has none"
        if fault is not None:
            faults.append(f"id {item.id}: {fault}")
    _raise_faults(benchmark.name, faults, len(benchmark.items))
    for kind in benchmark.kinds:
        benchmark.prompt(next(item for item in benchmark.items if item.kind == kind))


def _raise_faults(name: str, faults: list[str], total: int) -> None:
    if not faults:
        return
    more = f"\n  … and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
    shown = "\n  ".join(faults[:_FAULTS_SHOWN])
    raise EvaluationError(
        f"{name}: {len(faults)} of {total} rows cannot be measured, so nothing is:\n  {shown}{more}"
        f"\nMend or remove them; leaving them out would give another benchmark."
    )
