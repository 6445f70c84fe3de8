"""The connector `mov_adapter`: chosen experts are fused into the base encoder's tokens (MoVA).

    base tokens x ─► + Σ gate_e · (x reads expert e) ─► + self-attention ─► + SwiGLU ─► … ─► tokens
                            only the chosen experts

A block reads each chosen expert by cross-attention of its own; a gate weighs them, from the mean of
the tokens and the question (arXiv 2404.13046, section 3.3). Queries and keys are turned by row and
column. After the blocks the mean of what went in and came out is convolved, pooled, convolved, and
goes through two linear layers.

Features come from `vision: {use: mixture, fuse: experts}`: those of the first encoder, and a layer
for each of the others, which has no tokens for a picture that the expert was not chosen for. MoVA
lets BERT read the question; here a small reader reads the language model's own embeddings of it.
MoVA's branches begin silent by zeros in their last layers; here by gates at tanh(0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mmlm.connectors.attention import normal_
from mmlm.connectors.base import Connector, connectors
from mmlm.connectors.c_abstractor import RegBlock
from mmlm.connectors.question import QuestionConfig, QuestionReader, words_of
from mmlm.errors import AlignmentError, ConfigError
from mmlm.features import Grid, VisionFeatures


@connectors.register("mov_adapter")
class MoVAdapterConnectorConfig(QuestionConfig):
    """Fuse the features of chosen experts into those of a base encoder (MoVA)."""

    layers: int = Field(default=2, ge=1)
    """How many experts there are: all encoders of the mixture but the first."""

    widths: tuple[int, ...] = ()
    """The width of each expert's features; by default all are as wide as those of the base."""

    depth: int = Field(default=3, ge=1)
    """Number of blocks."""

    heads: int = Field(default=16, ge=1)
    """Number of heads, which divides the base's width into heads of a multiple of four."""

    most: int = Field(default=3, ge=1)
    """How many of the chosen experts a block reads at most, the best by its gate."""

    rows: int = Field(default=24, ge=1)
    """Rows that are left; a grid with fewer keeps its own."""

    columns: int = Field(default=24, ge=1)
    """Columns that are left; a grid with fewer keeps its own."""

    @model_validator(mode="after")
    def _each_has_a_width(self) -> Self:
        if self.widths and len(self.widths) != self.layers:
            raise ValueError(f"widths names {len(self.widths)} experts, and layers {self.layers}")
        return self

    def out_grid(self, grid: Grid) -> Grid:
        """Return the pooled grid, with the frames of the one that goes in."""
        return Grid(grid.frames, min(grid.rows, self.rows), min(grid.columns, self.columns))

    def build(self, *, vision_width: int, text_width: int) -> MoVAdapterConnector:
        """Build the connector between features and embeddings of these widths."""
        return MoVAdapterConnector(vision_width, text_width, self)


class PlacedAttention(nn.Module):
    """Attention between maps on one grid, turned by row and column; a norm before the last layer.

    Shapes:
        queries: ``(items, tokens, width)``
        context: ``(items, tokens, context_width)``, on the same grid
    """

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width, bias=False)
        self.value = nn.Linear(context_width, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor, grid: Grid) -> Tensor:
        """Let every token read from the context."""
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.query(queries), self.key(context), self.value(context))
        )
        angles = angles_of(grid, query.shape[-1], query.device)
        read = functional.scaled_dot_product_attention(
            turned(query, angles), turned(key, angles), value
        )
        return self.out(self.norm(read.transpose(1, 2).flatten(2)))


class MoVBlock(nn.Module):
    """Reads the chosen experts, then itself, then a SwiGLU; each branch begins silent.

    Shapes:
        tokens:  ``(items, tokens, width)``
        experts: by number, ``(items, tokens, width of the expert)``
        asked:   ``(items, width)``
    """

    def __init__(
        self, width: int, widths: Sequence[int], config: MoVAdapterConnectorConfig
    ) -> None:
        super().__init__()
        self.most = config.most
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in widths)
        self.expert_norms = nn.ModuleList(nn.LayerNorm(own) for own in widths)
        self.reading = nn.ModuleList(PlacedAttention(width, own, config.heads) for own in widths)
        self.weigh = nn.Sequential(
            nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, len(widths))
        )
        self.attention_norm = nn.LayerNorm(width)
        self.attention = PlacedAttention(width, width, config.heads)
        self.mlp_norm = nn.LayerNorm(width)
        inner = int(width * 8 / 3)
        self.mlp_gated, self.mlp_value = nn.Linear(width, inner), nn.Linear(width, inner)
        self.mlp_inner_norm = nn.LayerNorm(inner)
        self.mlp_out = nn.Linear(inner, width)
        self.expert_gate = nn.Parameter(torch.zeros(1))
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, tokens: Tensor, experts: dict[int, Tensor], asked: Tensor, grid: Grid
    ) -> Tensor:
        """Return the tokens after the block."""
        if experts:
            weights = self.weights(tokens, list(experts), asked)
            read = torch.stack(
                [
                    self.reading[number](
                        self.norms[number](tokens), self.expert_norms[number](given), grid
                    )
                    for number, given in experts.items()
                ],
                dim=1,
            )
            fused = (weights[..., None, None].to(read) * read).sum(1)
            tokens = tokens + self.expert_gate.tanh() * fused
        inner = self.attention_norm(tokens)
        tokens = tokens + self.attention_gate.tanh() * self.attention(inner, inner, grid)
        inner = self.mlp_norm(tokens)
        inner = functional.silu(self.mlp_gated(inner)) * self.mlp_value(inner)
        return tokens + self.mlp_gate.tanh() * self.mlp_out(self.mlp_inner_norm(inner))

    def weights(self, tokens: Tensor, chosen: list[int], asked: Tensor) -> Tensor:
        """Return how much of each chosen expert goes in: ``(items, chosen)``, one in sum."""
        scores = self.weigh(torch.cat([asked, tokens.mean(1)], dim=-1))[:, chosen]
        weights = scores.float().softmax(-1)
        if len(chosen) > self.most:
            best = weights.topk(self.most, dim=-1).indices
            weights = weights * torch.zeros_like(weights).scatter(-1, best, 1.0)
            weights = weights / weights.sum(-1, keepdim=True)
        return weights


class MoVAdapterConnector(Connector):
    """Fuses the chosen experts of each picture into its base tokens.

    Shapes:
        values:  ``(tokens, vision_width)``, of the base
        layers:  for each expert ``(tokens of the pictures it was chosen for, its width)``
        returns: ``(items · rows · columns, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: MoVAdapterConnectorConfig
    ) -> None:
        super().__init__()
        if vision_width % config.heads or vision_width // config.heads % 4:
            raise ConfigError(
                f"connector.heads {config.heads} does not divide the base's width {vision_width} "
                f"into heads of a multiple of four, which rows and columns share."
            )
        self.config = config
        self.widths = config.widths or (vision_width,) * config.layers
        self.reader = QuestionReader(text_width, vision_width, config)
        self.blocks = nn.ModuleList(
            MoVBlock(vision_width, self.widths, config) for _ in range(config.depth)
        )
        self.before = RegBlock(vision_width, vision_width)
        self.after = RegBlock(vision_width, vision_width)
        self.project = nn.Sequential(
            nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width)
        )
        normal_(self.blocks)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Fuse; pictures of one grid that the same experts were chosen for run together."""
        experts, asked = self._layers(features), self._asked(features)
        groups: dict[tuple[Grid, tuple[int, ...]], list[int]] = {}
        for index, grid in enumerate(features.grids):
            chosen = tuple(n for n, layer in enumerate(experts) if layer.grids[index].num_tokens)
            groups.setdefault((grid, chosen), []).append(index)
        items = features.items()
        held = [layer.items() for layer in experts]
        found: dict[int, Tensor] = {}
        for (grid, chosen), members in groups.items():
            base = torch.stack([items[index] for index in members])
            given = {n: torch.stack([held[n][index] for index in members]) for n in chosen}
            found |= zip(members, self._fuse(base, given, asked[members], grid), strict=True)
        values = torch.cat([found[index] for index in range(len(items))])
        if self.training:
            values = values + 0.0 * self._unused(groups)
        grids = tuple(map(self.config.out_grid, features.grids))
        return VisionFeatures(values, grids, features.prefix)

    def _fuse(self, base: Tensor, experts: dict[int, Tensor], asked: Tensor, grid: Grid) -> Tensor:
        tokens = base
        for block in self.blocks:
            tokens = block(tokens, experts, asked, grid)
        maps = ((tokens + base) / 2).unflatten(1, grid).flatten(0, 1).movedim(-1, 1)
        out = self.config.out_grid(grid)
        pooled = functional.adaptive_avg_pool2d(self.before(maps), (out.rows, out.columns))
        left = self.after(pooled).movedim(1, -1)
        return self.project(left).reshape(len(base), out.num_tokens, -1)

    def _asked(self, features: VisionFeatures) -> Tensor:
        """Return the mean of each question: ``(items, width)``; zero where nothing is asked."""
        words = words_of(features, self.reader)
        if words is None:
            return features.values.new_zeros(len(features.grids), features.width)
        count = words.mask.sum(1, keepdim=True).clamp(min=1)
        return ((words.values * words.mask[..., None]).sum(1) / count).to(features.values.dtype)

    def _layers(self, features: VisionFeatures) -> list[VisionFeatures]:
        """Return the experts' features.

        Raises:
            AlignmentError: if they are not those of so many experts, or not as wide.
        """
        layers = list(features.layers)
        widths = [layer.width for layer in layers]
        if tuple(widths) != tuple(self.widths):
            raise AlignmentError(
                f"The connector mov_adapter fuses {self.config.layers} experts of the widths "
                f"{list(self.widths)}, and the encoder gave those of {widths}. Use "
                f"`vision: {{use: mixture, fuse: experts}}`, and set connector.layers and "
                f"connector.widths to the experts behind the first encoder."
            )
        return layers

    def _unused(self, groups: dict[tuple[Grid, tuple[int, ...]], list[int]]) -> Tensor:
        """Return a sum over what no picture was shown to: its gradient is zero, and not missing.

        Ranks add up gradients, and each may have chosen others.
        """
        used = {number for _, chosen in groups for number in chosen}
        idle = [number for number in range(self.config.layers) if number not in used]
        total = sum((w.sum() for w in self.reader.parameters()), torch.zeros(()))
        for block in self.blocks:
            assert isinstance(block, MoVBlock)
            parts = [block.norms[n] for n in idle] + [block.expert_norms[n] for n in idle]
            parts += [block.reading[n] for n in idle] + [block.weigh]
            total = total + sum(w.sum() for part in parts for w in part.parameters())
            total = total + block.expert_gate.sum()
        return total

    def last_linear(self) -> nn.Linear:
        """Return the layer to the text width."""
        last = self.project[-1]
        assert isinstance(last, nn.Linear)
        return last


def angles_of(grid: Grid, width: int, device: torch.device) -> Tensor:
    """Return how far each pair of channels turns at each place: ``(tokens, width / 2)``.

    The first half of the channels turns by the row, the second by the column.
    """
    speeds = 10000.0 ** (-torch.arange(0, width // 2, 2, device=device).float() / (width // 2))
    rows = torch.arange(grid.rows, device=device).float()[:, None] * speeds
    columns = torch.arange(grid.columns, device=device).float()[:, None] * speeds
    both = [rows[:, None].expand(-1, grid.columns, -1), columns[None].expand(grid.rows, -1, -1)]
    return torch.cat(both, dim=-1).flatten(0, 1).repeat(grid.frames, 1)


def turned(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels: ``(items, heads, tokens, width)``."""
    cos, sin = angles.cos().to(heads), angles.sin().to(heads)
    first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(pairs, dim=-1).flatten(-2)
