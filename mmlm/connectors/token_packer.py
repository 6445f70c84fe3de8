"""The connector `token_packer`: each coarse token reads the fine ones of its own square.

TokenPacker (Li et al. 2024, arXiv 2407.02392): the features are resized to a grid that is
coarser by `factor`, and every coarse feature attends over the factor × factor fine ones in its
place, whose keys and values come from several layers of the encoder, stacked. On an odd grid the
last squares are smaller; what lies outside the picture is never read.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mmlm.connectors.attention import STD, check_heads
from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.errors import AlignmentError
from mmlm.features import Grid, VisionFeatures


@connectors.register("token_packer")
class TokenPackerConnectorConfig(ConnectorConfig):
    """Let each coarse token read the fine ones of its square, from several layers (TokenPacker).

    The paper reads four layers of CLIP-L, 12, 16, 22 and 23 (`layers: 4`).
    """

    factor: int = Field(default=2, ge=2)
    """Side of the squares; the number of tokens falls by its square."""

    layers: int = Field(default=0, ge=0)
    """How many layers of the encoder are stacked into keys and values; 0 is the features alone."""

    width: int = Field(default=1024, ge=1)
    """Width of queries, keys and values."""

    heads: int = Field(default=8, ge=1)
    """Number of heads, which divides the width."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        check_heads(self.width, self.heads)
        return self

    def out_grid(self, grid: Grid) -> Grid:
        """Divide rows and columns by the factor, rounded up."""
        return Grid(grid.frames, -(-grid.rows // self.factor), -(-grid.columns // self.factor))

    def build(self, *, vision_width: int, text_width: int) -> TokenPackerConnector:
        """Build the connector between features and embeddings of these widths."""
        return TokenPackerConnector(vision_width, text_width, self)


class TokenPackerConnector(Connector):
    """Reads each square of features by one coarse query.

    Shapes:
        values:  ``(Σ frames · rows · columns, vision_width)``
        layers:  as many of the same shape as the config says
        returns: ``(Σ frames · ⌈rows / factor⌉ · ⌈columns / factor⌉, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: TokenPackerConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        width, stacked = config.width, vision_width * max(1, config.layers)
        self.query = nn.Linear(vision_width, width, bias=False)
        self.key = nn.Sequential(nn.Linear(stacked, width), nn.GELU(), nn.Linear(width, width))
        self.value = nn.Sequential(nn.Linear(stacked, width), nn.GELU(), nn.Linear(width, width))
        self.query_norm = nn.LayerNorm(width, eps=1e-6)
        self.key_norm = nn.LayerNorm(width, eps=1e-6)
        self.value_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.project = nn.Sequential(
            nn.Linear(width, text_width), nn.GELU(), nn.Linear(text_width, text_width)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=STD)
                if isinstance(layer.bias, nn.Parameter):
                    nn.init.zeros_(layer.bias)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Pack each picture."""
        return each_group(features, self._pack, self.config.out_grid, layers=self.config.layers)

    def _pack(self, maps: list[Tensor]) -> Tensor:
        dense, *layers = (each.flatten(0, 1) for each in maps)
        if any(layer.shape[:-1] != dense.shape[:-1] for layer in layers):
            raise AlignmentError(
                "token_packer stacks layers of one grid, and those of this encoder differ; it "
                "needs a ViT. For stages of different sizes use the connector reassemble."
            )
        factor = self.config.factor
        fine = torch.cat(layers, dim=-1) if layers else dense
        rows, columns = (-(-side // factor) for side in dense.shape[1:3])
        coarse = functional.interpolate(
            dense.movedim(-1, 1).float(), size=(rows, columns), mode="bilinear"
        )
        coarse = coarse.movedim(1, -1).to(dense.dtype).flatten(0, 2)[:, None]
        inside = dense.new_ones(1, *dense.shape[1:3], 1, dtype=torch.bool)
        outside = ~_squares(inside, factor)[..., 0].repeat(dense.shape[0], 1)
        packed, _ = self.attention(
            self.query_norm(self.query(coarse)),
            _squares(self.key_norm(self.key(fine)), factor),
            _squares(self.value_norm(self.value(fine)), factor),
            key_padding_mask=outside,
            need_weights=False,
        )
        return self.project(packed).reshape(maps[0].shape[0], -1, self._text_width)

    @property
    def _text_width(self) -> int:
        return self.last_linear().out_features

    def last_linear(self) -> nn.Linear:
        """Return the last layer."""
        last = self.project[-1]
        assert isinstance(last, nn.Linear)
        return last


def _squares(maps: Tensor, factor: int) -> Tensor:
    """Cut maps into squares, filled with zeros beyond the picture.

    Shapes:
        maps:    ``(items, rows, columns, width)``
        returns: ``(items · ⌈rows / factor⌉ · ⌈columns / factor⌉, factor², width)``
    """
    rows, columns, width = maps.shape[1:]
    maps = functional.pad(maps, (0, 0, 0, -columns % factor, 0, -rows % factor))
    cut = maps.unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).transpose(2, 3)
    return cut.reshape(-1, factor * factor, width)
