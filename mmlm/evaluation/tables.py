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

Table = list[dict[str, Any]]

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "data.jsonl", "metadata.parquet")
"""The files that say what a folder of pictures means, in the order of preference."""


def read_table(path: Path) -> Table:
    """Read every row of a file or folder.

    Args:
        path: A file, a folder with one of `METADATA_NAMES`, or a folder of parquet shards.

    Raises:
        DataError: naming the file and the line that is wrong.
    """
    if path.is_dir():
        return _read_folder(path)
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


def read_hub(repo: str, *, config: str | None, split: str, revision: str | None) -> Table:
    """Read one split of a dataset on the Hub; pictures stay encoded until they are shown.

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
    return [dict(row) for row in table]


def _read_folder(folder: Path) -> Table:
    for name in METADATA_NAMES:
        if (folder / name).is_file():
            return read_table(folder / name)
    shards = sorted(folder.rglob("*.parquet"))
    if not shards:
        raise DataError(
            f"{folder} holds neither one of {', '.join(METADATA_NAMES)} nor parquet files."
        )
    return [row for shard in shards for row in read_table(shard)]


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
