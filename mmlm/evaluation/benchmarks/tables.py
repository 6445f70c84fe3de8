"""Reads the rows of a benchmark: JSONL, JSON, CSV, TSV, parquet, a folder of them, or the Hub.

    files or Hub ──► tables ──► benchmark ──► runner
                     you are here

Rows are plain dictionaries here; what the columns mean is known to `benchmark`. A file that
cannot be read whole is refused: a benchmark that lost rows gives another number.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmlm.errors import DataError, MissingExtraError
from mmlm.evaluation.benchmarks.schema import JoinConfig

Table = list[dict[str, Any]]

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "data.jsonl", "metadata.parquet")
"""The files that say what a folder of pictures means, in the order of preference."""


def read_table(path: Path, *, config: str | None = None, split: str | None = None) -> Table:
    """Read every row of a file or folder.

    Args:
        path: A file, a folder with one of `METADATA_NAMES`, or a folder of parquet shards.
        config: Of a copy of a dataset from the Hub: which subset.
        split: Likewise: which split.

    Raises:
        DataError: naming the file and the line that is wrong.
    """
    if path.is_dir():
        return _read_folder(path, config, split)
    if not path.is_file():
        raise DataError(
            f"There is no benchmark data at {path}. Check `dataset.path`; a relative path begins "
            f"at the folder of the YAML file, else at the current folder."
        )
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} has the ending {path.suffix!r}; known are {', '.join(sorted(_READERS))}."
        )
    rows = reader(path)
    if not rows:
        raise DataError(f"{path} holds no rows; a benchmark needs at least one.")
    return rows


def read_hub(
    repo: str, *, config: str | None, split: str, revision: str | None
) -> tuple[Table, str]:
    """Read one split of a dataset on the Hub; pictures stay encoded until they are shown.

    Returns:
        The rows, and the commit that was read; empty where the Hub did not say.

    Raises:
        MissingExtraError: if `datasets` is not installed.
        DataError: if there is no such dataset or split.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", needed_for="dataset.hub", extra="train") from None
    try:
        table = datasets.load_dataset(repo, config, split=split, revision=revision)
    except Exception as error:
        raise DataError(
            f"The dataset {repo!r} (split {split!r}) cannot be read from the Hub: {error}. "
            f"A local copy of the same layout does as well: set `dataset.path`."
        ) from error
    for name, feature in dict(table.features).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return [dict(row) for row in table], _commit(repo, revision)


def _commit(repo: str, revision: str | None) -> str:
    """Return the commit that a branch stands at, so that a report can name it."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repo, revision=revision).sha or ""
    except Exception:  # offline, from the cache: the rows are there, their commit is not told
        return revision or ""


def _read_folder(folder: Path, config: str | None, split: str | None) -> Table:
    for name in METADATA_NAMES:
        if (folder / name).is_file():
            return read_table(folder / name)
    shards = sorted(folder.rglob("*.parquet"))
    if not shards:
        raise DataError(
            f"{folder} holds neither one of {', '.join(METADATA_NAMES)} nor parquet files."
        )
    return [row for shard in _chosen(folder, shards, config, split) for row in read_table(shard)]


def _chosen(folder: Path, shards: list[Path], config: str | None, split: str | None) -> list[Path]:
    """Return the shards of a subset and split, by their names as the Hub gives them.

    A copy that holds a single subset or split need not name it.
    """
    of_config = [shard for shard in shards if config in shard.relative_to(folder).parts[:-1]]
    shards = of_config or shards
    named = {shard: split_of(shard) for shard in shards}
    of_split = [shard for shard in shards if named[shard] == split]
    if not of_split and len(set(named.values())) > 1 and split is not None:
        raise DataError(
            f"{folder} has no parquet files of the split {split!r}"
            f"{f' of {config!r}' if config else ''}; it has "
            f"{', '.join(sorted(set(named.values())))}. Set `dataset.split`, or copy that split."
        )
    return of_split or shards


def joined(rows: Table, others: Table, on: JoinConfig) -> Table:
    """Add to each row the columns of the row of a second table that it names.

    Raises:
        DataError: if a row names none, or two rows of the second table have one name.
    """
    known: dict[str, dict[str, Any]] = {}
    for other in others:
        name = str(other.get(on.key))
        if name in known or on.key not in other:
            raise DataError(
                f"dataset.join: the second table needs one row for each {on.key!r} "
                f"(got {'none' if on.key not in other else f'two for {name!r}'})."
            )
        known[name] = other
    lost = [str(row.get(on.column)) for row in rows if str(row.get(on.column)) not in known]
    if lost:
        raise DataError(
            f"dataset.join: {len(lost)} of {len(rows)} rows name no row of the second table by "
            f"{on.column!r}, such as {lost[0]!r}."
        )
    return [{**known[str(row[on.column])], **row} for row in rows]


def exploded(rows: Table, column: str) -> Table:
    """Make a row of every entry of a list; of a conversation, one of every question.

    Lists beside it that have as many entries are dealt out as well.

    >>> talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    >>> exploded([{"id": 1, "talk": talk, "kinds": ["name"]}], "talk")
    [{'id': '1/0', 'talk': 0, 'kinds': 'name', 'question': 'What?', 'answer': 'A cat.'}]

    >>> exploded([{"id": 1, "say": ["a", "b"]}], "say")
    [{'id': '1/0', 'say': 'a'}, {'id': '1/1', 'say': 'b'}]
    """
    made: Table = []
    for row in rows:
        entries = row.get(column)
        if not isinstance(entries, list) or not entries:
            raise DataError(
                f"dataset.each: the column {column!r} must hold a list (got {entries!r:.60})."
            )
        name = next((key for key in ("id", "question_id", "index") if key in row), None)
        pairs = _pairs(entries)
        beside = [
            key for key, value in row.items()
            if isinstance(value, list) and key != column and len(value) == len(pairs)
        ] if pairs else []  # fmt: skip
        for number, entry in enumerate(pairs or entries):
            own = {name: f"{row[name]}/{number}"} if name else {}
            own |= {key: row[key][number] for key in beside}
            said = {column: number, **entry} if pairs else {column: entry}
            made.append({**row, **own, **said})
    return made


def _pairs(turns: list[Any]) -> list[dict[str, str]]:
    """Return the questions and answers of a conversation in LLaVA's shape; of another list none."""
    shaped = all(isinstance(turn, dict) and {"from", "value"} <= set(turn) for turn in turns)
    if not shaped or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        return []
    return [
        {"question": str(turns[place]["value"]), "answer": str(turns[place + 1]["value"])}
        for place in range(0, len(turns), 2)
    ]


def split_of(shard: Path) -> str:
    """Return the split that the name of a shard begins with.

    >>> split_of(Path("data/test-00000-of-00003.parquet")), split_of(Path("val.parquet"))
    ('test', 'val')
    """
    return shard.stem.split("-")[0]


def _read_jsonl(path: Path) -> Table:
    rows: Table = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON: {error}.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} must be an object with keys (got {row!r:.80}).")
        rows.append(row)
    return rows


def _read_json(path: Path) -> Table:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) == 1:
            value = lists[0]
        elif value and all(isinstance(item, dict) for item in value.values()):
            value = [{"id": key, **item} for key, item in value.items()]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(
            f"{path} must hold a list of objects, an object with one such list, or an object of "
            f"objects by id."
        )
    return value


def _read_csv(path: Path) -> Table:
    # VLMEvalKit keeps whole pictures in its cells.
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(_lines(path), delimiter=delimiter)
    rows: Table = []
    for number, row in enumerate(reader, start=2):
        if None in row or None in row.values():
            raise DataError(
                f"{path} line {number} has another number of cells than the header "
                f"({len(reader.fieldnames or ())}). Cells that hold a comma need quotes."
            )
        rows.append(dict(row))
    return rows


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtraError(
            "pyarrow", needed_for=f"reading {path.name}", extra="train"
        ) from None
    try:
        return parquet.read_table(path).to_pylist()
    except Exception as error:
        raise DataError(f"{path} cannot be read as parquet: {error}.") from error


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8: {error}.") from None


_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
