"""Between the pixels of many pictures and the tokens of each: what follows from their sizes.

Where all tiles have one size and one encoder sees them, `pixel_values` is a plain batch. Where
tiles have sizes of their own, or several encoders get pixels of their own, it is one row of
numbers, picture after picture, tile after tile, encoder after encoder; the sizes of the pictures
say where each begins. The same sizes say in which order the tokens are read, and where marks
(ends of rows, places of tiles) stand between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmlm.errors import AlignmentError
from mmlm.features import ClipSize, Grid, Size, VisionFeatures
from mmlm.images import Blend
from mmlm.modeling.config import TokenCounter
from mmlm.vision import VisionEncoder, in_order, rolling


class Marks(nn.Module):
    """The learnt vectors that stand between the features of a picture.

    As large as LLaVA-NeXT's newline at the start: of about unit length.

    Shapes:
        weight: ``(marks, text_width)``
    """

    def __init__(self, num_marks: int, text_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_marks, text_width) * text_width**-0.5)


def sizes_of(image_sizes: Tensor | None) -> list[Size | ClipSize]:
    """Return the sizes of pictures and clips.

    Shapes:
        image_sizes: ``(pictures, 2)``; ``(pictures, 4)`` where clips may be among them: see
            `ClipSize`; a picture has no frames

    Raises:
        AlignmentError: if they were not passed.
    """
    if image_sizes is None:
        raise AlignmentError(
            "This model's image policy needs `image_sizes`, the height and width of each picture, "
            "beside the pixels. The processor returns them; pass everything that it returns."
        )
    rows = image_sizes.tolist()
    return [ClipSize(*row) if any(row[2:]) else Size(*row[:2]) for row in rows]


def tile_sizes(counter: TokenCounter, sizes: Sequence[Size | ClipSize]) -> list[Size]:
    """Return the size of each tile of all pictures."""
    return [tile.size for size in sizes for tile in counter.plan(size).tiles]


def encode_numbers(
    vision: VisionEncoder,
    numbers: Tensor,
    counter: TokenCounter,
    sizes: Sequence[Size | ClipSize],
) -> VisionFeatures:
    """Encode pictures and clips that came as one row of numbers.

    Raises:
        AlignmentError: if the numbers are not those of pictures of these sizes.
    """
    lengths = [counter.length(size) for size in sizes]
    if numbers.shape != (sum(lengths),):
        raise AlignmentError(
            f"{len(sizes)} pictures with {len(tile_sizes(counter, sizes))} tiles have "
            f"{sum(lengths):,} numbers, and `pixel_values` has the shape {tuple(numbers.shape)}. "
            f"Pass `pixel_values` and `image_sizes` of the same pictures, as the processor "
            f"returns them."
        )
    pixels = [
        piece[: len(piece) - counter.num_mask(size)]
        for piece, size in zip(numbers.split(lengths), sizes, strict=True)
    ]
    share = 0.0 if counter.video is None else counter.video.roll
    if not share:
        together = numbers if sum(map(len, pixels)) == len(numbers) else torch.cat(pixels)
        return vision.encode_numbers(together, tile_sizes(counter, sizes))
    found: list[VisionFeatures] = []
    for piece, size in zip(pixels, sizes, strict=True):  # the frames of one clip are one batch
        with rolling(vision, share if isinstance(size, ClipSize) else 0.0):
            found.append(vision.encode_numbers(piece, tile_sizes(counter, [size])))
    return in_order(found, range(sum(len(each.grids) for each in found)))


def arrange(
    features: VisionFeatures,
    counter: TokenCounter,
    sizes: Sequence[Size | ClipSize],
    marks: Marks,
) -> VisionFeatures:
    """Put the tokens of each picture in the order of the image policy, with its marks.

    Args:
        features: What the connector gave, tile after tile.
        counter: The plans.
        sizes: Of the pictures.
        marks: The vectors between features.

    Returns:
        One item for each picture.
    """
    offsets = features.offsets
    order: list[Tensor] = []
    shares: list[Tensor | None] = []
    first = 0
    for size in sizes:
        last = first + counter.num_items(size)
        places = counter.order(size, features.grids[first:last])
        if places is None:
            order.append(torch.arange(offsets[first], offsets[last]))
        else:
            picked = torch.from_numpy(places.places if isinstance(places, Blend) else places)
            marked = features.values.shape[0] - 1 - picked
            order.append(torch.where(picked >= 0, picked + offsets[first], marked))
        shares.append(torch.from_numpy(places.weights) if isinstance(places, Blend) else None)
        first = last
    if first != len(features.grids):
        raise AlignmentError(
            f"{len(sizes)} pictures have {first} tiles by their sizes, and {len(features.grids)} "
            f"tiles came. Pass `pixel_values` and `image_sizes` of the same pictures."
        )
    table = torch.cat([features.values, marks.weight.to(features.values)])
    grids = tuple(Grid(1, 1, len(places)) for places in order)
    if all(share is None for share in shares):
        return VisionFeatures(table[torch.cat(order).to(table.device)], grids)
    pieces: list[Tensor] = []
    for places, share in zip(order, shares, strict=True):
        picked = table[places.to(table.device)]
        pieces.append(picked if share is None else (picked * share.to(picked)[..., None]).sum(1))
    return VisionFeatures(torch.cat(pieces), grids)


def split_by_picture(
    features: VisionFeatures, counter: TokenCounter, sizes: Sequence[Size | ClipSize]
) -> list[VisionFeatures]:
    """Split the encoder's features into those of each picture."""
    offsets, pieces, first = features.offsets, list[VisionFeatures](), 0
    for size in sizes:
        last = first + len(counter.plan(size).tiles)
        span = slice(offsets[first], offsets[last])
        pieces.append(VisionFeatures(features.values[span], features.grids[first:last]))
        first = last
    return pieces


def images_by_row(
    counter: TokenCounter, sizes: Sequence[Size | ClipSize], slots: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Deal pictures to the rows of a batch, by the placeholders that each row has.

    Returns:
        How many pictures each row has, and how many rows of `pixel_values` they take.

    Raises:
        AlignmentError: if pictures and placeholders do not meet.
    """
    images, lengths = [0] * len(slots), [0] * len(slots)
    row, left = 0, list(slots)
    for size in sizes:
        while row < len(left) and left[row] == 0:
            row += 1
        if row == len(left) or left[row] < counter.count(size):
            raise AlignmentError(
                f"The placeholders of the batch ({list(slots)}) are not those of pictures of the "
                f"sizes {[tuple(each) for each in sizes]}. Pass what the processor returns."
            )
        left[row] -= counter.count(size)
        images[row] += 1
        lengths[row] += counter.length(size)
    return images, lengths


class Place(NamedTuple):
    """Where a picture stands in a batch: in the text, and among the encoder's tiles."""

    row: int
    """Row of the batch."""

    begin: int
    """Position of its first placeholder."""

    end: int
    """Behind its last one."""

    first_tile: int
    """Its first tile among those of the batch."""

    last_tile: int
    """Behind its last one."""


def places_of_pictures(
    counter: TokenCounter, slots: Tensor, image_sizes: Tensor | None
) -> list[Place]:
    """Find the pictures of a batch, in reading order; without sizes each tile is a picture.

    Args:
        counter: The plans.
        slots: ``(batch, tokens)``, where placeholders stand.
        image_sizes: As the model takes them, or None.

    Raises:
        AlignmentError: if pictures and placeholders do not meet.
    """
    lines = [line.nonzero()[:, 0].tolist() for line in slots.cpu()]
    if image_sizes is None:
        each = counter.tokens_per_tile
        counts = [(each, 1) for line in lines for _ in range(len(line) // each)]
    else:
        sizes = sizes_of(image_sizes)
        counts = [(counter.count(size), len(counter.plan(size).tiles)) for size in sizes]
    found: list[Place] = []
    row, tile = 0, 0
    for tokens, tiles in counts:
        while row < len(lines) and not lines[row]:
            row += 1
        if row == len(lines) or len(lines[row]) < tokens:
            break
        places, lines[row] = lines[row][:tokens], lines[row][tokens:]
        found.append(Place(row, places[0], places[-1] + 1, tile, tile + tiles))
        tile += tiles
    if len(found) != len(counts) or any(lines):
        raise AlignmentError(
            f"The placeholders of the batch ({slots.sum(-1).tolist()}) are not those of "
            f"{len(counts)} pictures. Pass what the processor returns."
        )
    return found
