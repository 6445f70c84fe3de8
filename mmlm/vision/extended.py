"""The encoder `extended`: a ViT of any library, with parts that it was not trained with.

    registers       further tokens that every block sees and nobody reads (Darcet et al. 2023, arXiv
                    2309.16588)
    channel_tokens  each channel of a picture is cut into tokens of its own, which share the stem
                    and its positions and get a learnt vector for their channel (ChannelViT, arXiv
                    2309.16108): pictures of any number of channels, C times as many tokens
    positions       `lookhere` takes the table of positions away; instead each head looks in one
                    direction and less at what is far (Fuller et al. 2024, arXiv 2405.13985)

All of them hook in between the blocks (`mmlm.vision.blocks`), so that the weights keep the names
that their library gives them.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmlm.errors import ConfigError
from mmlm.features import Size, VisionFeatures
from mmlm.vision.base import VisionConfig, VisionEncoder, VisionFacts, encoders, pack_tokens
from mmlm.vision.blocks import blocks_of, refuse_recomputing, with_tokens
from mmlm.vision.channels import for_channels
from mmlm.vision.looking import Looking, position_tables


@encoders.register("extended")
class ExtendedConfig(VisionConfig):
    """A ViT with registers, tokens for each channel, or directions instead of positions."""

    encoder: dict[str, Any]
    """The words of the ViT, such as {use: hf, checkpoint: …, layer: -2}."""

    registers: int = Field(default=0, ge=0)
    """Further tokens between the blocks."""

    channel_tokens: int | None = Field(default=None, ge=1)
    """How many channels a picture has, each with tokens of its own; by default those of the ViT,
    in one token."""

    sample_channels: bool = False
    """Whether a stage that learns the encoder shows it a random part of the channels each time
    (hierarchical channel sampling); the tokens of the others are zero."""

    positions: Literal["own", "lookhere"] = "own"
    """The table of the ViT, or directions and distances in its attention."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.encoder.get("use") not in ("hf", "timm"):
            raise ValueError("encoder must be an `hf` or `timm` ViT")
        if self.positions == "lookhere" and self.encoder["use"] != "hf":
            raise ValueError("positions: lookhere needs the attention of an `hf` ViT")
        if self.sample_channels and self.channel_tokens is None:
            raise ValueError("sample_channels needs channel_tokens")
        return self

    def load(self, *, dtype: torch.dtype | None = None) -> ExtendedEncoder:
        """Load the ViT, and add what is new."""
        made = ExtendedEncoder(self._inner().load(dtype=dtype), self)
        made.try_out()
        return made

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> ExtendedEncoder:
        """Build the ViT without reading weights."""
        assert facts.inner is not None  # `ExtendedEncoder` has written it
        return ExtendedEncoder(self._inner().build(facts.inner, tower_config), self)

    def _inner(self) -> VisionConfig:
        words = dict(self.encoder)
        if self.channel_tokens is not None:
            words["channels"] = 1  # the stem sees one channel at a time
        return encoders.read(words, origin="vision.encoder")

    def facts_of(self, inner: VisionFacts) -> VisionFacts:
        """Return the facts of the extended encoder."""
        added = [f"{self.registers} registers"] if self.registers else []
        values: dict[str, Any] = {"inner": inner}
        if self.channel_tokens is not None:
            count = self.channel_tokens
            added.append("tokens for each channel")
            values |= {
                "channels": count,
                "maps": count,
                "mean": for_channels(inner.mean, count),
                "std": for_channels(inner.std, count),
                "kept_prefix": 0,
                "num_layers": 0,
            }
        if self.positions == "lookhere":
            added.append("lookhere")
        values["feature"] = " + ".join([inner.feature, *added])
        return inner.model_copy(update=values)


class ExtendedEncoder(VisionEncoder):
    """Runs a ViT with additions between its blocks.

    Args:
        encoder: The ViT.
        config: What is added.

    Shapes:
        pixels:  ``(tiles, channels, height, width)``, normalised
        returns: values ``(tiles · channels · rows · columns, width)`` with tokens for each channel,
            else ``(tiles · rows · columns, width)``
    """

    def __init__(self, encoder: VisionEncoder, config: ExtendedConfig) -> None:
        super().__init__(config.facts_of(encoder.facts))
        if encoder.packs_tiles:
            raise ConfigError(
                "Nothing can be added between the blocks of an encoder that packs its tiles into "
                "one row. Use a ViT that takes one size, such as CLIP, SigLIP or DINOv2."
            )
        self.encoder: Any = encoder
        self._config = config
        blocks = blocks_of(encoder)
        width = _width_of(blocks[0])
        like = next(encoder.parameters())
        self.registers = self.channel_embedding = None
        if config.registers:
            self.registers = nn.Parameter(torch.randn(config.registers, width).to(like) * 0.02)
        if config.channel_tokens is not None:
            count = config.channel_tokens
            self.channel_embedding = nn.Parameter(torch.randn(count, width).to(like) * 0.02)
        self._looking = None
        if config.positions == "lookhere":
            self._looking = Looking(encoder, blocks)

    @property
    def tower_config(self) -> dict[str, Any] | None:
        """The tower's config."""
        return self.encoder.tower_config

    def train(self, mode: bool = True) -> ExtendedEncoder:
        """Let the ViT decide by its own weights."""
        super().train(mode)
        self.encoder.train(mode)
        return self

    def try_out(self) -> None:
        """Run once, and refuse a network that what is added does not fit into.

        Raises:
            ConfigError: with what the network says.
        """
        facts = self.facts
        try:
            with torch.no_grad():
                self(torch.zeros(1, facts.channels, *facts.side, dtype=self._dtype()))
        except ConfigError:
            raise
        except Exception as error:  # whatever a network raises, it cannot be extended like this
            raise ConfigError(
                f"This ViT cannot be extended so: {' '.join(str(error).split())[:200]}. Use a "
                f"plain one, such as CLIP, SigLIP or DINOv2."
            ) from error

    def _dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode tiles."""
        size = Size(*pixels.shape[-2:])
        grid = self.facts.out_grid(size)
        tiles, channels = pixels.shape[:2]
        places = self.facts.num_prefix + grid.rows * grid.columns
        chosen = list(range(channels))
        with ExitStack() as added:
            if self._looking is not None:
                self._looking.at(grid.rows, grid.columns, self.facts.maps)
            if self.channel_embedding is not None:
                chosen = self._chosen(channels)
                pixels = pixels[:, chosen].flatten(0, 1)[:, None]
                embedding = self.channel_embedding[chosen]
                places += (len(chosen) - 1) * grid.rows * grid.columns
                added.enter_context(
                    beside(blocks_of(self.encoder), embedding, self.facts.num_prefix)
                )
            if self.registers is not None:
                added.enter_context(carried(blocks_of(self.encoder), self.registers))
            found = self.encoder.raw(pixels)
        packed: list[VisionFeatures] = []
        for tokens in found:
            if tokens.ndim == 4:
                tokens = tokens.flatten(2).transpose(1, 2).reshape(tiles, -1, tokens.shape[1])
            tokens = tokens[:, -places:]  # hidden states hold the registers, in front
            if self.channel_embedding is not None and len(chosen) != channels:
                tokens = self._spread(tokens, chosen, grid.rows * grid.columns)
            packed.append(pack_tokens(tokens, self.facts, size))
        return replace(packed[0], layers=tuple(packed[1:]))

    def _chosen(self, channels: int) -> list[int]:
        """Return the channels that are shown: all, or while learning a random part."""
        if not (self.training and self._config.sample_channels):
            return list(range(channels))
        count = int(torch.randint(1, channels + 1, ()).item())
        return sorted(torch.randperm(channels)[:count].tolist())

    def _spread(self, tokens: Tensor, chosen: list[int], each: int) -> Tensor:
        """Put the tokens of the chosen channels in their places, and zeros in the others."""
        prefix, shown = tokens.split([tokens.shape[1] - len(chosen) * each, len(chosen) * each], 1)
        shown = shown.unflatten(1, (len(chosen), each))
        maps = shown.new_zeros(len(tokens), self.facts.maps, each, tokens.shape[-1])
        maps[:, chosen] = shown
        return torch.cat([prefix, maps.flatten(1, 2)], dim=1)

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters that are not used: a table of positions, where heads look instead."""
        idle = set(self.encoder.idle_parameters())
        if self._looking is not None:
            idle |= position_tables(self.encoder)
        return frozenset(f"encoder.{name}" for name in idle)


def _width_of(block: nn.Module) -> int:
    """Return the width of the tokens of a block, by its first norm."""
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor):
            return weight.numel()
    raise ConfigError("The blocks of this encoder have no norm, so they are those of no plain ViT.")


@contextmanager
def carried(blocks: list[nn.Module], registers: Tensor) -> Generator[None]:
    """Let every block see further tokens in front, and take them off behind it.

    So the network sees as many tokens as before wherever it looks at them.
    """
    refuse_recomputing(blocks, "registers")
    held: list[Tensor] = []
    count = len(registers)

    def put(module: Any, given: Any, named: Any) -> Any:
        del module

        def change(tokens: Tensor) -> Tensor:
            own = held.pop() if held else registers.expand(len(tokens), -1, -1)
            return torch.cat([own.to(tokens.dtype), tokens], dim=1)

        return with_tokens(given, named, change)

    def take(module: Any, given: Any, output: Any) -> Any:
        del module, given
        tokens = output[0] if isinstance(output, tuple) else output
        held[:] = [tokens[:, :count]]
        rest = tokens[:, count:]
        return (rest, *output[1:]) if isinstance(output, tuple) else rest

    hooks = [block.register_forward_pre_hook(put, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(take) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def beside(blocks: list[nn.Module], embedding: Tensor, num_prefix: int) -> Generator[None]:
    """Put the tokens of the channels of a tile beside one another before the first block.

    Shapes:
        embedding: ``(channels, width)``
    """
    refuse_recomputing(blocks, "channel_tokens")
    channels = len(embedding)

    def change(tokens: Tensor) -> Tensor:
        tokens = tokens.unflatten(0, (-1, channels))
        prefix, places = tokens[:, 0, :num_prefix], tokens[:, :, num_prefix:]
        places = places + embedding[None, :, None].to(tokens.dtype)
        return torch.cat([prefix, places.flatten(1, 2)], dim=1)

    def put(module: Any, given: Any, named: Any) -> Any:
        del module
        return with_tokens(given, named, change)

    hook = blocks[0].register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
