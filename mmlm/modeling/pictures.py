"""Between the pixels of many pictures and the tokens of each: what follows from their sizes.

Where all tiles have one size and one encoder sees them, `pixel_values` is a plain batch. Where
tiles have sizes of their own, or several encoders get pixels of their own, it is one row of
numbers, picture after picture, tile after tile, encoder after encoder; the sizes of the pictures
say where each begins. The same sizes say in which order the tokens are read, and where marks
(ends of rows, places of tiles) stand between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmlm.errors import AlignmentError
from mmlm.features import Grid, Size, VisionFeatures
from mmlm.modeling.config import TokenCounter
from mmlm.vision import VisionEncoder


class Marks(nn.Module):
    """The learnt vectors that stand between the features of a picture.

    As large as LLaVA-NeXT's newline at the start: of about unit length.

    Shapes:
        weight: ``(marks, text_width)``
    """

    def __init__(self, num_marks: int, text_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_marks, text_width) * text_width**-0.5)


def sizes_of(image_sizes: Tensor | None) -> list[Size]:
    """Return the sizes of pictures.

    Raises:
        AlignmentError: if they were not passed.
    """
    if image_sizes is None:
        raise AlignmentError(
            "This model's image policy needs `image_sizes`, the height and width of each picture, "
            "beside the pixels. The processor returns them; pass everything that it returns."
        )
    return [Size(*row) for row in image_sizes.tolist()]


def tile_sizes(counter: TokenCounter, sizes: Sequence[Size]) -> list[Size]:
    """Return the size of each tile of all pictures."""
    return [tile.size for size in sizes for tile in counter.plan(size).tiles]


def encode_numbers(
    vision: VisionEncoder, numbers: Tensor, counter: TokenCounter, sizes: Sequence[Size]
) -> VisionFeatures:
    """Encode pictures that came as one row of numbers.

    Raises:
        AlignmentError: if the numbers are not those of pictures of these sizes.
    """
    tiles = tile_sizes(counter, sizes)
    wanted = sum(counter.facts.num_numbers(size) for size in tiles)
    if numbers.shape != (wanted,):
        raise AlignmentError(
            f"{len(sizes)} pictures with {len(tiles)} tiles have {wanted:,} numbers, and "
            f"`pixel_values` has the shape {tuple(numbers.shape)}. Pass `pixel_values` and "
            f"`image_sizes` of the same pictures, as the processor returns them."
        )
    return vision.encode_numbers(numbers, tiles)


def arrange(
    features: VisionFeatures, counter: TokenCounter, sizes: Sequence[Size], marks: Marks
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
    first = 0
    for size in sizes:
        plan = counter.plan(size)
        last = first + len(plan.tiles)
        places = counter.policy.arrange(size, plan, features.grids[first:last])
        if places is None:
            order.append(torch.arange(offsets[first], offsets[last]))
        else:
            picked = torch.from_numpy(places)
            marked = features.values.shape[0] - 1 - picked
            order.append(torch.where(picked >= 0, picked + offsets[first], marked))
        first = last
    if first != len(features.grids):
        raise AlignmentError(
            f"{len(sizes)} pictures have {first} tiles by their sizes, and {len(features.grids)} "
            f"tiles came. Pass `pixel_values` and `image_sizes` of the same pictures."
        )
    table = torch.cat([features.values, marks.weight.to(features.values)])
    values = table[torch.cat(order).to(table.device)]
    return VisionFeatures(values, tuple(Grid(1, 1, len(places)) for places in order))


def split_by_picture(
    features: VisionFeatures, counter: TokenCounter, sizes: Sequence[Size]
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
    counter: TokenCounter, sizes: Sequence[Size], slots: Sequence[int]
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
