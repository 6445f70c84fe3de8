"""What the joined model does with pictures, before its language model begins.

    pixels ──► vision ──► reducer ──► connector ──► what takes the places of the placeholders

Features may be computed now or have been computed earlier; a connector may read the question. Each
step can be called by itself: objectives, caches and probes do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from mmlm.connectors import Connector, QuestionConfig
from mmlm.errors import AlignmentError
from mmlm.features import ClipSize, Grid, Size, VisionFeatures
from mmlm.modeling.clips import connected
from mmlm.modeling.config import TokenCounter
from mmlm.modeling.pictures import Marks, arrange, encode_numbers, sizes_of, split_by_picture
from mmlm.modeling.questions import Conditioned
from mmlm.modeling.routing import Router
from mmlm.vision import VisionEncoder
from mmlm.vision.depthwise import quick_depthwise


class Seeing(PreTrainedModel):
    """The part of `MMLMModel` that sees."""

    vision: VisionEncoder
    reducer: nn.Module | None
    connector: Connector
    counter: TokenCounter
    marks: Marks | None
    conditioned: Conditioned | None
    router: Router | None

    @property
    def reads_question(self) -> bool:
        """Whether what a picture becomes hangs on the question."""
        return self.question_config is not None

    @property
    def question_config(self) -> QuestionConfig | None:
        """The connector's config, if it reads the question."""
        config = getattr(self.connector, "config", None)
        return config if isinstance(config, QuestionConfig) else None

    def encode_images(
        self,
        pixel_values: Tensor,
        sizes: Sequence[Size | ClipSize] | None = None,
        words: tuple[Tensor, ...] | None = None,
    ) -> VisionFeatures:
        """Return the encoder's features, without a graph where the encoder stands still.

        Shapes:
            words: ``(words, text_width)`` for each tile, where the encoder reads the question
            pixel_values: ``(tiles, channels, height, width)``, or one row of numbers with the
                `sizes` of the pictures; see `mmlm.modeling.pictures`
        """
        learning = (weight.requires_grad for weight in self.vision.parameters())
        reads = self.conditioned is not None and self.conditioned.ask(words)
        learns = torch.is_grad_enabled() and (pixel_values.requires_grad or any(learning) or reads)
        pixels = pixel_values.to(self._vision_dtype())
        with torch.set_grad_enabled(learns), quick_depthwise(pixels, learns=learns):
            if sizes is None:
                return self.vision(pixels)
            return encode_numbers(self.vision, pixels, self.counter, sizes)

    def encode_pictures(
        self, pixels: Sequence[Tensor], sizes: Sequence[Size | ClipSize]
    ) -> list[VisionFeatures]:
        """Return the encoder's features of each picture.

        Args:
            pixels: What the image processor gave for each picture.
            sizes: Of the pictures.
        """
        together = torch.cat(list(pixels)).to(self.device)
        if self.counter.is_flat:
            packed = self.encode_images(together, sizes)
        else:
            packed = self.encode_images(together)
        return split_by_picture(packed, self.counter, sizes)

    def connect(
        self, features: VisionFeatures, words: tuple[Tensor, ...] | None = None
    ) -> VisionFeatures:
        """Bring encoder features to the number and width that the language model reads.

        Args:
            features: What the encoder gave.
            words: What was asked about each item, for connectors that read it.
        """
        return self.connector(replace(self.reduced(features), words=words))

    def seen(
        self,
        pixel_values: Tensor | None = None,
        vision_values: Tensor | None = None,
        vision_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        words: tuple[Tensor, ...] | None = None,
    ) -> VisionFeatures | None:
        """Return the encoder's features, computed now or earlier; see `get_image_features`."""
        if vision_values is not None:
            if vision_grids is None:
                raise AlignmentError("`vision_values` came without `vision_grids`; pass both.")
            return VisionFeatures(vision_values, tuple(Grid(*row) for row in vision_grids.tolist()))
        if pixel_values is None or not pixel_values.shape[0]:
            return None
        sizes = sizes_of(image_sizes) if self.counter.is_flat else None
        if self.router is None:
            return self.encode_images(pixel_values, sizes, words)
        with self.router.looking(self, pixel_values, image_sizes, words):
            return self.encode_images(pixel_values, sizes, words)

    def reduced(self, features: VisionFeatures) -> VisionFeatures:
        """Return encoder features as the connector gets them."""
        dtype = next((p.dtype for p in self.connector.parameters()), features.values.dtype)
        if features.values.dtype != dtype and not torch.is_autocast_enabled("cpu"):
            features = features.to(dtype)
        if self.reducer is not None:
            features = self.reducer(features)
        return features

    def _vision_dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.vision.parameters()), self.dtype)

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_values: Tensor | None = None,
        vision_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        words: tuple[Tensor, ...] | None = None,
    ) -> VisionFeatures | None:
        """Return what takes the places of the placeholders, or None where there is no image.

        Shapes:
            words: ``(words, text_width)`` for each tile, for connectors that read the question
            pixel_values: ``(tiles, channels, height, width)``, or ``(numbers,)``
            image_sizes: ``(images, 2)``: heights and widths, for policies that need them
            vision_values: ``(total_tokens, vision_width)``: encoder features computed earlier
            vision_grids: ``(tiles, 3)``: their grids
        """
        counter = self.counter
        features = self.seen(pixel_values, vision_values, vision_grids, image_sizes, words)
        if features is None:
            return None
        marked = self.marks is not None or counter.video is not None
        sizes = sizes_of(image_sizes) if marked else []
        connect = partial(self.connect, words=words)
        features = connected(connect, features, counter, sizes, pixel_values)
        if self.marks is None:
            return features
        return arrange(features, counter, sizes, self.marks)
