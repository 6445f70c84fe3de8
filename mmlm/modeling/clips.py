"""From the features of frames to those of clips: joined, pooled, or thinned out.

Frames are encoded like pictures. Here they become one item for each clip, before the reducer
where the video policy says `joined`, else behind the connector. Pictures beside them stay as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mmlm.errors import AlignmentError
from mmlm.features import ClipSize, Grid, Size, VisionFeatures
from mmlm.modeling.config import TokenCounter

Sizes = Sequence[Size | ClipSize]


def connected(
    connect: Callable[[VisionFeatures], VisionFeatures],
    features: VisionFeatures,
    counter: TokenCounter,
    sizes: Sizes,
    numbers: Tensor | None,
) -> VisionFeatures:
    """Bring features to the language model's width, and frames to clips.

    Args:
        connect: Reducer and connector.
        features: What the encoder gave, frame by frame.
        counter: The plans.
        sizes: Of the pictures and clips.
        numbers: The pixels that the features come from, if they are at hand.
    """
    if counter.video is None:
        return connect(features)
    if counter.video.joined:
        features = joined(features, counter, sizes)
    return finished(connect(features), counter, sizes, masks_of(numbers, counter, sizes))


def masks_of(numbers: Tensor | None, counter: TokenCounter, sizes: Sizes) -> list[Tensor | None]:
    """Return which tokens of each clip are kept, out of the row of numbers.

    Shapes:
        numbers: as `encode_numbers` takes them
        returns: ``(tokens of the clip,)``, or None where all are kept
    """
    if numbers is None or not any(counter.num_mask(size) for size in sizes):
        return [None] * len(sizes)
    pieces = numbers.split([counter.length(size) for size in sizes])
    return [
        piece[len(piece) - length :] > 0.5 if (length := counter.num_mask(size)) else None
        for piece, size in zip(pieces, sizes, strict=True)
    ]


def joined(features: VisionFeatures, counter: TokenCounter, sizes: Sizes) -> VisionFeatures:
    """Return features in which the frames of each clip are one item; nothing moves.

    Further layers are joined too, prefix tokens are left out: a clip has none of its own.
    """
    grids, first = list[Grid](), 0
    for size in sizes:
        last = first + len(counter.plan(size).tiles)
        own = features.grids[first:last]
        if isinstance(size, ClipSize):
            grids.append(Grid(sum(grid.frames for grid in own), own[0].rows, own[0].columns))
        else:
            grids += own
        first = last
    layers = tuple(joined(layer, counter, sizes) for layer in features.layers)
    return VisionFeatures(features.values, tuple(grids), layers=layers)


def finished(
    features: VisionFeatures,
    counter: TokenCounter,
    sizes: Sizes,
    masks: Sequence[Tensor | None],
) -> VisionFeatures:
    """Make clips of frames behind the connector, pool them, and leave out what is dropped.

    Args:
        features: What the connector gave.
        counter: The plans.
        sizes: Of the pictures and clips.
        masks: Which tokens of each clip are kept; see `masks_of`.
    """
    video = counter.video
    if video is None or not any(isinstance(size, ClipSize) for size in sizes):
        return features
    if not video.joined and not counter.marks_frames:
        layers = features.layers
        features = joined(features, counter, sizes)
        features = VisionFeatures(features.values, features.grids, layers=layers)
    if video.pool is None and video.drop is None:
        return features
    items, first = features.items(), 0
    values, grids = list[Tensor](), list[Grid]()
    for size, mask in zip(sizes, masks, strict=True):
        if not isinstance(size, ClipSize):
            last = first + len(counter.plan(size).tiles)
            values += items[first:last]
            grids += features.grids[first:last]
            first = last
            continue
        item, grid = items[first], features.grids[first]
        first += 1
        if video.pool is not None:
            grid, item = video.pooled(grid), _pooled(item, grid, video.pooled(grid))
        elif mask is None:
            raise AlignmentError(
                "Which tokens of a clip are dropped is decided by its pixels, and features came "
                "without them. Turn the feature cache off (`run.feature_cache: off`)."
            )
        else:
            item = item[mask.to(item.device)]
            grid = Grid(1, 1, len(item))
        values.append(item)
        grids.append(grid)
    return VisionFeatures(torch.cat(values), tuple(grids), layers=features.layers)


def _pooled(item: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """Average ``(tokens, width)`` over equal parts of time and space."""
    if grid == wanted:
        return item
    clip = item.view(1, *grid, -1).movedim(-1, 1).float()
    pooled = functional.adaptive_avg_pool3d(clip, (wanted.frames, wanted.rows, wanted.columns))
    return pooled.movedim(1, -1).reshape(-1, item.shape[-1]).to(item.dtype)
