"""Connectors that also write into layers of the language model, behind one interface.

    encoder features ──► connector ──► placeholders of the text        (as every connector)
                             └───────► `inject`, before chosen layers  (this module)

A connector of this kind says before which layers it writes (`places`) and what it makes of the
hidden states that are about to enter one (`inject`). What it may look at stands in `Seen`: the
new pictures, the positions of their placeholders, and the pictures of earlier steps, which are
kept beside the language model's own cache. `mmlm.modeling.fusion` calls it; nothing here knows
a language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmlm.connectors.base import Connector
from mmlm.errors import ConfigError
from mmlm.features import VisionFeatures


class Picture(NamedTuple):
    """One item that a row has seen.

    Shapes:
        values: ``(tokens, width)``
    """

    position: int
    """Where its first placeholder stands in the row, padding counted."""

    segment: int
    """The sample of a packed row that it belongs to."""

    values: Tensor


@dataclass
class Seen:
    """What a layer may look at in one step.

    Shapes:
        slots: ``(batch, tokens)``, where the placeholders of new pictures stand
        segments: ``(batch, tokens)``, the number of the packed sample that a token belongs to
    """

    features: VisionFeatures | None
    """What the connector gave for the new pictures; None where there are none."""

    slots: Bool[Tensor, "batch tokens"]

    segments: Int[Tensor, "batch tokens"]

    first: int
    """Position of the first token of this step: the number of those in the cache."""

    rows: list[list[Picture]] = field(default_factory=list)
    """What each row has seen so far, for connectors that keep it."""

    _read: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def context(self, *, latest: bool) -> tuple[Tensor, Tensor]:
        """Return the pictures of each row side by side, and who may read them.

        Args:
            latest: Whether a token reads the last picture before it alone, or all before it.

        Returns:
            ``(batch, context, width)`` and, True = may be read, ``(batch, tokens, context)``.
            A token never reads a picture behind it, or one of another packed sample.
        """
        known = self._read.get(str(latest))
        if known is None:
            known = self._read[str(latest)] = self._context(latest)
        return known

    def _context(self, latest: bool) -> tuple[Tensor, Tensor]:
        device = self.slots.device
        positions = torch.arange(self.slots.shape[1], device=device) + self.first
        contexts: list[Tensor] = []
        masks: list[Tensor] = []
        for row, segments in zip(self.rows, self.segments, strict=True):
            visible: list[Tensor] = []
            for index, picture in enumerate(row):
                sees = (positions >= picture.position) & (segments == picture.segment)
                after = row[index + 1 :]
                if latest and after and after[0].segment == picture.segment:
                    sees &= positions < after[0].position
                visible.append(sees[:, None].expand(-1, len(picture.values)))
            contexts.append(torch.cat([self._nothing(), *(picture.values for picture in row)]))
            blind = torch.zeros(len(positions), 0, dtype=torch.bool, device=device)
            masks.append(torch.cat([blind, *visible], dim=1).T)
        return (
            pad_sequence(contexts, batch_first=True),
            pad_sequence(masks, batch_first=True).transpose(1, 2),
        )

    def _nothing(self) -> Tensor:
        """Return the context of a row without pictures, beside rows with some."""
        some = next(picture.values for row in self.rows for picture in row)
        return some[:0]


class Injecting(Connector):
    """A connector that also writes into layers of the language model."""

    keeps_pictures: bool = False
    """Whether later steps look at the pictures again, so that they are kept beside the cache."""

    def places(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers before which it writes, of a language model with so many.

        Raises:
            ConfigError: if the language model has not enough.
        """
        raise NotImplementedError

    def kept(self, features: VisionFeatures) -> Sequence[Tensor]:
        """Return what of each new item is kept for later steps."""
        return features.items()

    def inject(
        self, index: int, hidden: Float[Tensor, "batch tokens width"], seen: Seen
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the hidden states with what is written before the layer ``places[index]``."""
        raise NotImplementedError


def spread(count: int, start: int, interval: int, num_layers: int, *, name: str) -> tuple[int, ...]:
    """Return `count` layers from `start` on, `interval` apart.

    Raises:
        ConfigError: if the last of them is beyond the language model.
    """
    places = tuple(start + index * interval for index in range(count))
    if places and places[-1] >= num_layers:
        raise ConfigError(
            f"The connector {name} writes before layer {places[-1]} of a language model that has "
            f"{num_layers} (from 0 to {num_layers - 1}). Lower connector.start, connector.interval "
            f"or the number of layers."
        )
    return places


def write_to_slots(hidden: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """Return zeros but for the slots, which get `values` in reading order.

    Shapes:
        hidden: ``(batch, tokens, width)``, for its shape
        slots: ``(batch, tokens)``
        values: ``(slots that are True, width)``
    """
    return torch.zeros_like(hidden).masked_scatter(slots[..., None], values.to(hidden.dtype))
