"""From rows to items: pictures found, answers and choices read, every fault with its row.

    tables, pictures ──► items ──► benchmark
                         you are here

A row that cannot be measured is never left out: all faulty rows are named, and nothing is
measured.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any

from mmlm.config import parse_yaml
from mmlm.errors import DataError, EvaluationError
from mmlm.evaluation.benchmarks.pictures import find_frames, find_picture, picture_key
from mmlm.evaluation.benchmarks.schema import BenchmarkConfig
from mmlm.evaluation.benchmarks.tables import Table
from mmlm.evaluation.scorers import Target
from mmlm.evaluation.scorers.choice import LETTERS
from mmlm.images import read_size

_FAULTS_SHOWN = 8


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
        is_clip: Whether the pictures are the frames of one video, in their order.
    """

    id: str
    kind: str
    columns: Mapping[str, Any] = field(repr=False)
    images: tuple[Any, ...] = field(repr=False)
    image_keys: tuple[str, ...] = field(repr=False)
    target: Target = field(repr=False)
    thing: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)
    is_clip: bool = False

    @property
    def cluster(self) -> str:
        """The picture, as the unit of all statistics; a row without one stands for itself."""
        return "+".join(self.image_keys) or f"row {self.id}"


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


def make_items(
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
        column = config.id or "id"
        identity = str(number) if column == "row" else str(row.get(column, number))
        if config.id not in (None, "row") and config.id not in row:
            faults.append(f"row {number}: it has no column {config.id!r}, which `id` names")
        if identity in numbers:
            faults.append(f"rows {numbers[identity]} and {number}: both have the id {identity!r}")
        numbers.setdefault(identity, number)
        try:
            items.append(_item(config, row, identity, kinds[number], folders, hashed))
        except (DataError, EvaluationError) as error:
            faults.append(f"row {number} (id {identity}): {error}")
    raise_faults(name, faults, len(rows))
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
    pictures = _pictures(config, row, folders)
    keys = [_key(picture, hashed) for picture in pictures]
    choices = _choices(config, row)
    references = [text for column in _columns(config.answer) for text in _texts(_cell(row, column))]
    if config.image_size and pictures:
        size = read_size(pictures[0])
        row = {**row, "image_width": size.width, "image_height": size.height}
    references = [_without_letter(text, choices) for text in references]
    if config.answer_counts_from is not None:
        references = [_numbered(text, choices, config.answer_counts_from) for text in references]
    return Item(
        id=identity,
        kind=kind,
        columns=row,
        images=tuple(pictures),
        image_keys=tuple(keys),
        target=Target(tuple(references), choices, facts=row),
        thing=str(row.get(config.thing) or ""),
        groups={column: str(_cell(row, column)) for column in config.report.by},
        is_clip=config.frames is not None,
    )


def _pictures(config: BenchmarkConfig, row: Mapping[str, Any], folders: list[Path]) -> list[Any]:
    if isinstance(config.image, str) and "{" in config.image:
        name = fill(config.image, row)
        if config.frames is not None:
            return find_frames(name, folders, config.frames)
        return [find_picture(name, folders)]
    columns = _columns(config.image)
    # Benchmarks with one column for each picture leave those of missing pictures empty.
    return [
        find_picture(value, folders)
        for column in columns
        for value in _several(_cell(row, column))
        if len(columns) == 1 or value not in (None, "")
    ]


def _key(picture: Any, hashed: dict[Path, str]) -> str:
    """Hash a picture; a file that several rows name is read once."""
    if not isinstance(picture, Path):
        return picture_key(picture)
    if picture not in hashed:
        hashed[picture] = picture_key(picture)
    return hashed[picture]


def _numbered(text: str, choices: tuple[str, ...], first: int) -> str:
    """Return the choice that a number means."""
    place = int(text) - first if text.isdigit() else -1
    if not 0 <= place < len(choices):
        raise EvaluationError(
            f"its answer {text!r} is not the number of one of its {len(choices)} choices, counted "
            f"from {first}"
        )
    return choices[place]


def _with_vocabulary(item: Item, vocabulary: tuple[str, ...]) -> Item:
    return replace(item, target=replace(item.target, vocabulary=vocabulary))


def _choices(config: BenchmarkConfig, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the options of a row; none where the default column is not there."""
    if config.choices is None or (config.choices == "choices" and "choices" not in row):
        return ()
    columns = _columns(config.choices)
    if len(columns) == 1:
        # Questions without options stand among others in some benchmarks.
        cell = _cell(row, columns[0])
        choices = [] if cell is None or cell == "" else _texts(cell)
    else:
        # MMBench and its kin leave the cells of missing options empty.
        cells = [_cell(row, column) for column in columns]
        choices = [str(cell) for cell in cells if cell is not None and str(cell) not in ("", "nan")]
    choices = _without_letters(choices)
    if len(choices) > len(LETTERS):
        raise EvaluationError(f"it has {len(choices)} choices; at most {len(LETTERS)} have letters")
    return tuple(choices)


def _without_letters(choices: list[str]) -> list[str]:
    """Take the letters off choices that all bring their own, as Video-MME's do.

    >>> _without_letters(["A. cat", "B. dog"]), _without_letters(["A. cat", "dog"])
    (['cat', 'dog'], ['A. cat', 'dog'])
    """
    pairs = list(zip(LETTERS, choices, strict=False))
    own = [
        text.startswith((f"{letter}. ", f"{letter}) ", f"({letter}) ")) for letter, text in pairs
    ]
    if len(choices) < 2 or len(pairs) < len(choices) or not all(own):
        return choices
    return [text.split(" ", 1)[1] for text in choices]


def _without_letter(reference: str, choices: Sequence[str]) -> str:
    """Return the choice that a reference names with its letter, else the reference."""
    for letter, text in zip(LETTERS, choices, strict=False):
        if reference in (f"{letter}. {text}", f"{letter}) {text}", f"({letter}) {text}"):
            return text
    return reference


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
        value = _list_in_a_cell(value)
    texts: list[str] = []
    for each in _several(value):
        if isinstance(each, dict) and "answer" in each:
            each = each["answer"]
        if each is None or isinstance(each, dict | list):
            raise EvaluationError(f"a text or number was expected (got {each!r:.60})")
        texts.append(str(each))
    return texts


def _list_in_a_cell(text: str) -> Any:
    """Read a list as Python or YAML writes it; MMMU's options are the former."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return parse_yaml(text, origin="a list in a cell")


def raise_faults(name: str, faults: list[str], total: int) -> None:
    """Refuse a benchmark with faulty rows, the first of them named."""
    if not faults:
        return
    more = f"\n  … and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
    shown = "\n  ".join(faults[:_FAULTS_SHOWN])
    raise EvaluationError(
        f"{name}: {len(faults)} of {total} rows cannot be measured, so nothing is:\n  {shown}{more}"
        f"\nMend or remove them; leaving them out would give another benchmark."
    )
