"""A conversation: messages made of text and images, in any order.

This is the one form in which conversations travel between data, processing, generation,
evaluation and serving. It knows no tokenizer, no template and no file format: sources turn
their rows into messages, `mmlm.language.chat` turns messages into token ids and labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmlm.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Text:
    """A piece of text that a person or the model wrote. Special tokens in it are plain text."""

    text: str


@dataclass(frozen=True)
class Clip:
    """A moving picture; it takes one place, like a picture.

    Args:
        source: The path of a film, or its frames in order, each anything that is a picture.
    """

    source: Any


@dataclass(frozen=True)
class ImagePart:
    """The place of one image: a path, bytes or a PIL image, a `Clip`, or None for a blind place."""

    image: Any = field(default=None, compare=False)


Part = Text | ImagePart


@dataclass(frozen=True)
class Message:
    """One turn.

    Args:
        role: Who speaks.
        content: Text and images in reading order.
        learn: Whether the loss covers this turn; None means "assistant turns only".
    """

    role: Role
    content: tuple[Part, ...]
    learn: bool | None = None

    @property
    def text(self) -> str:
        """The text parts, joined."""
        if len(self.content) == 1 and isinstance(only := self.content[0], Text):
            return only.text
        return "".join(part.text for part in self.content if isinstance(part, Text))

    @property
    def is_text(self) -> bool:
        """Whether it is one piece of text and nothing else, as most turns are."""
        return len(self.content) == 1 and isinstance(self.content[0], Text)

    @property
    def images(self) -> list[Any]:
        """The images, in reading order."""
        return [part.image for part in self.content if isinstance(part, ImagePart)]

    @property
    def learns(self) -> bool:
        """Whether the loss covers this turn."""
        return self.role == "assistant" if self.learn is None else self.learn


def user(text: str, images: Iterable[Any] = ()) -> Message:
    """Return a user turn: the images first, then the text."""
    return Message("user", (*(ImagePart(image) for image in images), Text(text)))


def assistant(text: str) -> Message:
    """Return an assistant turn."""
    return Message("assistant", (Text(text),))


def system(text: str) -> Message:
    """Return a system turn."""
    return Message("system", (Text(text),))


def images_of(messages: Sequence[Message]) -> list[Any]:
    """Return every image of a conversation, in reading order."""
    return [
        part.image
        for message in messages
        for part in message.content
        if isinstance(part, ImagePart)
    ]


def from_openai(rows: Sequence[dict[str, Any]], *, origin: str = "messages") -> list[Message]:
    """Read chat messages in the OpenAI / transformers shape.

    A row is ``{"role": …, "content": str | [{"type": "text", "text": …}, {"type": "image",
    "image": …}, {"type": "image_url", "image_url": {"url": …}}, {"type": "video", "video": path or
    list of frames}]}``. A URL is handed on as it stands; who may fetch it is decided elsewhere.

    Raises:
        DataError: naming the row and the key that is wrong.
    """
    messages: list[Message] = []
    for index, row in enumerate(rows):
        where = f"{origin}[{index}]"
        if not isinstance(row, dict) or row.get("role") not in ROLES:
            got = row.get("role") if isinstance(row, dict) else row
            raise DataError(f"{where}.role must be one of {', '.join(ROLES)} (got {got!r}).")
        content = row.get("content")
        if isinstance(content, str):
            parts: tuple[Part, ...] = (Text(content),)
        elif isinstance(content, list):
            parts = tuple(
                _part(piece, f"{where}.content[{number}]") for number, piece in enumerate(content)
            )
        else:
            raise DataError(f"{where}.content must be a string or a list (got {content!r}).")
        messages.append(Message(row["role"], parts, row.get("learn")))
    return messages


def _part(piece: Any, where: str) -> Part:
    if isinstance(piece, dict):
        kind = piece.get("type")
        if kind == "text" and isinstance(piece.get("text"), str):
            return Text(piece["text"])
        if kind == "image":
            for key in ("image", "path", "url"):
                if piece.get(key) is not None:
                    return ImagePart(piece[key])
            return ImagePart()
        if kind == "video":
            return ImagePart(_clip(piece, where))
        if kind == "image_url":
            url = piece.get("image_url")
            return ImagePart(url["url"] if isinstance(url, dict) and "url" in url else url)
    raise DataError(
        f"{where} must be a text or an image part, such as "
        f'{{"type": "text", "text": "…"}} or {{"type": "image", "image": "a.png"}} (got {piece!r}).'
    )


def _clip(piece: dict[str, Any], where: str) -> Clip:
    source = next((piece[key] for key in ("video", "path") if piece.get(key) is not None), None)
    if isinstance(source, list):
        source = tuple(source)
    if source is None or source in ("", ()):
        raise DataError(
            f'{where} must name a film or its frames: {{"type": "video", "video": "a.mp4"}} or '
            f'{{"type": "video", "video": ["1.png", "2.png"]}} (got {piece!r}).'
        )
    return Clip(source)


def to_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Write messages in the shape that `from_openai` reads and chat templates expect."""
    rows: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part.text} if isinstance(part, Text) else _shown(part.image)
            for part in message.content
        ]
        rows.append({"role": message.role, "content": content})
    return rows


def _shown(image: Any) -> dict[str, Any]:
    if isinstance(image, Clip):
        source = list(image.source) if isinstance(image.source, tuple) else image.source
        return {"type": "video", "video": source}
    return {"type": "image", "image": image}
