"""What a terminal chat shows and keeps beside its words: pictures as blocks, and the saved talk.

`mmlm.cli.chat` holds the conversation; this module only draws and writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmlm.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmlm.messages import Message

_WIDEST = 48
_HIGHEST = 20
_RESET = "\x1b[0m"


def shows_colours(stream: IO[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written there is seen by a person, in all colours."""
    colours = environment.get("COLORTERM", "") in ("truecolor", "24bit")
    return stream.isatty() and colours and "NO_COLOR" not in environment


def blocks(image: Image, columns: int = _WIDEST, rows: int = _HIGHEST) -> str:
    """Draw a picture with half blocks: two pixels, one above the other, in each place.

    Args:
        image: The picture, in RGB.
        columns: Most places in a row.
        rows: Most rows.
    """
    scale = min(columns / image.width, 2 * rows / image.height)
    width = max(1, round(image.width * scale))
    height = max(2, 2 * round(image.height * scale / 2))
    pixels = image.convert("RGB").resize((width, height)).tobytes()
    lines: list[str] = []
    for top in range(0, height, 2):
        line = ""
        for column in range(width):
            upper = tuple(pixels[3 * (top * width + column) :][:3])
            lower = tuple(pixels[3 * ((top + 1) * width + column) :][:3])
            line += "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*upper, *lower)
        lines.append(line + _RESET)
    return "\n".join(lines)


def save_talk(messages: Sequence[Message], path: Path) -> None:
    """Write a conversation: Markdown for people (.md), or JSON in the OpenAI shape (.json).

    Pictures are named by their paths.

    Raises:
        UsageError: if the name ends otherwise, the file is there already, or it cannot be written.
    """
    if path.suffix not in (".md", ".json"):
        raise UsageError(f"/save needs a name that ends in .md or .json (got {str(path)!r}).")
    if path.exists():
        raise UsageError(f"{path} is there already and is left as it is. Choose another name.")
    text = _as_json(messages) if path.suffix == ".json" else _as_markdown(messages)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None


def _as_json(messages: Sequence[Message]) -> str:
    from mmlm.messages import to_openai

    rows: list[dict[str, Any]] = to_openai(messages)
    return json.dumps(rows, indent=2, ensure_ascii=False, default=str) + "\n"


def _as_markdown(messages: Sequence[Message]) -> str:
    turns: list[str] = []
    for message in messages:
        who = "You" if message.role == "user" else "Model"
        shown = "".join(f"![picture]({image})\n\n" for image in message.images)
        turns.append(f"**{who}**\n\n{shown}{message.text}\n")
    return "\n".join(turns)
