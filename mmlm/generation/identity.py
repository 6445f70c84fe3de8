"""What makes two pictures the same to a cache: the bytes or the pixels that were shown.

A path is read once, so that what is named and what is shown are the same bytes: a file that
changes between two questions is seen anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmlm.errors import ImageError
from mmlm.messages import Clip, ImagePart, Message

_ORIENTATION = 0x0112


def settled(picture: Any) -> Any:
    """Return the bytes of a file, and any other picture as it is."""
    if not isinstance(picture, str | os.PathLike):
        return picture
    try:
        return Path(picture).read_bytes()
    except OSError:
        return picture  # opening it as a picture explains what is wrong


def with_images(messages: Sequence[Message], pictures: Sequence[Any]) -> list[Message]:
    """Return the conversation with its pictures replaced, in reading order."""
    rest = iter(pictures)
    return [
        replace(
            message,
            content=tuple(
                ImagePart(next(rest)) if isinstance(part, ImagePart) else part
                for part in message.content
            ),
        )
        for message in messages
    ]


def digest(picture: Any) -> bytes:
    """A name for what a picture shows, equal only if it shows the same.

    Raises:
        ImageError: if it is of a type that cannot be shown.
    """
    if isinstance(picture, Clip):
        frames = [settled(frame) for frame in _frames(picture)]
        return hashlib.sha256(b"clip" + b"".join(map(digest, frames))).digest()
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).digest()
    if isinstance(picture, Image.Image):
        clear, turned = picture.info.get("transparency"), picture.getexif().get(_ORIENTATION)
        head = repr((picture.mode, picture.size, picture.getpalette(), clear, turned))
        return hashlib.sha256(head.encode() + picture.tobytes()).digest()
    if isinstance(picture, np.ndarray):
        head = repr((picture.dtype.str, picture.shape))
        return hashlib.sha256(head.encode() + np.ascontiguousarray(picture).tobytes()).digest()
    raise ImageError(
        f"A {type(picture).__name__} cannot be shown to the model. Give a path, the bytes of a "
        f"file, a PIL picture or a numpy array."
    )


def _frames(clip: Clip) -> list[Any]:
    """Return what a clip is named by: its file, or its frames."""
    return [clip.source] if isinstance(clip.source, str | os.PathLike) else list(clip.source)
