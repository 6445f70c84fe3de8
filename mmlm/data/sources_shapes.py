"""The shapes in which people keep conversations, turned into messages.

    {image, conversations: [{from, value}], system?}     LLaVA and ShareGPT
    {messages: [{role, content}], images?}               OpenAI and transformers
    {images, texts: [{user, assistant}]}                 The Cauldron and FineVision

Images stay what the row holds: paths, bytes, or HF's ``{bytes, path}``. Whatever is wrong
raises `BadRowError` with its own cause; nothing is guessed, cut or replaced. Tables are shaped
in `sources_rows`, which also looks at the values of images.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from mmlm.data.schema import BadRowError
from mmlm.errors import DataError
from mmlm.messages import Clip, ImagePart, Message, Part, Role, Text, from_openai

_SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
_TURNS: list[Role] = ["user", "assistant"] * 64
_PLACE = re.compile(r"<image>\n?")
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


def short(value: Any) -> str:
    """Show any value of a row in a few words, however large or deep it is."""
    text = _SHOWN.repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def shape_of(row: dict[str, Any]) -> str | None:
    """Return the key by which the shape of a row is known, or None for a table or nothing."""
    return next((key for key in ("messages", "conversations", "texts") if _holds(row, key)), None)


def _holds(row: dict[str, Any], key: str) -> bool:
    """Whether a row has a conversation; a column that is null in this row is none."""
    return row.get(key) is not None


def read_shape(row: dict[str, Any], key: str, *, image: str) -> list[Message]:
    """Turn the conversation under `key` into messages; `image` is the column of images.

    Raises:
        BadRowError: with the cause.
    """
    given = row.get(image)
    images = image_list(row.get("images") if given is None else given, image)
    if key == "messages":
        return _from_messages(row["messages"], images)
    if key == "texts":
        return _from_texts(row["texts"], images)
    return _from_conversations(row, images)


def image_list(value: Any, key: str) -> list[Any]:
    """Read the value of an image column: nothing, one image, or a list of them.

    An image is a path, bytes, or ``{bytes, path}`` as the Image feature of `datasets` keeps it.
    """
    if value is None or value == "" or value == []:
        return []
    values = value if isinstance(value, list) else [value]
    return [_image(one, key) for one in values]


def _image(value: Any, key: str) -> Any:
    if isinstance(value, Clip):
        named = isinstance(value.source, str)
        return value if named else Clip(tuple(_image(frame, key) for frame in value.source))
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, str | bytes) or value == "":
        raise BadRowError("wrong_type", f"`{key}` is {short(value)}, not a path or a picture")
    return value


def _role_of(speaker: str) -> Role | None:
    return _SPEAKERS.get(speaker) or _SPEAKERS.get(speaker.lower())


def _turns(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadRowError("wrong_type", f"`{key}` is {short(value)}, not a list of turns")
    return value


def _from_conversations(row: dict[str, Any], images: list[Any]) -> list[Message]:
    messages: list[Message] = []
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        messages.append(Message("system", (Text(system),)))
    for turn in _turns(row["conversations"], "conversations"):
        if not isinstance(turn, dict):
            raise BadRowError("wrong_type", f"a turn is {short(turn)}, not an object")
        speaker = turn["from"] if "from" in turn else turn.get("role")
        if not isinstance(speaker, str) or (role := _role_of(speaker)) is None:
            raise BadRowError("wrong_role", f"a turn is from {short(speaker)}")
        value = turn["value"] if "value" in turn else turn.get("content")
        if not isinstance(value, str):
            raise BadRowError("wrong_type", f"the value of a turn is {short(value)}, not text")
        learn = _learn(turn) if "learn" in turn else None
        messages.append(Message(role, (Text(value),), learn))
    if not images and any("<image>" in message.text for message in messages):
        raise BadRowError("placeholders", "the text says <image> and the row has no image")
    return place_images(messages, images)


def _from_texts(turns: Any, images: list[Any]) -> list[Message]:
    messages: list[Message] = []
    for turn in _turns(turns, "texts"):
        if not isinstance(turn, dict):
            raise BadRowError("wrong_type", f"a turn is {short(turn)}, not an object")
        for role in ("user", "assistant"):
            text = turn.get(role)
            if not isinstance(text, str):
                raise BadRowError("wrong_type", f"`{role}` of a turn is {short(text)}, not text")
            messages.append(Message(role, (Text(text),)))
    return place_images(messages, images)


def _from_messages(turns: Any, images: list[Any]) -> list[Message]:
    for turn in _turns(turns, "messages"):
        role = turn.get("role") if isinstance(turn, dict) else turn
        if role not in ("system", "user", "assistant"):
            raise BadRowError("wrong_role", f"a turn is from {short(role)}")
        _learn(turn)
    try:
        messages = from_openai(turns)
    except DataError as error:
        raise BadRowError("wrong_type", str(error)) from None
    parts = [part for message in messages for part in message.content]
    places = [part for part in parts if isinstance(part, ImagePart)]
    if not places:
        return place_images(messages, images)
    empty = sum(place.image is None for place in places)
    if empty != len(images):
        raise BadRowError(
            "placeholders", f"{empty} places without an image and {len(images)} images"
        )
    waiting = iter(images)
    return [
        Message(m.role, tuple(_filled(part, waiting) for part in m.content), m.learn)
        for m in messages
    ]


def _filled(part: Part, waiting: Iterator[Any]) -> Part:
    if not isinstance(part, ImagePart):
        return part
    return ImagePart(next(waiting) if part.image is None else _image(part.image, "image"))


def _learn(turn: dict[str, Any]) -> bool | None:
    learn = turn.get("learn")
    if learn is not None and not isinstance(learn, bool):
        raise BadRowError("wrong_type", f"`learn` of a turn is {short(learn)}, not true or false")
    return learn


def place_images(messages: list[Message], images: list[Any]) -> list[Message]:
    """Put images where the text says ``<image>``, else before the first user turn."""
    if not images:
        return messages
    texts = [message.text for message in messages]
    places = "\0".join(texts).count("<image>")
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
    for number, text in enumerate(texts):
        message = messages[number]
        if "<image>" in text or len(message.content) != 1:
            parts = _split_places(text, waiting)
            messages[number] = Message(message.role, parts, message.learn)
    return messages


def _split_places(text: str, images: Iterator[Any]) -> tuple[Part, ...]:
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


def checked(messages: Sequence[Message]) -> list[Message]:
    """Refuse conversations that no chat template can be asked to render."""
    roles: list[Role] = [message.role for message in messages]
    texts = [message.text for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    if len(roles) == first or roles[first:] != _TURNS[: len(roles) - first]:
        _require_order(roles, first)
    if not messages[-1].learns and not any(message.learns for message in messages[first:]):
        raise BadRowError("no_answer", "no turn is the assistant's")
    empty = {
        role
        for number, (role, text) in enumerate(zip(roles, texts, strict=True))
        if (not text or text.isspace()) and not messages[number].images
    }
    if "assistant" in empty:
        raise BadRowError("no_answer", "an assistant turn is empty")
    if "user" in empty:
        raise BadRowError("no_question", "a user turn is empty")
    for text in texts:
        if not text.isascii():
            _require_unicode(text)
    return list(messages)


def _require_order(roles: Sequence[Role], first: int) -> None:
    """Refuse turns in another order than user, assistant, user, and so on."""
    if "system" in roles[1:]:
        raise BadRowError("wrong_order", "a system turn stands after the first")
    if roles[first : first + 1] != ["user"]:
        raise BadRowError("wrong_order", "the first turn is not the user's")
    for one, other in pairwise(roles[first:]):
        if one == other:
            raise BadRowError("wrong_order", f"two {one} turns follow one another")


def _require_unicode(text: str) -> None:
    """Refuse half characters, which JSON can write and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = short(text[error.start : error.end])
        raise BadRowError("bad_unicode", f"{half} at character {error.start}") from None
