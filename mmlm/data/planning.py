"""From a position in the order to a sample with known length, from headers alone.

    mixture ──► planning ──► packing ──► pipeline ──► collate
                you are here

A planned sample holds its token ids and labels and the places of its images; no pixel has
been decoded. Whatever is wrong becomes a `Drop` with its cause. Cut is nothing, ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmlm.data.mixture import Mixture
from mmlm.data.schema import BadRowError, Drop, Sample
from mmlm.data.sharing import NOT_LEARNT, Coded, join, parted_questions
from mmlm.errors import AlignmentError, ConfigError, ImageError
from mmlm.features import ClipSize, Size
from mmlm.images import Readers, read_size, split_reference
from mmlm.images.decode import MAX_PIXELS, MAX_SIDE_PX
from mmlm.images.header import quick_size
from mmlm.messages import Clip, Message, images_of
from mmlm.processing import MMLMProcessor

_MOST_FILE_BYTES = 2 << 30


@dataclass(frozen=True)
class Planned:
    """A sample whose length is known and whose pixels are not read.

    Shapes:
        ids, labels: ``(tokens,)``, placeholders expanded; the first label is never learnt,
            because nothing stands before it that could predict it
        pieces: lengths of stretches that do not see one another, or nothing for one stretch
        shares: whether the first piece is seen by all others
    """

    position: int
    source: str
    row: int
    id: str
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    images: tuple[Any, ...]
    num_tiles: int
    sizes: tuple[Size | ClipSize, ...] = ()
    num_patches: int = 0
    pieces: tuple[int, ...] = ()
    shares: bool = False

    @property
    def num_tokens(self) -> int:
        """Length in tokens, image tokens included."""
        return len(self.ids)

    @property
    def num_labels(self) -> int:
        """The number of tokens that are learnt."""
        return int((self.labels != NOT_LEARNT).sum())


class Planner:
    """Plans samples of one mixture for one model.

    Args:
        mixture: Which row stands at which position.
        processor: Counts image tokens and renders conversations.
        max_tokens: Longer samples are dropped.
        max_tiles: Samples with more image tiles are dropped.
        max_patches: Samples of which the encoder would see more patches are dropped.
        share: Whether questions that are learnt apart share their pictures' tokens, which the
            attention must be able to do.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: MMLMProcessor,
        *,
        max_tokens: int,
        max_tiles: int,
        max_patches: int | None = None,
        share: bool = False,
    ) -> None:
        self.mixture = mixture
        self.processor = processor
        self.max_tokens, self.max_tiles = max_tokens, max_tiles
        self.max_patches, self.share = max_patches, share

    def plan(self, position: int) -> Planned | Drop:
        """Plan the sample at a position, or say why it is left out."""
        place = self.mixture.place(position)
        source = self.mixture.sources[place.source]
        name = str(place.row)
        try:
            sample = source.sample(place.row)
            name = sample.id
            return self._plan(sample, position, place.row)
        except BadRowError as error:
            return Drop(source.name, place.row, name, error.cause, error.detail)

    def _plan(self, sample: Sample, position: int, row: int) -> Planned:
        pictures = images_of(sample.messages)
        tokens, num_tiles, sizes = self._count(pictures)
        planned = self._encode(sample, position, row, pictures, tokens, num_tiles, sizes)
        if planned.num_tokens > self.max_tokens:
            raise BadRowError(
                "too_long",
                f"{planned.num_tokens} tokens, {sum(tokens)} of them image tokens; a row "
                f"has {self.max_tokens} (`run.row_tokens`)",
            )
        if planned.num_tiles > self.max_tiles:
            raise BadRowError(
                "too_long", f"{planned.num_tiles} image tiles; a row has {self.max_tiles}"
            )
        if self.max_patches is not None and planned.num_patches > self.max_patches:
            raise BadRowError(
                "too_long",
                f"{planned.num_patches:,} patches; a row has {self.max_patches:,} "
                f"(`run.row_patches`)",
            )
        if planned.num_labels == 0:
            raise BadRowError("no_labels", f"none of {planned.num_tokens} tokens is learnt")
        return planned

    def _count(self, pictures: list[Any]) -> tuple[list[int], int, list[Size | ClipSize]]:
        """Count tokens and tiles of each picture from its header."""
        counter = self.processor.image_processor.counter
        tokens: list[int] = []
        sizes: list[Size | ClipSize] = []
        num_tiles = 0
        for picture in pictures:
            try:
                if isinstance(picture, Clip):
                    size = self.processor.image_processor.size_of(picture)
                else:
                    size = size_of(picture, counter.policy.readers)
            except (ImageError, OSError) as error:
                raise BadRowError(cause_of(picture, error), str(error)) from None
            num_tiles += counter.num_tiles(size)
            tokens.append(counter.count(size))
            sizes.append(size)
        return tokens, num_tiles, sizes

    def _patches(self, size: Size | ClipSize) -> int:
        """Count what the encoder sees of a picture, before anything reduces it."""
        if self.max_patches is None:
            return 0
        counter = self.processor.image_processor.counter
        return sum(counter.facts.out_grid(t.size).num_tokens for t in counter.plan(size).tiles)

    def _encode(
        self,
        sample: Sample,
        position: int,
        row: int,
        pictures: list[Any],
        tokens: list[int],
        num_tiles: int,
        sizes: list[Size | ClipSize],
    ) -> Planned:
        parts = parted_questions(sample.messages) if sample.apart else None
        coded = [self._coded(one, tokens) for one in parts or [sample.messages]]
        joined = join(coded, share=self.share)
        # Without sharing, every question has the pictures again.
        times = 1 if joined.shares else len(coded)
        return Planned(
            position=position,
            source=sample.source,
            row=row,
            id=sample.id,
            ids=joined.ids,
            labels=joined.labels,
            images=tuple(pictures) * times,
            num_tiles=num_tiles * times,
            sizes=tuple(sizes) * times,
            num_patches=sum(self._patches(size) for size in sizes) * times,
            pieces=joined.pieces if len(joined.pieces) > 1 else (),
            shares=joined.shares,
        )

    def _coded(self, messages: Sequence[Message], tokens: list[int]) -> Coded:
        try:
            encoded = self.processor.chat.encode(messages, image_tokens=tokens, with_labels=True)
        except (ConfigError, AlignmentError, UnicodeError) as error:
            raise BadRowError("bad_template", str(error)) from None
        assert encoded.labels is not None
        return Coded(
            encoded.ids, encoded.labels, max((e for _, e in encoded.image_spans), default=0)
        )


def size_of(picture: Any, readers: Readers) -> Size:
    """Read the size of a picture, the quick way where its bytes are plain.

    Raises:
        BadRowError: if the file is not there, or is one that nobody should wait for.
        ImageError: if the header cannot be read, or promises too large a picture.
    """
    path = picture if isinstance(picture, str) else _path_of(picture)
    if path is None:
        return read_size(picture, readers=readers)
    try:
        size, length = quick_size(path if "#" not in path else str(split_reference(path)[0]))
    except (FileNotFoundError, NotADirectoryError):
        raise BadRowError("no_image_file", str(picture)) from None
    if length > _MOST_FILE_BYTES:
        raise BadRowError("image_too_large", f"{picture} has {length:,} bytes")
    if size is None or size.height * size.width > MAX_PIXELS or not 0 < max(size) <= MAX_SIDE_PX:
        return read_size(picture, readers=readers)
    return size


def _path_of(picture: Any) -> str | None:
    """Return the path that a picture is named by, or None if it is given in another way."""
    path = os.fspath(picture) if isinstance(picture, os.PathLike) else None
    return path if isinstance(path, str) else None


def cause_of(picture: Any, error: Exception) -> str:
    """Return why a picture was refused: because it is too large, or because it is broken."""
    if isinstance(picture, Clip):
        return "bad_image"
    try:
        read_size(picture, max_pixels=sys.maxsize)
    except (ImageError, OSError) as again:
        error = again
    else:
        return "image_too_large"
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    return "image_too_large" if isinstance(error.__cause__, bombs) else "bad_image"
