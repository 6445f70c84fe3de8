"""What every vision encoder is: facts that need no weights, and a module that gives features.

`VisionFacts` are resolved once, when the encoder is first loaded, and stored in `config.json`.
From then on images are planned, tokens counted and pixels normalised without the weights.
Which library a tower comes from is the business of the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.config import Config, PartConfig
from mmlm.errors import ConfigError
from mmlm.features import Grid, Size, VisionFeatures
from mmlm.registry import Registry

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class VisionFacts(Config):
    """What is known about an encoder once it was probed."""

    width: int = Field(ge=1)
    """Width of one feature vector."""

    side: tuple[int, int]
    """Height and width of the pictures that the encoder takes, in pixels."""

    grid: tuple[int, int]
    """Rows and columns of features at that side, as counted in the probe."""

    patch: int | None = None
    """Side of one patch, for encoders that cut the picture into patches."""

    stride: int = Field(ge=1)
    """Pixels from one feature to the next."""

    num_prefix: int = Field(default=0, ge=0)
    """CLS and register tokens that the encoder puts before the patches."""

    kept_prefix: int = Field(default=0, ge=0)
    """How many of them are handed on as tokens, before the patches."""

    channels: int = Field(default=3, ge=1)
    """Channels of a pixel."""

    mean: tuple[float, ...]
    """Mean of each channel, for pixels from 0 to 1."""

    std: tuple[float, ...]
    """Standard deviation of each channel, for pixels from 0 to 1."""

    resample: str = "bicubic"
    """How pictures are resized: bilinear, bicubic, lanczos or nearest-exact."""

    rule: Literal["fixed", "multiple"] = "fixed"
    """Whether the encoder takes its side alone, or any multiple of `step` as well."""

    step: int = Field(default=1, ge=1)
    """What other sides must be a multiple of, under the rule `multiple`."""

    feature: str
    """Which features are used, e.g. `hidden_states[-2]`."""

    num_layers: int = Field(default=0, ge=0)
    """Further hidden states or stages that come beside the features."""

    maps: int = Field(default=1, ge=1)
    """Maps that a tile becomes: more than one where channels or frames have tokens of their own."""

    frames: int = Field(default=1, ge=1)
    """Frames that the encoder takes at once; a picture is shown to it as often."""

    parts: tuple[VisionFacts, ...] = ()
    """The facts of each encoder, where several work together; each gets pixels of its own."""

    inner: VisionFacts | None = None
    """The facts of the encoder that this one runs (`scales`, `extended`)."""

    tower: dict[str, Any] | None = None
    """The tower's config as transformers writes it, where it is one of several."""

    prompts: tuple[tuple[int, ...], ...] = ()
    """The tokens of the prompts under which a picture is read (`florence2`)."""

    @property
    def side_size(self) -> Size:
        """The encoder's side as a `Size`."""
        return Size(*self.side)

    def out_grid(self, size: Size) -> Grid:
        """Return the grid of features of a tile.

        Args:
            size: Height and width of the tile, in pixels.

        Raises:
            ConfigError: if the encoder does not take this size; names sizes that it takes.
        """
        if tuple(size) == self.side:
            rows, columns = self.grid
        elif self.rule == "multiple" and not any(pixels % self.step for pixels in size):
            rows, columns = size.height // self.stride, size.width // self.stride
        else:
            raise ConfigError(
                f"This encoder does not take tiles of {size.height} x {size.width} pixels. "
                f"{self._sizes(size)}"
            )
        if self.kept_prefix:
            return Grid(1, 1, rows * columns + self.kept_prefix)
        return Grid(self.maps, rows, columns)

    def views(self, size: Size) -> list[tuple[VisionFacts, Size]]:
        """Return, for each encoder that sees a tile of this size, its facts and its own size."""
        if not self.parts:
            return [(self, size)]
        return [view for part in self.parts for view in part.views(self._size_for(part, size))]

    def num_numbers(self, size: Size) -> int:
        """How many numbers the pixels of a tile of this size are, for all encoders together."""
        return sum(
            facts.frames * facts.channels * own.height * own.width
            for facts, own in self.views(size)
        )

    def _size_for(self, part: VisionFacts, size: Size) -> Size:
        """Return the size that one of several encoders gets for a tile."""
        height, width = (
            max(1, round(pixels * own / common))
            for pixels, own, common in zip(size, part.side, self.side, strict=True)
        )
        return Size(height, width)

    def _sizes(self, size: Size) -> str:
        """Name sizes that work, near to `size`."""
        native = f"{self.side[0]} x {self.side[1]}"
        if self.rule == "fixed":
            return f"It takes {native} alone. Set `vision.side_px` to load it at another size."
        near = [max(self.step, round(pixels / self.step) * self.step) for pixels in size]
        return f"It takes {native} and multiples of {self.step}, such as {near[0]} x {near[1]}."


class VisionConfig(PartConfig):
    """Base of the configs of vision encoders."""

    def load(self, *, dtype: torch.dtype | None = None) -> VisionEncoder:
        """Build the encoder with its pretrained weights, and probe its facts.

        Args:
            dtype: Type of the weights; by default float32.

        Raises:
            ConfigError: if the checkpoint is no image encoder, or does not take the size.
        """
        raise NotImplementedError

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> VisionEncoder:
        """Build the same encoder from what `config.json` holds, without reading weights.

        Args:
            facts: The facts that `load` found.
            tower_config: What `VisionEncoder.tower_config` was.
        """
        raise NotImplementedError

    def told(self, tokenizer: Any, template: str | None = None) -> VisionConfig:
        """Return the config with what it has to know of the language model's words, once joined.

        Args:
            tokenizer: The language model's.
            template: Its chat template; by default that of the tokenizer.
        """
        del tokenizer, template
        return self

    def position_steps(self, facts: VisionFacts) -> list[int] | None:
        """Return what each token of a tile adds to the position; None where each adds one."""
        del facts
        return None


class VisionEncoder(nn.Module):
    """From normalised pixels to packed features.

    Subclasses keep the network of the library as `tower` and write `forward`. An encoder none
    of whose parameters learn stays in evaluation mode, and batch norm always does: what an
    image becomes must not depend on the images beside it.

    Args:
        facts: What is known about this encoder.
    """

    packs_tiles: ClassVar[bool] = False
    """Whether the tokens of all tiles stand in one row while they are encoded."""

    def __init__(self, facts: VisionFacts) -> None:
        super().__init__()
        self.facts = facts

    @property
    def tower_config(self) -> dict[str, Any] | None:
        """The config of the tower as transformers writes it, or None if it has no tower."""
        return None

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode tiles.

        Args:
            pixels: ``(tiles, channels, height, width)``, normalised.

        Returns:
            One item for each tile, with the grid ``facts.out_grid(size)``.
        """
        raise NotImplementedError

    def raw(self, pixels: Tensor) -> list[Tensor]:
        """Return the features and further layers as the network gives them, before packing.

        Shapes:
            returns: ``(tiles, num_prefix + places, width)`` or ``(tiles, width, rows, columns)``
        """
        raise NotImplementedError

    def encode_tiles(self, tiles: Sequence[Tensor]) -> VisionFeatures:
        """Encode tiles of any sizes that the encoder takes, without padding.

        Here tiles of one size go through together; an encoder that can, packs them all.

        Args:
            tiles: ``(channels, height, width)`` each, normalised.
        """
        groups: dict[torch.Size, list[int]] = {}
        for index, tile in enumerate(tiles):
            groups.setdefault(tile.shape, []).append(index)
        done = [self(torch.stack([tiles[i] for i in members])) for members in groups.values()]
        if len(done) == 1:
            return done[0]
        order = [index for members in groups.values() for index in members]
        return in_order(done, order)

    def encode_numbers(self, numbers: Tensor, sizes: Sequence[Size]) -> VisionFeatures:
        """Encode tiles whose pixels come as one row of numbers, tile after tile.

        Args:
            numbers: ``(facts.num_numbers(size) of each,)``, normalised.
            sizes: Of the tiles.
        """
        pieces = numbers.split([self.facts.num_numbers(size) for size in sizes])
        shaped = zip(pieces, sizes, strict=True)
        channels = self.facts.frames * self.facts.channels
        return self.encode_tiles([piece.view(channels, *size) for piece, size in shaped])

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters that the chosen feature does not depend on.

        They never get a gradient (the blocks after `layer`, a pooling head), so that a trainer
        can leave them out. Empty where everything is used.
        """
        return frozenset()

    def train(self, mode: bool = True) -> VisionEncoder:
        """Enter training mode, but for what must not depend on the batch."""
        super().train(mode and any(weight.requires_grad for weight in self.parameters()))
        self.hold_batch_norms()
        return self

    def hold_batch_norms(self) -> None:
        """Let batch norms use what they know of all data, and not what is in the batch."""
        for module in self.modules():
            if isinstance(module, _BATCH_NORMS):
                module.eval()


encoders: Registry[VisionConfig] = Registry("vision encoder", plural="vision_encoders")


def in_order(parts: Sequence[VisionFeatures], order: Sequence[int]) -> VisionFeatures:
    """Join features, and put their items in order.

    Args:
        parts: Features of some items each.
        order: The place of each item of all parts, one part after another.
    """
    found = [item for part in parts for item in part.items()]
    grids = [grid for part in parts for grid in part.grids]
    back = sorted(range(len(order)), key=order.__getitem__)
    prefix = None
    if parts[0].prefix is not None:
        prefix = torch.cat([part.prefix for part in parts if part.prefix is not None])[back]
    return VisionFeatures(
        torch.cat([found[index] for index in back]),
        tuple(grids[index] for index in back),
        prefix,
        tuple(
            in_order(layer, order) for layer in zip(*(part.layers for part in parts), strict=True)
        ),
    )


def pack_tokens(tokens: Tensor, facts: VisionFacts, size: Size) -> VisionFeatures:
    """Pack ``(tiles, num_prefix + patches, width)`` into features.

    Prefix tokens go apart, or stay before the patches where `facts.kept_prefix` says so.
    """
    grid = facts.out_grid(size)
    dropped = facts.num_prefix - facts.kept_prefix
    values = tokens[:, dropped:].reshape(-1, tokens.shape[-1])
    prefix = tokens[:, : facts.num_prefix] if facts.num_prefix else None
    return VisionFeatures(values, (grid,) * tokens.shape[0], prefix=prefix)
