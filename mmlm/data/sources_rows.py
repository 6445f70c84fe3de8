"""From one row of any source to a sample.

    {image, question, answer}       a table; column names can be given
    conversations, messages, texts  see `sources_shapes`

The shape is read off the keys. Whatever is wrong with a row raises `BadRowError` with its own
cause; nothing is guessed, cut or replaced. Image paths are made absolute here and opened
elsewhere; a picture inside a ``data:`` address is unpacked, and no other address is followed.
Text of the table shape is plain text: ``<image>`` in it means nothing.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmlm.config import Config
from mmlm.data.base import SourceConfig
from mmlm.data.schema import BadRowError, Sample
from mmlm.data.sources_shapes import checked, image_list, read_shape, shape_of, short
from mmlm.messages import Clip, ImagePart, Message, Part, Text, images_of

_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")
_DATA_URL = re.compile(r"^data:image/[a-zA-Z0-9.+-]+;base64,")
_MOST_DATA_URL_CHARACTERS = 1 << 27
_SMALL = (str, int, float, bool)
_PLAIN = re.compile(r"[\w-][\w. -]*(?:/[\w-][\w. -]*)*", re.ASCII)
"""Relative paths that are joined as they stand; `pathlib` takes ten times as long for the same."""
_KNOWN = "{image, question, answer}, {image, conversations}, {messages} or {images, texts}"


class Columns(Config):
    """Which key of a row holds what, for tables with names of their own."""

    id: str = "id"
    """The name of the row; where the key is missing, its number is used."""

    image: str = "image"
    """One image, or a list of images."""

    question: str = "question"
    """What the user asks."""

    answer: str = "answer"
    """What the assistant answers."""


class RowReader(Config):
    """How rows become samples."""

    columns: Columns = Columns()
    """Names of the columns, for the table shape."""

    question: str | None = None
    """Asked of every row that has no question of its own, e.g. "Describe the picture."."""

    system: str | None = None
    """A system turn before every conversation that has none."""

    images: str | None = None
    """Folder in which image paths begin; by default the folder of the data file."""

    max_images: int = Field(default=64, ge=1)
    """Most images in one row; a row with more is dropped and counted."""

    turns: Literal["chain", "apart"] = "chain"
    """`chain`: an answer sees the turns before it. `apart`: the questions of a row have nothing to
    do with each other; each sees the picture and itself alone, and they share its tokens where the
    attention can (`segments`). Rows with pictures between the turns stay chains."""

    learn: Literal["answers", "all"] = "answers"
    """`all`: what the user asks is learnt too, from its picture (SQ-LLaVA, arXiv 2403.11299)."""

    def read(self, row: Any, *, number: int, source: str, folder: Path) -> Sample:
        """Turn one parsed row into a sample.

        Raises:
            BadRowError: with the cause, if it cannot be one.
        """
        if not isinstance(row, dict):
            raise BadRowError("not_a_row", f"got {short(row)}")
        shape = shape_of(row)
        if shape is not None:
            messages = read_shape(row, shape, image=self.columns.image)
        elif self.columns.answer in row:
            messages = self._from_table(row)
        else:
            keys = short(", ".join(sorted(map(str, row))) or "none")
            raise BadRowError("unknown_shape", f"keys are {keys}; expected {_KNOWN}")
        messages = checked(messages)
        if self.system and messages[0].role != "system":
            messages.insert(0, Message("system", (Text(self.system),)))
        num_images = len(images_of(messages))
        if num_images > self.max_images:
            raise BadRowError("too_many_images", f"{num_images}, at most {self.max_images} may be")
        if num_images:
            home = folder / self.images if self.images else folder
            messages = [m if m.is_text else _with_paths(m, home) for m in messages]
        if self.learn == "all":
            messages = [_asked_too(message) for message in messages]
        return Sample(
            self.name_of(row, number), source, tuple(messages), self._meta(row),
            apart=self.turns == "apart",
        )  # fmt: skip

    def name_of(self, row: dict[str, Any], number: int) -> str:
        """Return the name of a row: its id, or its number where it has none."""
        identity = row.get(self.columns.id)
        return str(identity) if isinstance(identity, str | int) and identity != "" else str(number)

    def _from_table(self, row: dict[str, Any]) -> list[Message]:
        answer = _text(row[self.columns.answer], self.columns.answer)
        if not answer:
            raise BadRowError("no_answer", f"`{self.columns.answer}` is empty")
        images = image_list(row.get(self.columns.image), self.columns.image)
        question = _text(row.get(self.columns.question), self.columns.question)
        question = question or self.question or ""
        if not images and not question.strip():
            raise BadRowError("no_question", "neither a question nor an image")
        content: list[Part] = [ImagePart(image) for image in images]
        if question:
            content.append(Text(question))
        return [Message("user", tuple(content)), Message("assistant", (Text(answer),))]

    def _meta(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep the small plain values that are not the conversation itself."""
        columns = self.columns
        shown = (columns.image, columns.question, columns.answer, "image", "images")
        return {
            key: value
            for key, value in row.items()
            if isinstance(value, _SMALL) and key not in shown
        }


class RowsConfig(SourceConfig):
    """What all sources of rows have in common: how a row is read."""

    columns: Columns = Columns()
    """Names of the columns, where they are not image, question and answer."""

    question: str | None = None
    """Asked of every row that has no question of its own."""

    system: str | None = None
    """A system turn before every conversation that has none."""

    images: str | None = None
    """Folder in which image paths begin; by default the folder of the data file."""

    max_images: int = Field(default=64, ge=1)
    """Most images in one row; a row with more is dropped and counted."""

    turns: Literal["chain", "apart"] = "chain"
    """`chain`: an answer sees the turns before it. `apart`: the questions of a row have nothing to
    do with each other; each sees the picture and itself alone, and they share its tokens where the
    attention can (`segments`). Rows with pictures between the turns stay chains."""

    learn: Literal["answers", "all"] = "answers"
    """`all`: what the user asks is learnt too, from its picture (SQ-LLaVA, arXiv 2403.11299)."""

    def reader(self) -> RowReader:
        """Return what turns a row into a sample."""
        return RowReader(
            columns=self.columns,
            question=self.question,
            system=self.system,
            images=self.images,
            max_images=self.max_images,
            turns=self.turns,
            learn=self.learn,
        )


def _text(value: Any, key: str) -> str:
    """Return a cell as text; a missing one, also pandas' NaN, is empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRowError("wrong_type", f"`{key}` is {short(value)}, not text")
    return str(value)


def _asked_too(message: Message) -> Message:
    """Let a user's turn be learnt, unless its row says otherwise."""
    if message.role != "user" or message.learn is not None:
        return message
    return Message(message.role, message.content, learn=True)


def _with_paths(message: Message, folder: Path) -> Message:
    """Make the image paths of a message absolute, and unpack what is inside the row."""
    parts = [
        ImagePart(_located(part.image, folder)) if isinstance(part, ImagePart) else part
        for part in message.content
    ]
    return Message(message.role, tuple(parts), message.learn)


def _located(image: Any, folder: Path) -> str | bytes | Clip:
    if isinstance(image, Clip):
        if isinstance(image.source, str):
            return Clip(_located(image.source, folder))
        return Clip(tuple(_located(frame, folder) for frame in image.source))
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise BadRowError("wrong_type", f"an image is {short(image)}, not a path")
    if _PLAIN.fullmatch(image) and folder.name:
        return f"{folder}/{image}"
    if head := _DATA_URL.match(image):
        return _unpacked(image, head.end())
    if _URL.match(image) or image.startswith("data:"):
        raise BadRowError("url", short(image))
    if "\0" in image:
        raise BadRowError("no_image_file", short(image))
    return str(folder / image)


def _unpacked(address: str, start: int) -> bytes:
    """Return the bytes of a picture that stands in its address."""
    if len(address) > _MOST_DATA_URL_CHARACTERS:
        raise BadRowError("image_too_large", f"a data: address of {len(address):,} characters")
    try:
        return base64.b64decode(address[start:], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRowError("bad_image", f"a data: address that is not base64: {error}") from None
