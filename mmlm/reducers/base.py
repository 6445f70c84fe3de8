"""What every reducer is: a pure rule for grids and widths, and a module that follows it.

Items of different grids may stand in one batch. A reducer whose work needs a rectangle goes
through `each_grid`, which gathers the items of one grid into one tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmlm.config import PartConfig
from mmlm.features import Grid, VisionFeatures, by_grid
from mmlm.registry import Registry


class ReducerConfig(PartConfig):
    """Base of the configs of reducers."""

    def out_grid(self, grid: Grid) -> Grid:
        """Return the grid that comes out, for one that goes in.

        Raises:
            ConfigError: if the reducer cannot take this grid.
        """
        raise NotImplementedError

    def out_width(self, width: int) -> int:
        """Return the width that comes out, for one that goes in."""
        return width

    def build(self, *, width: int) -> Reducer:
        """Build the reducer for features of `width`."""
        raise NotImplementedError


class Reducer(nn.Module):
    """From packed features to fewer packed features."""

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Reduce the features of each item; items do not see one another."""
        raise NotImplementedError


reducers: Registry[ReducerConfig] = Registry("reducer")


def each_grid(
    features: VisionFeatures,
    reduce: Callable[[Tensor], Tensor],
    out_grid: Callable[[Grid], Grid],
) -> VisionFeatures:
    """Reduce the items grid by grid, and put them back in order.

    Args:
        features: Packed features of any grids.
        reduce: From ``(items, frames, rows, columns, width)`` to the same with fewer.
        out_grid: The grid that `reduce` gives for one that goes in.
    """
    groups = by_grid(features)
    if len(groups) == 1:
        (grid, members), *_ = groups
        dense = features.values.reshape(len(members), *grid, -1)
        reduced = reduce(dense)
        values = reduced.reshape(-1, reduced.shape[-1])
        return features.with_values(values, [out_grid(grid)] * len(members))
    items = features.items()
    parts: dict[int, Tensor] = {}
    for grid, members in groups:
        dense = torch.stack([items[index].reshape(*grid, -1) for index in members])
        for index, item in zip(members, reduce(dense), strict=True):
            parts[index] = item.reshape(-1, item.shape[-1])
    values = torch.cat([parts[index] for index in range(len(items))])
    return features.with_values(values, [out_grid(grid) for grid in features.grids])
