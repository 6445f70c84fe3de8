"""The encoder `mixture`: several encoders look at the same picture.

    channels   maps are brought to one grid and joined channel by channel (Eagle, arXiv
               2408.15998; the DINOv2 + SigLIP pair of Prismatic, arXiv 2402.07865)
    sequence   tokens of one encoder after those of another (MouSi, arXiv 2401.17221). Each
               encoder has channels of its own and zeros elsewhere, so that the first layer of the
               connector is a layer of its own for each, and the later ones are shared
    levels     the chosen hidden states of all encoders on one grid, for a connector that merges
               them (`level_merge`: COMM, arXiv 2310.08825)
    experts    the features of the first encoder, and each of the others as a layer of its own on
               the same grid; `mmlm.vision.experts` chooses which of them run for a picture, for the
               connector `mov_adapter` (MoVA, arXiv 2404.13046)

Nothing here learns but the encoders. Each gets pixels under its own normalisation, at its own
size, cut from the same boxes of the source; the pixels travel as one row of numbers, see
`VisionEncoder.encode_numbers`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mmlm.errors import AlignmentError, ConfigError
from mmlm.features import Grid, Size, VisionFeatures, by_grid
from mmlm.reducers import ReducerConfig, reducers
from mmlm.vision.base import VisionConfig, VisionEncoder, VisionFacts, encoders
from mmlm.vision.experts import NOTHING, Choice, RoutingWords, check_experts, routing_words


@encoders.register("mixture")
class MixtureConfig(VisionConfig):
    """Several encoders, each with its own normalisation and size."""

    encoders: tuple[dict[str, Any], ...] = Field(min_length=1)
    """The words of each encoder, such as {use: hf, checkpoint: …, layer: -2}, and if wanted a
    `reducer` of its own. The first one's side is the side that the image policy plans with. Under
    `experts`, `about` says in a sentence what each but the first is good at."""

    fuse: Literal["channels", "sequence", "levels", "experts"] = "channels"
    """How their features are joined: see the module's docstring, or `docs/vision.md`."""

    grid: int | None = Field(default=None, ge=1)
    """Rows of the common grid of `channels` and `levels`; by default those of the first."""

    align_corners: bool = True
    """How maps are resized, bilinearly: corner on corner (Eagle), or side on side."""

    positions: Literal["each", "one", "rows"] = "each"
    """Under `sequence`: whether each token has a position of its own, all tokens of one encoder
    share one, or those of a row do (MouSi)."""

    most: int = Field(default=3, ge=1)
    """Under `experts`: how many the language model chooses for a picture at most."""

    routing: RoutingWords | None = None
    """Under `experts`: the tokens with which it is asked; made when the parts are joined."""

    @model_validator(mode="after")
    def _only_a_sequence_shares(self) -> Self:
        if self.positions != "each" and self.fuse != "sequence":
            raise ValueError("positions are shared under `fuse: sequence` alone")
        if self.fuse == "experts":
            check_experts(self.encoders)
        return self

    def told(self, tokenizer: Any, template: str | None = None) -> MixtureConfig:
        """Return the config with the tokens with which the language model is asked for experts."""
        if self.fuse != "experts":
            return self
        about = [words["about"] for words in self.encoders[1:]]
        words = routing_words(tokenizer, template, about)
        return self.model_copy(update={"routing": words})

    def position_steps(self, facts: VisionFacts) -> list[int] | None:
        """Return what each token of a tile adds to the position."""
        if self.positions == "each":
            return None
        steps: list[int] = []
        for part, (_, reducer) in zip(facts.parts, self._parts(), strict=True):
            grid, _ = _after(part.out_grid(part.side_size), part.width, reducer)
            runs = grid.frames * grid.rows if self.positions == "rows" else 1
            steps += ([1] + [0] * (grid.num_tokens // runs - 1)) * runs
        return steps

    def load(self, *, dtype: torch.dtype | None = None) -> MixtureEncoder:
        """Load every encoder, and work out the common facts."""
        loaded = [part.load(dtype=dtype) for part, _ in self._parts()]
        return self._join(loaded)

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> MixtureEncoder:
        """Build every encoder without reading weights."""
        built = [
            part.build(own, own.tower)
            for (part, _), own in zip(self._parts(), facts.parts, strict=True)
        ]
        return self._join(built)

    def _parts(self) -> list[tuple[VisionConfig, ReducerConfig | None]]:
        """Read the words of the encoders."""
        parts: list[tuple[VisionConfig, ReducerConfig | None]] = []
        for number, words in enumerate(self.encoders):
            origin = f"vision.encoders[{number}]"
            own = {key: value for key, value in words.items() if key not in ("reducer", "about")}
            if own.get("use") == "mixture":
                raise ConfigError(f"{origin} is a mixture itself. Name its encoders here instead.")
            reducer = words.get("reducer")
            config = None if reducer is None else reducers.read(reducer, origin=f"{origin}.reducer")
            parts.append((encoders.read(own, origin=origin), config))
        return parts

    def _join(self, loaded: list[VisionEncoder]) -> MixtureEncoder:
        """Work out what the encoders are together."""
        parts = tuple(
            encoder.facts.model_copy(
                update={"tower": _plain(encoder.tower_config or encoder.facts.tower)}
            )
            for encoder in loaded
        )
        own_reducers = [reducer for _, reducer in self._parts()]
        maps = [
            _after(facts.out_grid(facts.side_size), facts.width, reducer)
            for facts, reducer in zip(parts, own_reducers, strict=True)
        ]
        widths = [width for _, width in maps]
        first, _ = maps[0]
        side = parts[0].side
        rows = self.grid or first.rows
        grid = (rows, max(1, round(rows * first.columns / first.rows)))
        if self.fuse == "sequence":
            grid = (1, sum(own.num_tokens for own, _ in maps))
        elif any(own.rows == 1 and own.columns > 1 for own, _ in maps):
            raise ConfigError(
                f"vision.fuse {self.fuse!r} puts maps on one grid, and an encoder gives tokens "
                f"without places. Drop its prefix tokens, or use `fuse: sequence`."
            )
        if self.fuse == "levels" and len(set(widths)) > 1:
            raise ConfigError(
                f"vision.fuse levels merges states of one width, and the encoders have "
                f"{', '.join(map(str, widths))}. Choose encoders of one width, or `fuse: channels`."
            )
        further = sum(max(1, part.num_layers) for part in parts) * (self.fuse == "levels")
        facts = VisionFacts(
            width=widths[0] if self.fuse in ("levels", "experts") else sum(widths),
            side=side,
            grid=grid,
            stride=max(1, side[0] // grid[0]) if self.fuse != "sequence" else parts[0].stride,
            channels=parts[0].channels,
            mean=parts[0].mean,
            std=parts[0].std,
            resample=parts[0].resample,
            feature=f"{self.fuse}({', '.join(part.feature for part in parts)})",
            num_layers=len(parts) - 1 if self.fuse == "experts" else further,
            parts=parts,
        )
        built = [
            None if reducer is None else reducer.build(width=part.width)
            for part, reducer in zip(parts, own_reducers, strict=True)
        ]
        return MixtureEncoder(loaded, built, facts, self, widths)


def _plain(tower: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a config as JSON gives it back: lists for tuples, words for numbers as keys."""
    return json.loads(json.dumps(tower))


def _after(grid: Grid, width: int, reducer: ReducerConfig | None) -> tuple[Grid, int]:
    """Return grid and width after an encoder's own reducer."""
    if reducer is None:
        return grid, width
    return reducer.out_grid(grid), reducer.out_width(width)


class MixtureEncoder(VisionEncoder):
    """Runs the encoders and joins their features.

    Args:
        loaded: The encoders.
        own_reducers: What stands behind each of them, or None.
        facts: Of all together, with the facts of each as `parts`.
        config: How they are joined.
        widths: Of the features of each, behind its reducer.

    Shapes:
        pixels:  ``(tiles, numbers)``: for each tile the pixels of the first encoder, then those
            of the second …, flat
        returns: values ``(tiles · rows · columns, width)``
    """

    def __init__(
        self,
        loaded: Sequence[VisionEncoder],
        own_reducers: Sequence[nn.Module | None],
        facts: VisionFacts,
        config: MixtureConfig,
        widths: Sequence[int],
    ) -> None:
        super().__init__(facts)
        self._widths = list(widths)
        self.encoders = nn.ModuleList(loaded)
        self.reducers = nn.ModuleList(
            nn.Identity() if reducer is None else reducer for reducer in own_reducers
        )
        self._config = config
        self.choice: Choice | None = None
        """Which experts run, while `mmlm.vision.experts.only` says so; None runs all."""

    def train(self, mode: bool = True) -> MixtureEncoder:
        """Let each encoder decide by its own weights."""
        super().train(mode)
        for encoder in self.encoders:
            encoder.train(mode)
        return self

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode tiles of the common side, whose pixels come as one row of numbers each."""
        if pixels.ndim != 2:
            self.facts.out_grid(Size(*pixels.shape[-2:]))  # refuses other sizes
            raise ConfigError(
                f"A mixture takes the pixels of its encoders as one row of numbers for each tile, "
                f"and got {tuple(pixels.shape)}. The processor makes them."
            )
        return self.encode_numbers(pixels.reshape(-1), [self.facts.side_size] * pixels.shape[0])

    def encode_tiles(self, tiles: Sequence[Tensor]) -> VisionFeatures:
        """Refuse tiles: one picture would have to do for all encoders."""
        return self(tiles[0][None])

    def encode_numbers(self, numbers: Tensor, sizes: Sequence[Size]) -> VisionFeatures:
        """Encode tiles: each encoder gets its own numbers of each tile."""
        grids = [self.facts.out_grid(size) for size in sizes]
        shaped = self._shaped(numbers, sizes)
        count = len(self.encoders)
        if self._config.fuse == "experts":
            return self._chosen(shaped, grids)
        pairs: Any = zip(self.encoders, self.reducers, strict=True)
        seen: list[VisionFeatures] = [
            reducer(encoder.encode_tiles(shaped[number::count]))
            for number, (encoder, reducer) in enumerate(pairs)
        ]
        if self._config.fuse == "sequence":
            return VisionFeatures(_side_by_side(seen), tuple(grids))
        place = self._place(grids)
        placed = [place(features) for features in seen]
        if self._config.fuse == "levels":
            return replace(placed[0], prefix=None, layers=tuple(_levels(seen, placed, place)))
        return VisionFeatures(torch.cat([each.values for each in placed], -1), tuple(grids))

    def _shaped(self, numbers: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        """Return the pixels of each tile for each encoder: ``(channels, height, width)``."""
        views = [view for size in sizes for view in self.facts.views(size)]
        pieces = numbers.split([facts.num_numbers(size) for facts, size in views])
        return [
            piece.view(facts.channels, *size)
            for piece, (facts, size) in zip(pieces, views, strict=True)
        ]

    def _chosen(self, shaped: list[Tensor], grids: list[Grid]) -> VisionFeatures:
        """Run the first encoder, and each other one on the tiles that it was chosen for."""
        count, choice = len(self.encoders), self.choice or Choice()
        if choice.tiles is not None and len(choice.tiles) != len(grids):
            raise AlignmentError(
                f"Experts were chosen for {len(choice.tiles)} tiles, and {len(grids)} came."
            )
        base = choice.base
        if base is None:
            base = self._base(shaped, grids)
        layers: list[VisionFeatures] = []
        for expert in range(count - 1):
            tiles = range(len(grids))
            if choice.tiles is not None:
                tiles = [tile for tile in tiles if expert in choice.tiles[tile]]
            own = tuple(grids[tile] if tile in tiles else NOTHING for tile in range(len(grids)))
            if not tiles:
                values = base.values.new_zeros(0, self._widths[expert + 1])
            else:
                seen = self._run(expert + 1, [shaped[t * count + expert + 1] for t in tiles])
                values = self._place([grids[tile] for tile in tiles])(seen).values
            layers.append(VisionFeatures(values, own))
        return replace(base, layers=tuple(layers))

    def _base(self, shaped: list[Tensor], grids: list[Grid]) -> VisionFeatures:
        """Run the first encoder alone."""
        return self._place(grids)(self._run(0, shaped[:: len(self.encoders)]))

    def base(self, numbers: Tensor, sizes: Sequence[Size]) -> VisionFeatures:
        """Return what the first encoder gives, as `encode_numbers` would; no other one runs."""
        return self._base(self._shaped(numbers, sizes), [self.facts.out_grid(s) for s in sizes])

    def _run(self, number: int, tiles: Sequence[Tensor]) -> VisionFeatures:
        """Return what one encoder and its reducer give for some tiles."""
        encoder: Any = self.encoders[number]
        features = self.reducers[number](encoder.encode_tiles(tiles))
        return VisionFeatures(features.values, features.grids)

    def _place(self, grids: Sequence[Grid]) -> Callable[[VisionFeatures], VisionFeatures]:
        """Return what brings the maps of each tile to these grids."""

        def place(features: VisionFeatures) -> VisionFeatures:
            moved = on_grids(features, grids, align_corners=self._config.align_corners)
            return VisionFeatures(moved, tuple(grids))

        return place

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters of each encoder that are not used."""
        encoders: Any = self.encoders
        return frozenset(
            f"encoders.{number}.{name}"
            for number, encoder in enumerate(encoders)
            for name in encoder.idle_parameters()
        )


def _levels(
    seen: Sequence[VisionFeatures],
    placed: Sequence[VisionFeatures],
    place: Callable[[VisionFeatures], VisionFeatures],
) -> list[VisionFeatures]:
    """Return the hidden states of all encoders on the common grid; `layer` where none is asked."""
    return [
        level
        for features, first in zip(seen, placed, strict=True)
        for level in ([place(layer) for layer in features.layers] or [first])
    ]


def _side_by_side(seen: Sequence[VisionFeatures]) -> Tensor:
    """Put the tokens of each tile one encoder after another, each in channels of its own."""
    total, start = sum(features.width for features in seen), 0
    wide: list[tuple[Tensor, ...]] = []
    for features in seen:
        after = total - start - features.width
        values = functional.pad(features.values, (start, after))
        wide.append(values.split([grid.num_tokens for grid in features.grids]))
        start += features.width
    return torch.cat([part for tile in zip(*wide, strict=True) for part in tile])


def on_grids(features: VisionFeatures, grids: Sequence[Grid], *, align_corners: bool) -> Tensor:
    """Resize the map of each item to a grid, bilinearly; a map that fits is not touched.

    Returns:
        ``(Σ grid.num_tokens, width)``
    """
    if tuple(grids) == features.grids:
        return features.values
    items, done = features.items(), dict[int, Tensor]()
    for own, members in by_grid(features):
        for wanted in sorted({grids[index] for index in members}):
            chosen = [index for index in members if grids[index] == wanted]
            maps = torch.stack([items[i].reshape(own.rows, own.columns, -1) for i in chosen])
            if own != wanted:
                moved = functional.interpolate(
                    maps.permute(0, 3, 1, 2).float(),
                    size=(wanted.rows, wanted.columns),
                    mode="bilinear",
                    align_corners=align_corners,
                )
                maps = moved.permute(0, 2, 3, 1).to(features.values.dtype)
            done |= dict(zip(chosen, maps.flatten(1, 2), strict=True))
    return torch.cat([done[index] for index in range(len(items))])
