"""What somebody's own table or folder holds: every row read, every picture opened, all counted.

    my.csv, my.jsonl, photos/ ──► own ──► splits ──► own_files ──► a folder to train from
                                  you are here

Nothing is mended or guessed: a row that cannot be used is left out under its cause. Pictures
are opened whole, once, because a file that is cut short has a sound header.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmlm.data.alike import Look, look_of
from mmlm.data.base import Source, sources
from mmlm.data.schema import BadRowError, Drop, Sample
from mmlm.data.sources_files import SUFFIXES
from mmlm.errors import DataError, ImageError
from mmlm.images import Readers, all_readers, open_image, split_reference
from mmlm.images.readers import PictureFile
from mmlm.messages import images_of

DEFAULT_QUESTION = "Describe the picture."


@dataclass(frozen=True)
class Words:
    """Which column holds what; None takes the usual name.

    Args:
        image: A path, or several.
        answer: What is to be said.
        question: What is asked.
        ask: Asked of every row that has no question.
        group: Rows that share its value are never parted.
    """

    image: str | None = None
    answer: str | None = None
    question: str | None = None
    ask: str = DEFAULT_QUESTION
    group: str | None = None

    def columns(self) -> dict[str, str]:
        """Return the columns that were named, as a source takes them."""
        named = {"image": self.image, "answer": self.answer, "question": self.question}
        return {key: value for key, value in named.items() if value is not None}


class OwnRow(NamedTuple):
    """One usable row; `more` holds the later questions of a conversation, with their answers."""

    number: int
    id: str
    images: tuple[str, ...]
    question: str
    answer: str
    group: str | None
    more: tuple[tuple[str, str], ...] = ()

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """All questions with their answers."""
        return ((self.question, self.answer), *self.more)


class Opened(NamedTuple):
    """One picture that opens."""

    format: str
    width: int
    height: int
    look: Look


@dataclass
class Found:
    """What a table or folder holds.

    Args:
        source: Where it is.
        num_rows: All rows, good and bad.
        rows: The usable ones.
        drops: The others, with causes.
        pictures: Every picture of the usable rows.
    """

    source: Path
    num_rows: int
    rows: list[OwnRow]
    drops: list[Drop]
    pictures: dict[str, Opened] = field(default_factory=dict)


def survey_own(
    path: Path,
    words: Words,
    *,
    read: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> Found:
    """Read every row and open every picture.

    Args:
        path: A CSV, TSV, JSON or JSONL file, or a folder of pictures with captions.
        words: Which column holds what.
        read: Settings of the picture readers, as in a recipe.
        progress: Wraps what is gone through, given how much it is.

    Raises:
        DataError: if it cannot be read, or a column is nowhere.
        MissingExtraError: if its pictures need a library that is not installed.
    """
    source = _open(path, words)
    rows, drops = _rows(source, words)
    _check_columns(path, words, rows, drops)
    readers = all_readers(read)
    names = list(dict.fromkeys(image for row in rows for image in row.images))
    show = progress or (lambda each, total: each)
    opened: dict[str, Opened] = {}
    faults: dict[str, BadRowError] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda name: _look_at(name, readers), names)
        for name, result in zip(names, show(results, len(names)), strict=True):
            if isinstance(result, BadRowError):
                faults[name] = result
            else:
                opened[name] = result
    good: list[OwnRow] = []
    for row in rows:
        fault = next((faults[image] for image in row.images if image in faults), None)
        if fault is None:
            good.append(row)
        else:
            drops.append(Drop(source.name, row.number, row.id, fault.cause, fault.detail))
    used = {image for row in good for image in row.images}
    pictures = {name: picture for name, picture in opened.items() if name in used}
    return Found(path, len(source), good, sorted(drops, key=lambda drop: drop.row), pictures)


def _open(path: Path, words: Words) -> Source:
    """Open the file or folder as a source."""
    use = "folder" if path.is_dir() else SUFFIXES.get(path.suffix.lower())
    if use is None:
        raise DataError(
            f"{path} is no folder and no table that can be read. Expected a folder of pictures "
            f"with captions, or a file that ends in {', '.join(SUFFIXES)}."
        )
    settings: dict[str, Any] = {"use": use, "path": str(path.absolute()), "question": words.ask}
    if words.columns():
        settings["columns"] = words.columns()
    return sources.read(settings, origin=str(path)).open(path.absolute().parent)


def _rows(source: Source, words: Words) -> tuple[list[OwnRow], list[Drop]]:
    rows: list[OwnRow] = []
    drops: list[Drop] = []
    for number, sample in _samples(source):
        try:
            if isinstance(sample, BadRowError):
                raise sample
            rows.append(_row(number, sample, words))
        except BadRowError as error:
            name = str(number) if isinstance(sample, BadRowError) else sample.id
            drops.append(Drop(source.name, number, name, error.cause, error.detail))
    ids = Counter(row.id for row in rows)
    if any(count > 1 for count in ids.values()):
        rows = [row._replace(id=str(row.number)) for row in rows]
    return rows, drops


def _samples(source: Source) -> Iterator[tuple[int, Sample | BadRowError]]:
    for number in range(len(source)):
        try:
            yield number, source.sample(number)
        except BadRowError as error:
            yield number, error


def _row(number: int, sample: Sample, words: Words) -> OwnRow:
    """Take questions, answers and the pictures out of a sample."""
    roles = [message.role for message in sample.messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadRowError(
            "unknown_shape",
            f"turns of {', '.join(roles)}, where questions and answers were expected in turn; "
            f"name the file itself under `data:` of a recipe",
        )
    asked, told, *later = sample.messages
    if images_of(later):
        raise BadRowError(
            "unknown_shape",
            "a picture in a later turn; name the file itself under `data:` of a recipe",
        )
    images = tuple(str(image) for image in images_of([asked]))
    if not images:
        raise BadRowError("no_image_file", "the row names no picture")
    group = None if words.group is None else sample.meta.get(words.group)
    named = None if group is None or group == "" else str(group)
    question = asked.text.strip() or words.ask
    more = tuple(
        (one.text.strip(), other.text.strip())
        for one, other in zip(later[::2], later[1::2], strict=True)
    )
    return OwnRow(number, sample.id, images, question, told.text.strip(), named, more)


def _check_columns(path: Path, words: Words, rows: list[OwnRow], drops: list[Drop]) -> None:
    """Refuse a column that is nowhere; going on would lose what it was to hold."""
    if not rows:
        causes = Counter(drop.cause for drop in drops).most_common(3)
        told = ", ".join(f"{cause} {count}" for cause, count in causes) or "it is empty"
        detail = f" Such as row {drops[0].row}: {drops[0].detail}." if drops else ""
        raise DataError(
            f"{path} has no usable row ({told}).{detail} Name the columns with --image and "
            f"--answer."
        )
    if words.group is not None and all(row.group is None for row in rows):
        raise DataError(f"No row of {path} has a value in {words.group!r}, which --group names.")
    if words.question is not None and all(row.question == words.ask for row in rows):
        raise DataError(
            f"No row of {path} has a value in {words.question!r}, which --question names. To ask "
            f"all rows the same, write --ask {words.question!r}."
        )


def _look_at(name: str, readers: Readers) -> Opened | BadRowError:
    """Open a picture whole; what is wrong with it is returned, not raised."""
    path, number = split_reference(name)
    if not path.exists():
        return BadRowError("no_image_file", name)
    try:
        picture = open_image(name, readers=readers)
        reader = readers.reader_of(PictureFile(path, number))
        kind = reader.use if reader is not None else _format(path)
    except (ImageError, OSError) as error:
        return BadRowError("bad_image", str(error))
    return Opened(kind, picture.width, picture.height, look_of(picture))


def _format(path: Path) -> str:
    """Return what Pillow calls the format of a file, and its mode."""
    with Image.open(path) as image:
        return f"{image.format} {image.mode}"
