"""Running a connector on dense batches, although the pictures of a batch have different grids.

A connector that looks at more than one feature at a time (queries, convolutions) needs a
rectangle. Items whose grids are equal are stacked and run at once; nothing is padded, so that a
picture becomes the same beside others as alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmlm.errors import AlignmentError
from mmlm.features import Grid, VisionFeatures


def each_group(
    features: VisionFeatures,
    run: Callable[[list[Tensor]], Tensor],
    out_grid: Callable[[Grid], Grid],
    *,
    layers: int = 0,
) -> VisionFeatures:
    """Run items of one grid together, and put the results back in order.

    Args:
        features: Packed features of any grids.
        run: From dense maps ``(items, frames, rows, columns, width)`` to tokens ``(items, tokens,
            width)``. The first map is that of `values`, then one for each layer.
        out_grid: The grid that `run` gives for one that goes in.
        layers: How many further layers of the encoder `run` reads.

    Raises:
        AlignmentError: if the features do not hold that many layers.
    """
    kinds = [features, *layers_of(features, layers)]
    groups: dict[tuple[Grid, ...], list[int]] = {}
    for index, grids in enumerate(zip(*(kind.grids for kind in kinds), strict=True)):
        groups.setdefault(grids, []).append(index)
    new_grids = [out_grid(grid) for grid in features.grids]
    if len(groups) == 1:
        (grids, members), *_ = groups.items()
        maps = [
            kind.values.reshape(len(members), *grid, kind.width)
            for kind, grid in zip(kinds, grids, strict=True)
        ]
        return features.with_values(run(maps).flatten(0, 1), new_grids)
    split = [kind.items() for kind in kinds]
    parts: dict[int, Tensor] = {}
    for grids, members in groups.items():
        maps = [
            torch.stack([items[index] for index in members]).unflatten(1, grid)
            for items, grid in zip(split, grids, strict=True)
        ]
        parts |= zip(members, run(maps), strict=True)
    values = torch.cat([parts[index] for index in range(len(new_grids))])
    return features.with_values(values, new_grids)


def layers_of(features: VisionFeatures, count: int) -> tuple[VisionFeatures, ...]:
    """Return the `count` layers that a connector reads beside the features themselves.

    Raises:
        AlignmentError: if there are more or fewer, or they are not as wide as the features.
    """
    if not count:
        return ()
    if len(features.layers) != count:
        raise AlignmentError(
            f"The connector reads {count} layers of the encoder (connector.layers), and the "
            f"encoder gave {len(features.layers)}. Name as many in `vision.layers`, or set "
            f"connector.layers; features from a cache hold the chosen layer alone."
        )
    if any(layer.width != features.width for layer in features.layers):
        widths = [layer.width for layer in features.layers]
        raise AlignmentError(
            f"The connector reads layers as wide as the features, {features.width}, and those of "
            f"the encoder are {widths} wide. Leave out the reducer that stacks features."
        )
    return features.layers
