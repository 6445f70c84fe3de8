"""Where a connector writes into the layers of the language model: the only place that knows both.

    look ──► Seen ──► layer 0 … [inject] layer k … [inject] layer n ──► keep
             pictures, slots, samples                                   beside the cache

The layers are found by their number, so that any decoder works; a hook before each chosen one
hands its input to the connector. What was seen is held until the next step, so that layers which
are run again for their gradients (gradient checkpointing) see the same. Pictures that later steps
look at again travel with the language model's cache, and are cut where the cache is cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlm.connectors import Connector, Injecting, Picture, Seen
from mmlm.errors import AlignmentError, ConfigError
from mmlm.features import VisionFeatures

_KEPT = "mmlm_pictures"


class Injection:
    """Joins a connector that injects with the layers of a language model.

    Args:
        connector: The connector.
        language: The language model, whose layers get a hook.

    Raises:
        ConfigError: if the language model has no list of layers, or not enough of them.
    """

    def __init__(self, connector: Injecting, language: Any) -> None:
        self.connector = connector
        self.seen: Seen | None = None
        layers = layers_of(language)
        for index, place in enumerate(connector.places(len(layers))):
            hook = _Before(self, index).write
            layers[place].register_forward_pre_hook(hook, with_kwargs=True)

    @classmethod
    def between(cls, connector: Connector, language: Any, *, num_marks: int) -> Injection | None:
        """Return the join, or None for a connector that does not inject.

        Raises:
            ConfigError: if the image policy puts marks between the features.
        """
        if not isinstance(connector, Injecting):
            return None
        if num_marks:
            raise ConfigError(
                "A connector that writes into the layers of the language model needs each picture "
                "in one piece, and the image policy puts marks between its features. Use "
                "`image.layout: plain`, or another policy."
            )
        return cls(connector, language)

    def look(
        self,
        features: VisionFeatures | None,
        input_ids: Tensor | None,
        like: Tensor,
        *,
        placeholder_id: int,
        cache: Any,
        position_ids: Tensor | None,
        borders: Tensor | None,
    ) -> None:
        """Prepare what the layers may look at in this step.

        Args:
            features: What the connector gave for the new pictures.
            input_ids: ``(batch, tokens)``, or None where there are only embeddings.
            like: ``(batch, tokens, width)``, the embeddings.
            placeholder_id: The id of the placeholder.
            cache: The language model's cache, or None.
            position_ids: ``(batch, tokens)`` or None; they start again with each packed sample.
            borders: ``(samples + 1,)``, the borders of packed samples, or None.

        Raises:
            AlignmentError: if the cache is not empty and holds no pictures of its own.
        """
        batch, tokens = like.shape[:2]
        first = 0 if cache is None else int(cache.get_seq_length())
        if input_ids is None:
            slots = torch.zeros(batch, tokens, dtype=torch.bool, device=like.device)
        else:
            slots = input_ids == placeholder_id
        rows, last = self._earlier(cache, first, batch)
        segments = segments_of(like, first, last, position_ids, borders)
        if features is not None and self.connector.keeps_pictures:
            _deal(rows, features, self.connector.kept(features), slots, segments, first)
        self.seen = Seen(features, slots, segments, first, rows)
        self.keep(cache)

    def keep(self, cache: Any) -> None:
        """Put what was seen beside the cache, for later steps."""
        if cache is not None and self.seen is not None:
            setattr(cache, _KEPT, (self.seen.rows, self.seen.segments[:, -1]))

    def _earlier(self, cache: Any, first: int, batch: int) -> tuple[list[list[Picture]], Any]:
        """Return the pictures of earlier steps that the cache still holds."""
        if not first:
            return [[] for _ in range(batch)], None
        rows, last = getattr(cache, _KEPT, (None, None))
        if rows is None or len(rows) != batch:
            raise AlignmentError(
                "The cache holds tokens whose pictures are not known, and this connector looks at "
                "them again at each step. The cache was made by another model, or joined from "
                "others: answer each conversation by itself."
            )
        return [[picture for picture in row if picture.position < first] for row in rows], last


class _Before:
    """The hook before one layer; an object, so that a copied model has hooks of its own."""

    def __init__(self, injection: Injection, index: int) -> None:
        self.injection, self.index = injection, index

    def write(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the layer's inputs with what the connector writes."""
        seen = self.injection.seen
        hidden = args[0] if args else kwargs["hidden_states"]
        if seen is None:
            return None
        if hidden.shape[:2] != seen.slots.shape:
            raise AlignmentError(
                f"A layer of the language model got {tuple(hidden.shape[:2])} hidden states, and "
                f"the step was prepared for {tuple(seen.slots.shape)}. With gradient checkpointing "
                f"each forward must be followed by its own backward."
            )
        written = self.injection.connector.inject(self.index, hidden, seen)
        if args:
            return (written, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": written}


def layers_of(language: Any) -> nn.ModuleList:
    """Return the list of layers of a decoder.

    Raises:
        ConfigError: if it has none.
    """
    count = int(language.config.num_hidden_layers)
    for module in language.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(
        f"{type(language).__name__} has no list of {count} layers, before which a connector could "
        f"write. Use a connector that does not inject, such as mlp."
    )


def segments_of(
    like: Tensor, first: int, last: Tensor | None, position_ids: Tensor | None, borders: Any
) -> Tensor:
    """Return the number of the packed sample that each token belongs to: ``(batch, tokens)``."""
    batch, tokens = like.shape[:2]
    if first and last is not None:
        return last[:, None].expand(batch, tokens)
    if borders is not None:
        places = torch.arange(tokens, device=like.device)
        return torch.bucketize(places, borders[1:].to(like.device), right=True).expand(batch, -1)
    if position_ids is not None and position_ids.ndim == 2:
        return (position_ids == 0).cumsum(-1).expand(batch, tokens)
    return torch.zeros(batch, tokens, dtype=torch.long, device=like.device)


def _deal(
    rows: list[list[Picture]],
    features: VisionFeatures,
    kept: Any,
    slots: Tensor,
    segments: Tensor,
    first: int,
) -> None:
    """Give each new item to the row in which its placeholders stand."""
    items = iter(zip(features.grids, kept, strict=True))
    for row, slot, segment in zip(rows, slots, segments, strict=True):
        places = slot.nonzero()[:, 0].tolist()
        while places:
            grid, values = next(items)
            row.append(Picture(first + places[0], int(segment[places[0]]), values))
            places = places[grid.num_tokens :]
