"""From a prepared row to what the model is called with: tensors, and images or their features.

With a frozen encoder each picture is encoded once, in the order in which the trainer meets
it, and kept in the feature cache; without a cache the pixels go with the row. Where the upper
layers of the encoder learn, the cache keeps what the lower ones give, and that goes in the place
of the pixels. The data room decodes, this module decides what has to be decoded at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmlm.data.collate import by_piece, collate_packed, collate_padded
from mmlm.data.pairs import PlannedPair
from mmlm.data.pipeline import PreparedRow
from mmlm.features import ClipSize, Grid, Size, VisionFeatures
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.processing import MMLMProcessor
from mmlm.training.feature_cache import FeatureCache, ImageKeys, TrunkCache
from mmlm.training.trunk import Trunk
from mmlm.training.whole_inputs import whole_inputs
from mmlm.whole import WholeProcessor

TILES_AT_ONCE = 32
"""Most tiles that a frozen encoder takes in one pass, on their way to the cache."""


class Batcher:
    """Makes the inputs of one forward pass.

    Args:
        model: The model, for its encoder.
        processor: Opens pictures.
        packed: Whether samples share a row, or stand under one another.
        cache: Features of a frozen encoder, or None.
        device: Where the tensors go.
    """

    def __init__(
        self,
        model: MMLMForConditionalGeneration,
        processor: MMLMProcessor | WholeProcessor,
        *,
        packed: bool,
        cache: FeatureCache | None,
        device: torch.device,
    ) -> None:
        self._model = model
        self._processor: Any = processor  # ours, or that of a class taken whole
        self._packed, self._cache, self._device = packed, cache, device
        self._keys = ImageKeys()

    def pixels(self, image: Any) -> tuple[str, Tensor | None]:
        """Open one picture, unless its features are known; called by the decoding threads."""
        if self._cache is None:
            return "", self._processor.image_processor.pixels(image)
        key = self._keys.of(image)
        known = key in self._cache
        return key, None if known else self._processor.image_processor.pixels(image)

    def inputs(self, row: PreparedRow, factors: list[Tensor] | None = None) -> dict[str, Any]:
        """Return what the model is called with.

        Args:
            row: Samples and pixels.
            factors: A factor for each position of each sample, or None.
        """
        if self._packed:
            inputs: dict[str, Any] = dict(collate_packed(row.samples))
        else:
            pad_id = self._processor.tokenizer.pad_token_id
            pad_id = self._processor.chat.stop_ids[0] if pad_id is None else pad_id
            inputs = dict(collate_padded(row.samples, pad_id=pad_id))
        if factors is not None:
            pad = pad_sequence(by_piece(row.samples, factors), batch_first=True)
            inputs["loss_weights"] = torch.cat(factors)[None] if self._packed else pad
        inputs = {key: value.to(self._device) for key, value in inputs.items()}
        references = [one.reference for one in row.samples if isinstance(one, PlannedPair)]
        if references and None not in references:
            inputs["reference"] = torch.tensor(references, device=self._device)
        if isinstance(self._processor, WholeProcessor):
            looks: list[Any] = [look for _, look in row.images]
            return inputs | whole_inputs(
                self._model, self._processor, row.samples, looks,
                packed=self._packed, device=self._device,
            )  # fmt: skip
        if row.images:
            inputs |= self._vision(row)
        return inputs

    def _vision(self, row: PreparedRow) -> dict[str, Any]:
        sizes = [size for sample in row.samples for size in sample.sizes]
        inputs = dict(self._processor.image_processor.sizes(sizes))
        if self._cache is None:
            pixels = torch.cat([tiles for _, tiles in row.images if tiles is not None])
            return {"pixel_values": pixels.to(self._device), **inputs}
        features = self._features(row, sizes, self._cache)
        if isinstance(self._cache, TrunkCache):
            values = features.values.view(-1, *self._cache.trunk.shape)
            return {"pixel_values": values.to(self._device), **inputs}
        grids = torch.tensor([list(grid) for grid in features.grids])
        return {"vision_values": features.values.to(self._device), "vision_grids": grids, **inputs}

    def _features(
        self, row: PreparedRow, sizes: list[Size | ClipSize], cache: FeatureCache
    ) -> VisionFeatures:
        """Encode what is new in this row, and take the rest from the cache."""
        pictures = [image for sample in row.samples for image in sample.images]
        known: dict[str, VisionFeatures] = {}
        missing: dict[str, tuple[Tensor, Size | ClipSize]] = {}
        for (key, tiles), picture, size in zip(row.images, pictures, sizes, strict=True):
            if key in known or key in missing:
                continue
            found = cache.get(key)
            if found is not None:
                known[key] = found
            else:
                opens = self._processor.image_processor.pixels
                missing[key] = (opens(picture) if tiles is None else tiles), size
        cache.misses += len(missing)
        cache.hits += len(row.images) - len(missing)
        known |= self._encode(missing, cache)
        chosen = [known[key] for key, _ in row.images]
        values = torch.cat([features.values for features in chosen])
        return VisionFeatures(values, tuple(grid for one in chosen for grid in one.grids))

    def _encode(
        self, missing: dict[str, tuple[Tensor, Size | ClipSize]], cache: FeatureCache
    ) -> dict[str, VisionFeatures]:
        keys = list(missing)
        counter = self._model.model.counter
        tiles = [len(counter.plan(missing[key][1]).tiles) for key in keys]
        found: dict[str, VisionFeatures] = {}
        start = 0
        while start < len(keys):
            end = start + 1
            while end < len(keys) and sum(tiles[start : end + 1]) <= TILES_AT_ONCE:
                end += 1
            pixels, sizes = zip(*(missing[key] for key in keys[start:end]), strict=True)
            with torch.no_grad():
                if isinstance(cache, TrunkCache):
                    pieces = self._lower(pixels, cache.trunk)
                else:
                    pieces = self._model.model.encode_pictures(pixels, sizes)
            pieces = [VisionFeatures(piece.values.detach().cpu(), piece.grids) for piece in pieces]
            found |= dict(zip(keys[start:end], pieces, strict=True))
            start = end
            cache.add(list(zip(keys[start - len(pieces) : start], pieces, strict=True)))
        return found

    def _lower(self, pixels: Sequence[Tensor], trunk: Trunk) -> list[VisionFeatures]:
        """Run the layers that stand still on each picture; an item is a tile."""
        first = next(self._model.model.vision.parameters())
        values = trunk.below(torch.cat(list(pixels)).to(first)).flatten(1)
        counts = [len(tiles) for tiles in pixels]
        return [VisionFeatures(v, (Grid(1, len(v), 1),)) for v in values.split(counts)]
