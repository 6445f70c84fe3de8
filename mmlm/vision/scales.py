"""The encoder `scales`: one encoder sees the picture at several sizes (S², arXiv 2403.13043).

Each size is a multiple of the encoder's side: the picture is cut into squares of that side, which
are encoded and put together to one map; all maps are brought to one grid by averaging areas, and
joined channel by channel. As many tokens as before, several times as wide.

With `dynamic` the largest size keeps the picture's proportions (dynamic S² of NVILA, arXiv
2412.04468): pictures of any number of squares are taken, `image: {use: native, rule: squares}`
chooses it, and the grid is that of the largest size.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from mmlm.features import Size, VisionFeatures
from mmlm.vision.base import VisionConfig, VisionEncoder, VisionFacts, encoders


@encoders.register("scales")
class ScalesConfig(VisionConfig):
    """One encoder at several scales of the picture."""

    encoder: dict[str, Any]
    """The words of the encoder, such as {use: hf, checkpoint: …, layer: -2}."""

    factors: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Sides of the scales, in sides of the encoder, growing."""

    dynamic: bool = False
    """Whether the largest scale has the picture's proportions."""

    @model_validator(mode="after")
    def _growing(self) -> Self:
        if list(self.factors) != sorted(set(self.factors)) or self.factors[0] < 1:
            raise ValueError(f"factors must grow from 1 or more (got {list(self.factors)})")
        return self

    def load(self, *, dtype: torch.dtype | None = None) -> ScalesEncoder:
        """Load the encoder."""
        return self._wrap(encoders.read(self.encoder, origin="vision.encoder").load(dtype=dtype))

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> ScalesEncoder:
        """Build the encoder without reading weights."""
        assert facts.inner is not None  # `_wrap` has written it
        inner = encoders.read(self.encoder, origin="vision.encoder")
        return self._wrap(inner.build(facts.inner, tower_config))

    def _wrap(self, encoder: VisionEncoder) -> ScalesEncoder:
        inner = encoder.facts
        inner.out_grid(inner.side_size)
        largest = 1 if self.dynamic else self.factors[-1]
        side = (inner.side[0] * largest, inner.side[1] * largest)
        scales = "+".join(map(str, self.factors))
        facts = inner.model_copy(
            update={
                "width": inner.width * len(self.factors),
                "side": side,
                "patch": None,
                "stride": inner.stride * largest,
                "num_prefix": 0,
                "kept_prefix": 0,
                "rule": "multiple" if self.dynamic else "fixed",
                "step": inner.side[0] if self.dynamic else 1,
                "feature": f"{inner.feature} at scales {scales}",
                "num_layers": 0,
                "inner": inner,
            }
        )
        return ScalesEncoder(encoder, facts, self)


class ScalesEncoder(VisionEncoder):
    """Encodes a picture at several scales.

    Shapes:
        pixels:  ``(tiles, channels, height, width)``: of the largest scale
        returns: values ``(tiles · rows · columns, width · scales)``
    """

    def __init__(self, encoder: VisionEncoder, facts: VisionFacts, config: ScalesConfig) -> None:
        super().__init__(facts)
        self.encoder = encoder
        self._config = config

    @property
    def tower_config(self) -> dict[str, Any] | None:
        """The tower's config."""
        return self.encoder.tower_config

    def train(self, mode: bool = True) -> ScalesEncoder:
        """Let the encoder decide by its own weights."""
        super().train(mode)
        self.encoder.train(mode)
        return self

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode tiles."""
        size = Size(*pixels.shape[-2:])
        grid = self.facts.out_grid(size)
        side = self.encoder.facts.side_size
        maps: list[Tensor] = []
        for factor in self._config.factors:
            last = factor == self._config.factors[-1]
            wanted = size if last else Size(side.height * factor, side.width * factor)
            scaled = _resized(pixels, wanted)
            found = self._encode(scaled, side)
            found = functional.interpolate(
                found.float(), size=(grid.rows, grid.columns), mode="area"
            )
            maps.append(found.to(pixels.dtype))
        values = torch.cat(maps, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        return VisionFeatures(values, (grid,) * pixels.shape[0])

    def _encode(self, pixels: Tensor, side: Size) -> Tensor:
        """Encode square by square; returns ``(tiles, width, rows, columns)``."""
        tiles, channels, height, width = pixels.shape
        down, across = height // side.height, width // side.width
        squares = pixels.reshape(tiles, channels, down, side.height, across, side.width)
        squares = squares.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, *side)
        features = self.encoder(squares)
        rows, columns = self.encoder.facts.grid
        # Prefix tokens that are kept have no place on a map: they come first, and are left out.
        values = features.values.view(squares.shape[0], -1, features.width)[:, -rows * columns :]
        maps = values.reshape(tiles, down, across, rows, columns, -1)
        return maps.permute(0, 5, 1, 3, 2, 4).reshape(tiles, -1, down * rows, across * columns)

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters that are not used."""
        return frozenset(f"encoder.{name}" for name in self.encoder.idle_parameters())


def _resized(pixels: Tensor, size: Size) -> Tensor:
    """Resize pixels, in float32, bicubically; averaging where they shrink."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    resized = functional.interpolate(
        pixels.float(), size=tuple(size), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.to(pixels.dtype)
