"""One training sample, and the ways in which a row can fail to be one.

    files ──► sources ──► Sample ──► planning ──► packing ──► collate
                          you are here

A `Sample` is a conversation with a name; it holds references to images and never pixels.
A row that cannot become a sample raises `BadRowError` with a cause out of `CAUSES`, so that
every drop is counted under its own name. Nothing here reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mmlm.errors import DataError
from mmlm.messages import Message

CAUSES: dict[str, str] = {
    "not_json": "the line is not JSON, or not UTF-8",
    "not_a_row": "the row is not an object with keys, or has another number of columns",
    "unknown_shape": "the row has none of the known shapes",
    "wrong_type": "a value has a type that it must not have",
    "wrong_role": "a turn is spoken by nobody that is known",
    "wrong_order": "the turns do not alternate, or the first is not the user's",
    "no_question": "there is neither a question nor an image to ask about",
    "no_answer": "there is no answer to learn from",
    "bad_unicode": "a text holds half a character, or its file is not UTF-8",
    "duplicate_id": "an earlier row has the same id",
    "placeholders": "the image places in the text and the images differ in number",
    "too_many_images": "the row has more images than a sample may have",
    "no_image_file": "the image file does not exist",
    "url": "the image is a URL, which no source may fetch",
    "bad_image": "the image cannot be opened",
    "image_too_large": "the image has more pixels or bytes than are opened",
    "no_caption": "the image has no text file beside it",
    "no_shard": "a shard is not there, or cannot be opened",
    "cut_shard": "a shard ends too early; what stands behind is lost",
    "bad_template": "the loss mask of this conversation cannot be proven",
    "too_long": "the sample is longer than a row; it is never cut",
    "no_labels": "no token of the sample is learnt",
    "no_pair": "the row is no pair of a chosen and a rejected answer",
}
"""Every cause under which a row can be dropped, with what it means."""


class BadRowError(DataError):
    """A row that cannot become a sample.

    Args:
        cause: A key of `CAUSES`.
        detail: What was found, with the value.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{CAUSES[cause]}: {detail}")
        self.cause = cause
        self.detail = detail


@dataclass(frozen=True)
class Sample:
    """One conversation to learn from.

    Args:
        id: The name of the row inside its source.
        source: The name of the source.
        messages: The turns; images are paths, bytes or PIL images.
        meta: Whatever else the row said, for reports.
        apart: Whether its questions are to be learnt apart from one another.
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    apart: bool = False


class Drop(NamedTuple):
    """One sample that was left out, and why."""

    source: str
    row: int
    id: str
    cause: str
    detail: str
