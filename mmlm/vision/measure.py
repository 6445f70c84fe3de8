"""What an encoder does on this machine: sizes, stages, FLOPs, speed, and its features as colours.

For people who choose an encoder (`mmlm probe`). Nothing of the house depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmlm.errors import ConfigError
from mmlm.features import VisionFeatures
from mmlm.vision.base import VisionConfig, VisionEncoder

SIDES = (112, 128, 160, 192, 224, 256, 288, 320, 336, 384, 448, 512)
"""Sides that are tried, beside the encoder's own."""


class Stage(NamedTuple):
    """What comes out of one block or stage."""

    name: str
    rows: int
    columns: int
    width: int

    @property
    def num_tokens(self) -> int:
        """How many features."""
        return self.rows * self.columns


def sizes_that_work(config: VisionConfig, encoder: VisionEncoder) -> str:
    """Say which sides an encoder takes, in a line."""
    facts = encoder.facts
    own = facts.side[0]
    if facts.rule == "multiple":
        return f"{own}, and any multiples of {facts.step}, height and width apart"
    if facts.parts or facts.inner is not None or "side_px" not in type(config).model_fields:
        return f"{own} alone"
    works: list[int] = []
    for side_px in sorted({*SIDES, own}):
        untrained = {"side_px": side_px}
        if "pretrained" in type(config).model_fields:
            untrained |= {"pretrained": False, "weights": None}
        try:
            config.model_copy(update=untrained).load()
        except ConfigError:
            continue
        works.append(side_px)
    return ", ".join(map(str, works)) + f" (tried {SIDES[0]} to {SIDES[-1]}; its own is {own})"


def pixels_for(encoder: VisionEncoder, count: int = 1) -> Tensor:
    """Return random pixels that the encoder takes."""
    facts = encoder.facts
    shape = (facts.channels, *facts.side)
    if facts.parts:
        shape = (facts.num_numbers(facts.side_size),)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def stages(encoder: VisionEncoder) -> list[Stage]:
    """Return what each block or stage gives at the encoder's own side; the last is what is used."""
    found: list[Stage] = []
    tower: Any = getattr(encoder, "tower", None)
    network = getattr(tower, "timm_model", None)
    if network is not None:
        maps: Any = network.forward_intermediates(
            pixels_for(encoder), output_fmt="NCHW", intermediates_only=True
        )
        for index, each in enumerate(maps):
            _, width, rows, columns = each.shape
            found.append(Stage(f"intermediate {index}", rows, columns, width))
    out = encoder(pixels_for(encoder))
    grid = out.grids[0]
    found.append(Stage(f"used: {encoder.facts.feature}", grid.rows, grid.columns, out.width))
    return found


@torch.no_grad()
def flops_of(encoder: VisionEncoder) -> int:
    """Count the floating-point operations of one picture: two for each multiply-add."""
    counter = FlopCounterMode(display=False)
    with counter:
        encoder(pixels_for(encoder))
    return int(counter.get_total_flops())


@torch.no_grad()
def images_per_second(encoder: VisionEncoder, *, batch: int = 4, seconds: float = 2.0) -> float:
    """Measure the best rate of several runs, on the device where the encoder is."""
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    pixels = pixels_for(encoder, batch).to(device)
    best, end = float("inf"), time.perf_counter() + seconds
    encoder(pixels)
    while True:
        begin = time.perf_counter()
        encoder(pixels).values.sum().item()
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() > end:
            return batch / best


def colours(features: VisionFeatures) -> list[Tensor]:
    """Return the map of each item in colours: its three largest principal components.

    Values are cut at the 1st and 99th percentile, so that one strong place does not darken the
    rest. The components are those of all items together.

    Returns:
        uint8 ``(rows, columns, 3)`` for each item.
    """
    values = features.values.detach().float().cpu()
    centred = values - values.mean(0)
    _, _, basis = torch.linalg.svd(centred, full_matrices=False)
    parts = centred @ basis[:3].T
    if parts.shape[1] < 3:
        parts = torch.cat([parts, parts.new_zeros(len(parts), 3 - parts.shape[1])], 1)
    # The sign of a component means nothing; it is chosen so that the longer tail is bright.
    parts = parts * parts.pow(3).sum(0).sign().where(parts.pow(3).sum(0) != 0, torch.tensor(1.0))
    low, high = parts.quantile(0.01, dim=0), parts.quantile(0.99, dim=0)
    scaled = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    pieces = (scaled * 255).round().to(torch.uint8).split([g.num_tokens for g in features.grids])
    return [
        piece.view(grid.frames * grid.rows, grid.columns, 3)
        for piece, grid in zip(pieces, features.grids, strict=True)
    ]


def draw_maps(picture: Image.Image, maps: Sequence[Tensor], *, side_px: int = 448) -> Image.Image:
    """Put a picture and the maps of its features side by side."""
    shown = [picture.convert("RGB")] + [Image.fromarray(each.numpy()) for each in maps]
    gap, height = 12, side_px
    widths = [max(1, round(each.width * height / each.height)) for each in shown]
    size = (sum(widths) + gap * (len(shown) + 1), height + 2 * gap)
    page = Image.new("RGB", size, (255, 255, 255))
    left = gap
    for number, (each, width) in enumerate(zip(shown, widths, strict=True)):
        way = Image.Resampling.LANCZOS if number == 0 else Image.Resampling.NEAREST
        page.paste(each.resize((width, height), way), (left, gap))
        left += width + gap
    return page
