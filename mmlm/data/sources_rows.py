"""From one row of a file to a sample: the shapes in which people keep conversations.

    {image, question, answer}            a table; column names can be given
    {image, conversations: [{from, value}]}      LLaVA and ShareGPT
    {messages: [{role, content}], images?}       OpenAI and transformers

The shape is read off the keys. Whatever is wrong with a row raises `BadRowError` with its own
cause; nothing is guessed, cut or replaced. Image paths are made absolute here and opened
elsewhere. Text of the table shape is plain text: ``<image>`` in it means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field

from mmlm.config import Config
from mmlm.data.schema import BadRowError, Sample
from mmlm.errors import DataError
from mmlm.messages import ImagePart, Message, Part, Text, from_openai

_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
_PLACE = re.compile(r"<image>\n?")
_KNOWN = "{image, question, answer}, {image, conversations} or {messages}"


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

    def read(self, row: Any, *, number: int, source: str, folder: Path) -> Sample:
        """Turn one parsed row into a sample.

        Raises:
            BadRowError: with the cause, if it cannot be one.
        """
        if not isinstance(row, dict):
            raise BadRowError("not_a_row", f"got {_short(row)}")
        if "messages" in row:
            messages = _from_messages(row)
        elif "conversations" in row:
            messages = _from_conversations(row, self.columns.image)
        elif self.columns.answer in row:
            messages = self._from_table(row)
        else:
            keys = ", ".join(sorted(map(str, row))) or "none"
            raise BadRowError("unknown_shape", f"keys are {keys}; expected {_KNOWN}")
        messages = _checked(messages)
        if self.system and messages[0].role != "system":
            messages.insert(0, Message("system", (Text(self.system),)))
        home = folder / self.images if self.images else folder
        messages = [_with_paths(message, home) for message in messages]
        num_images = sum(len(message.images) for message in messages)
        if num_images > self.max_images:
            raise BadRowError("too_many_images", f"{num_images}, at most {self.max_images} may be")
        identity = row.get(self.columns.id)
        name = str(identity) if isinstance(identity, str | int) and identity != "" else str(number)
        return Sample(name, source, tuple(messages), _meta(row))

    def _from_table(self, row: dict[str, Any]) -> list[Message]:
        answer = row[self.columns.answer]
        if answer is None or answer == "":
            raise BadRowError("no_answer", f"`{self.columns.answer}` is empty")
        if isinstance(answer, bool | list | dict):
            raise BadRowError(
                "wrong_type", f"`{self.columns.answer}` is {_short(answer)}, not text"
            )
        images = _image_list(row.get(self.columns.image), self.columns.image)
        question = row.get(self.columns.question)
        if question is None or question == "":
            question = self.question or ""
        if not isinstance(question, str | int | float) or isinstance(question, bool):
            raise BadRowError(
                "wrong_type", f"`{self.columns.question}` is {_short(question)}, not text"
            )
        if not images and not str(question).strip():
            raise BadRowError("no_question", "neither a question nor an image")
        content: list[Part] = [ImagePart(image) for image in images]
        if str(question):
            content.append(Text(str(question)))
        return [Message("user", tuple(content)), Message("assistant", (Text(str(answer)),))]


def _from_conversations(row: dict[str, Any], image_key: str) -> list[Message]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise BadRowError("wrong_type", f"`conversations` is {_short(turns)}, not a list of turns")
    given = row.get(image_key, row.get("images"))
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRowError("wrong_type", f"a turn is {_short(turn)}, not an object")
        speaker = turn.get("from", turn.get("role"))
        role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            raise BadRowError("wrong_role", f"a turn is from {_short(speaker)}")
        value = turn.get("value", turn.get("content"))
        if not isinstance(value, str):
            raise BadRowError("wrong_type", f"the value of a turn is {_short(value)}, not text")
        messages.append(Message(role, (Text(value),)))  # type: ignore[arg-type]
    return _place_images(messages, _image_list(given, image_key))


def _from_messages(row: dict[str, Any]) -> list[Message]:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise BadRowError("wrong_type", f"`messages` is {_short(turns)}, not a list of turns")
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else turn
        if role not in ("system", "user", "assistant"):
            raise BadRowError("wrong_role", f"a turn is from {_short(role)}")
    try:
        messages = from_openai(turns)
    except DataError as error:
        raise BadRowError("wrong_type", str(error)) from None
    images = _image_list(row.get("images", row.get("image")), "images")
    parts = [part for message in messages for part in message.content]
    places = [part for part in parts if isinstance(part, ImagePart)]
    if not places:
        return _place_images(messages, images)
    empty = sum(place.image is None for place in places)
    if empty != len(images):
        raise BadRowError(
            "placeholders", f"{empty} places without an image and {len(images)} images"
        )
    waiting = iter(images)
    return [
        Message(
            message.role,
            tuple(
                ImagePart(next(waiting))
                if isinstance(part, ImagePart) and part.image is None
                else part
                for part in message.content
            ),
            message.learn,
        )
        for message in messages
    ]


def _place_images(messages: list[Message], images: list[Any]) -> list[Message]:
    """Put images where the text says ``<image>``, else before the first user turn."""
    if not images:
        return messages
    places = sum(message.text.count("<image>") for message in messages)
    waiting = iter(images)
    if places == 0:
        first = next((i for i, message in enumerate(messages) if message.role == "user"), 0)
        head = tuple(ImagePart(image) for image in waiting)
        chosen = messages[first]
        messages[first] = Message(chosen.role, (*head, *chosen.content), chosen.learn)
        return messages
    if places != len(images):
        raise BadRowError(
            "placeholders", f"{places} times <image> in the text and {len(images)} images"
        )
    return [
        Message(message.role, _split_places(message.text, waiting), message.learn)
        for message in messages
    ]


def _split_places(text: str, images: Any) -> tuple[Part, ...]:
    """Split a text at ``<image>``; the line break after a place belongs to the place."""
    parts: list[Part] = []
    end = 0
    for match in _PLACE.finditer(text):
        if match.start() > end:
            parts.append(Text(text[end : match.start()]))
        parts.append(ImagePart(next(images)))
        end = match.end()
    if end < len(text) or not parts:
        parts.append(Text(text[end:]))
    return tuple(parts)


def _checked(messages: Sequence[Message]) -> list[Message]:
    """Refuse conversations that no chat template can be asked to render."""
    turns = [message for message in messages if message.role != "system"]
    if any(message.role == "system" for message in messages[1:]):
        raise BadRowError("wrong_order", "a system turn stands after the first")
    if not turns or turns[0].role != "user":
        raise BadRowError("wrong_order", "the first turn is not the user's")
    for one, other in pairwise(turns):
        if one.role == other.role:
            raise BadRowError("wrong_order", f"two {one.role} turns follow one another")
    if not any(message.learns for message in turns):
        raise BadRowError("no_answer", "no turn is the assistant's")
    if any(message.role == "assistant" and not message.content for message in turns):
        raise BadRowError("no_answer", "an assistant turn is empty")
    if any(m.role == "assistant" and not m.images and not m.text.strip() for m in turns):
        raise BadRowError("no_answer", "an assistant turn is empty")
    if not turns[0].images and not turns[0].text.strip():
        raise BadRowError("no_question", "the first user turn is empty")
    return list(messages)


def _image_list(value: Any, key: str) -> list[Any]:
    """Read the value of an image column: nothing, one image, or a list of them."""
    if value is None or value == "" or value == []:
        return []
    values = value if isinstance(value, list) else [value]
    for one in values:
        if not isinstance(one, str) or not one:
            raise BadRowError("wrong_type", f"`{key}` is {_short(one)}, not a path")
    return list(values)


def _with_paths(message: Message, folder: Path) -> Message:
    """Make the image paths of a message absolute."""
    if not message.images:
        return message
    parts: list[Part] = []
    for part in message.content:
        if isinstance(part, ImagePart):
            if not isinstance(part.image, str):
                raise BadRowError("wrong_type", f"an image is {_short(part.image)}, not a path")
            if _URL.match(part.image) or part.image.startswith("data:"):
                raise BadRowError("url", _short(part.image))
            if "\0" in part.image:
                raise BadRowError("no_image_file", _short(part.image))
            parts.append(ImagePart(str(folder / part.image)))
        else:
            parts.append(part)
    return Message(message.role, tuple(parts), message.learn)


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    """Keep the small plain values that are not the conversation itself."""
    shown = {"messages", "conversations", "image", "images"}
    return {
        key: value
        for key, value in row.items()
        if key not in shown and isinstance(value, str | int | float | bool)
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
