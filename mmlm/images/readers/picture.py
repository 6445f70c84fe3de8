"""The reader `picture`: settings for the files that Pillow opens.

It claims nothing: what no other reader knows is a plain picture, and `mmlm.images.decode` opens
it. Its settings say how grey becomes bytes.
"""

from __future__ import annotations

from typing import BinaryIO, Literal

from pydantic import Field

from mmlm.images.readers.base import ReaderConfig, picture_readers


@picture_readers.register("picture")
class PictureConfig(ReaderConfig):
    """PNG, JPEG, TIFF and the other plain pictures."""

    window: Literal["full", "spread"] | tuple[float, float] = Field(default="full")
    """How grey becomes bytes: full keeps the scale (65,535 is white), spread goes from the least
    to the greatest value of the picture, [level, width] shows a part. Colours stay."""

    def claims(self, file: BinaryIO) -> bool:
        """Leave everything to Pillow."""
        return False
