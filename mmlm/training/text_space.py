"""The objective `text_space`: a new CLIP's embeddings become an old one's, learnt from texts alone.

    texts ─┬─► text tower of the new CLIP ─► the encoder's projection ─┐
           └─► text tower of the old CLIP ─────────────────────────────┴─► how far they are apart

XBT (arXiv 2405.14715): both towers of a CLIP share a space, so a map between the spaces of two
CLIPs that is learnt on their texts holds for their pictures. The encoder is `embedding` with
`into`; its projection is all that learns, no picture is opened and no language model runs. What
stood behind the old CLIP's embedding goes on as it is. The texts are the answers of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmlm.data.mixture import Mixture
from mmlm.data.planning import Planned, Planner
from mmlm.data.schema import Sample
from mmlm.errors import ConfigError
from mmlm.language.sentences import SentenceConfig, SentenceEncoder
from mmlm.messages import ImagePart
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.training.objectives import LossWeight, Objective, ObjectiveConfig, objectives
from mmlm.training.said import num_texts, on_device, texts_of
from mmlm.vision import EmbeddingEncoder


class TextPlanner(Planner):
    """Plans samples without their pictures: those are neither looked for nor opened."""

    def _plan(self, sample: Sample, position: int, row: int) -> Planned:
        messages = tuple(
            replace(
                message,
                content=tuple(part for part in message.content if not isinstance(part, ImagePart)),
            )
            for message in sample.messages
        )
        return super()._plan(replace(sample, messages=messages), position, row)


@objectives.register("text_space")
class TextSpaceConfig(ObjectiveConfig):
    """The projection of the encoder brings texts of a new CLIP into the space of an old one."""

    planner: ClassVar[type[Planner]] = TextPlanner

    new: str | None = None
    """The new CLIP, for its text tower; by default `model.vision.checkpoint`."""

    old: str | None = None
    """The old CLIP, for its text tower; by default `model.vision.into`."""

    def build(self, *, loss_weight: LossWeight) -> Objective:
        """Return the objective; every text counts the same, whatever `loss_weight` says."""
        del loss_weight
        return TextSpace(self)


class TextSpace(Objective):
    """One minus the cosine between a projected text and the same text in the old space."""

    def __init__(self, config: TextSpaceConfig) -> None:
        self.config = config
        self._new: SentenceEncoder | None = None
        self._old: SentenceEncoder | None = None
        self._tokenizer: Any = None

    def prepare(self, model: nn.Module, tokenizer: Any, mixture: Mixture) -> None:
        """Load both text towers, and check that the projection fits between them.

        Raises:
            ConfigError: if the encoder has no projection, or is not that of these checkpoints.
        """
        encoder = _encoder_of(model)
        assert isinstance(model, MMLMForConditionalGeneration)
        words, self._tokenizer = model.config.vision, tokenizer
        names = (self.config.new or words["checkpoint"], self.config.old or words["into"])
        if None in names:
            raise ConfigError(
                "objective text_space needs both CLIPs: name them in model.vision (checkpoint and "
                "into), or in the objective (new and old)."
            )
        self._new, self._old = (SentenceConfig(checkpoint=name).load() for name in names)
        assert encoder.projection is not None
        first: Any = encoder.projection[0]
        given, wanted = first.in_features, encoder.facts.width
        if (self._new.width, self._old.width) != (given, wanted):
            raise ConfigError(
                f"objective text_space: the projection goes from {given} to {wanted}, and texts of "
                f"{names[0]} are {self._new.width} wide, those of {names[1]} {self._old.width}. "
                f"Both must be CLIPs whose pictures the encoder embeds."
            )

    def weigh(self, samples: Sequence[Planned]) -> tuple[list[Tensor] | None, float]:
        """Count the texts."""
        return None, float(num_texts(samples))

    def loss(self, model: nn.Module, inputs: dict[str, Any], num_items: float) -> Tensor:
        """Return the loss of one batch, divided by the texts of the whole step."""
        encoder = _encoder_of(model)
        assert self._new is not None
        assert self._old is not None
        texts = [said.text for said in texts_of(inputs["labels"], self._tokenizer)]
        device = inputs["labels"].device
        if not texts:
            return torch.zeros((), device=device)
        for tower in (self._new, self._old):
            on_device(tower, device)
        brought = encoder.projected(self._new(texts))
        return (1 - (brought * self._old(texts)).sum(-1)).sum() / num_items


def _encoder_of(model: nn.Module) -> EmbeddingEncoder:
    """Return the encoder whose projection learns.

    Raises:
        ConfigError: if it is another one.
    """
    if isinstance(model, MMLMForConditionalGeneration):
        encoder: Any = model.model.vision
        if isinstance(encoder, EmbeddingEncoder) and encoder.projection is not None:
            return encoder
    raise ConfigError(
        "objective text_space teaches the projection of the encoder `embedding`. Write `vision: "
        "{use: embedding, checkpoint: NEW, into: OLD}`, and learn: [vision.projection.*]."
    )
