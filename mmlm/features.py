"""What passes between the rooms of the picture: grids, and packed features.

    images ──► vision ──► reducers ──► connectors ──► modeling
               └────────── VisionFeatures ──────────┘

A `Grid` is torch-free: image policies, encoders, reducers and connectors compute with it
to count tokens before a single pixel is read. `VisionFeatures` holds the features of many
items (an item is a tile, or a clip of frames), one after another, without padding;
`pad()` is the only place that pads. Nothing here knows an encoder or a language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from mmlm.errors import AlignmentError

if TYPE_CHECKING:
    from torch import Tensor


class Size(NamedTuple):
    """Height and width of a picture, in pixels."""

    height: int
    width: int


class ClipSize(NamedTuple):
    """What is known of a clip before it is encoded: all that its tokens are counted from."""

    height: int
    """Height of a frame, in pixels."""

    width: int
    """Width of a frame, in pixels."""

    frames: int
    """Frames that are taken of it."""

    kept: int = 0
    """Tokens that are left where tokens like those of the frame before are dropped; 0 is all."""

    @property
    def frame(self) -> Size:
        """The size of one frame."""
        return Size(self.height, self.width)


class Grid(NamedTuple):
    """How many features an item has: frames × rows × columns."""

    frames: int
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        """The number of features of an item with this grid."""
        return self.frames * self.rows * self.columns


@dataclass(frozen=True)
class VisionFeatures:
    """The features of many items, packed one after another.

    Shapes:
        values: ``(total_tokens, width)``, items in order, each in frame-row-column order
        prefix: ``(items, num_prefix, width)`` or None: CLS and register tokens, kept apart
        layers: further layers or stages that were asked for, each like `values` with its
            own grids; empty unless the encoder was asked for more than one
        words: ``(words, text_width)`` for each item, what was asked about it; None unless a
            connector reads the question
    """

    values: Tensor
    grids: tuple[Grid, ...]
    prefix: Tensor | None = None
    layers: tuple[VisionFeatures, ...] = field(default=())
    words: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse values whose number does not follow from the grids."""
        wanted = sum(grid.num_tokens for grid in self.grids)
        if self.values.shape[0] != wanted:
            raise AlignmentError(
                f"{len(self.grids)} items with {wanted} tokens by their grids came with "
                f"{self.values.shape[0]} feature vectors. The part before this one changed the "
                f"number of tokens without saying so in its `out_grid`."
            )

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each item begins in `values`, and the end: ``items + 1`` numbers."""
        return tuple(accumulate((grid.num_tokens for grid in self.grids), initial=0))

    @property
    def width(self) -> int:
        """The width of one feature vector."""
        return int(self.values.shape[-1])

    def items(self) -> list[Tensor]:
        """Split `values` into one ``(tokens, width)`` tensor for each item."""
        return list(self.values.split([grid.num_tokens for grid in self.grids]))

    def with_values(self, values: Tensor, grids: Sequence[Grid] | None = None) -> VisionFeatures:
        """Return features with other values (and grids); prefix and layers are kept."""
        return replace(self, values=values, grids=self.grids if grids is None else tuple(grids))

    def to(self, dtype: Any) -> VisionFeatures:
        """Return the same features in another precision, prefix and layers too."""
        prefix = None if self.prefix is None else self.prefix.to(dtype)
        layers = tuple(layer.to(dtype) for layer in self.layers)
        return replace(self, values=self.values.to(dtype), prefix=prefix, layers=layers)

    def pad(self) -> tuple[Tensor, Tensor]:
        """Return ``(items, most_tokens, width)`` and a mask of the same items, True = real."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        padded = pad_sequence(self.items(), batch_first=True)
        lengths = torch.tensor([grid.num_tokens for grid in self.grids], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return padded, mask


def by_grid(features: VisionFeatures) -> list[tuple[Grid, list[int]]]:
    """Group item indices by equal grid, in order of first appearance.

    Parts that need a rectangular batch (pixel shuffle, convolutions) work group by group.
    """
    groups: dict[Grid, list[int]] = {}
    for index, grid in enumerate(features.grids):
        groups.setdefault(grid, []).append(index)
    return list(groups.items())
