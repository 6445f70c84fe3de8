"""Resizing the position tables of a tower to another grid, in two dimensions.

Which parameters are position tables is found by building the tower at the other side and
looking at which shapes changed. At the same grid nothing is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from mmlm.errors import ConfigError
from mmlm.features import Size
from mmlm.vision import hf_facts
from mmlm.vision.probe import MOST_PREFIX


def resize_positions(
    tower: PreTrainedModel, target: Any, native: Size, patch: int | None
) -> PreTrainedModel:
    """Copy the weights of `tower` into `target`, resizing what depends on the grid.

    Args:
        tower: The tower at its native side.
        target: The same architecture at the other side; its weights are overwritten.
        native: The side of `tower`.
        patch: Side of a patch in pixels.

    Raises:
        ConfigError: if a parameter changed its shape that is no table of positions.
    """
    side = hf_facts.side_of(target.config) or native
    theirs = target.state_dict()
    state: dict[str, Tensor] = {}
    for name, weight in tower.state_dict().items():
        wanted = theirs[name].shape
        if weight.shape == wanted:
            state[name] = weight
        elif not weight.is_floating_point():
            state[name] = theirs[name]
        elif patch is None:
            raise ConfigError(f"its parameter {name} depends on the size and cannot be resized")
        else:
            grids = [(px.height // patch, px.width // patch) for px in (native, side)]
            state[name] = resize_table(weight, grids[0], grids[1], wanted, name=name)
    target.load_state_dict(state)
    return target.to(tower.dtype).eval()


def resize_table(
    table: Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    wanted: torch.Size,
    *,
    name: str = "table",
) -> Tensor:
    """Resize ``([1,] prefix + rows · columns, width)`` to another grid.

    Bicubic in float32, without antialiasing: what transformers does for
    ``interpolate_pos_encoding``. Positions of prefix tokens, which come first, are kept.

    Raises:
        ConfigError: if the table is not laid out like this.
    """
    num_prefix = table.shape[-2] - old[0] * old[1] if table.ndim > 1 else -1
    lead = table.shape[:-2]
    fits = wanted == (*lead, num_prefix + new[0] * new[1], table.shape[-1])
    if not 0 <= num_prefix <= MOST_PREFIX or lead not in ((), (1,)) or not fits:
        raise ConfigError(
            f"its parameter {name} of shape {tuple(table.shape)} depends on the size and is no "
            f"table of {old[0]} x {old[1]} positions, so that it cannot be resized"
        )
    flat = table.reshape(table.shape[-2:])
    places = flat[num_prefix:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(places, size=new, mode="bicubic", align_corners=False)
    places = resized.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(table.dtype)
    return torch.cat([flat[:num_prefix], places]).reshape(wanted)
