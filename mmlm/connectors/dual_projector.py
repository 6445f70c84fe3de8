"""The connector `dual_projector`: pictures and texts of two frozen encoders meet in one space.

    features ──► one MLP for places, one for the CLS token ──► mean ──► the picture's vector
                     └──► linear ──► tokens of the language model          │ contrast, cosine
    texts ──► frozen encoder of texts ──► MLP ─────────────────────► the text's vector

Two encoders that never saw one another are joined by two MLPs, which alone learn, from pairs of
pictures and captions (From Unimodal to Multimodal, arXiv 2409.19425, there with DINOv2 and
All-RoBERTa). That is the objective `contrast`; `mmlm eval --probe` then measures what the space
knows without further learning. The language model reads each place's vector in that space, so
that a second stage begins with features that are already near to words.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.errors import ConfigError
from mmlm.features import VisionFeatures

_FIRST_SCALE = 2.659  # ln(1 / 0.07), as CLIP begins


@connectors.register("dual_projector")
class DualProjectorConnectorConfig(ConnectorConfig):
    """Bring pictures and texts into one space, learnt by contrast between frozen encoders."""

    text: dict[str, Any] = Field(default_factory=dict)
    """The frozen encoder of texts, `{checkpoint: …, pooling: auto}`: any BERT, RoBERTa, CLIP …"""

    sentence_width: int | None = Field(default=None, ge=1)
    """Width of its vectors; read when the parts are joined, and kept."""

    width: int = Field(default=512, ge=1)
    """Width of the common space."""

    hidden_width: int | None = Field(default=None, ge=1)
    """Width inside the MLPs; by default twice that of the space."""

    depth: int = Field(default=2, ge=1)
    """Linear layers of each MLP."""

    cls: bool = False
    """Whether the first token of each tile is a CLS token with an MLP of its own: for encoders with
    `prefix: keep_as_tokens`."""

    def resolved(self) -> DualProjectorConnectorConfig:
        """Return the config with the width of the text's vectors.

        Raises:
            ConfigError: if no encoder of texts is named.
        """
        if self.sentence_width is not None:
            return self
        if "checkpoint" not in self.text:
            raise ConfigError(
                "connector dual_projector needs an encoder of texts: write text: {checkpoint: …}, "
                "such as sentence-transformers/all-roberta-large-v1."
            )
        from mmlm.language.sentences import SentenceConfig

        width = SentenceConfig.from_dict(self.text, origin="connector.text").load().width
        words = {**self.to_dict(), "sentence_width": width}
        return type(self).from_dict(
            {key: value for key, value in words.items() if key != "use"}, origin="connector"
        )

    def build(self, *, vision_width: int, text_width: int) -> DualProjectorConnector:
        """Build the connector between features and embeddings of these widths."""
        return DualProjectorConnector(vision_width, text_width, self)


class DualProjectorConnector(Connector):
    """Projects places into the common space, and from there to the language model.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(tokens, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: DualProjectorConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.places = self._mlp(vision_width)
        self.whole = self._mlp(vision_width) if config.cls else None
        self.texts = self._mlp(config.sentence_width or config.width)
        self.read = nn.Linear(config.width, text_width)
        self.scale = nn.Parameter(torch.tensor(_FIRST_SCALE))

    def _mlp(self, width: int) -> nn.Sequential:
        config = self.config
        hidden = config.hidden_width or 2 * config.width
        widths = [width, *[hidden] * (config.depth - 1), config.width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        return nn.Sequential(*layers[:-1])

    def _projected(self, features: VisionFeatures) -> Tensor:
        """Return each feature in the common space: ``(tokens, width)``."""
        found = self.places(features.values)
        if self.whole is None:
            return found
        first = torch.tensor(features.offsets[:-1], device=found.device)
        return found.index_copy(0, first, self.whole(features.values[first]).to(found.dtype))

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Return what the language model reads."""
        return features.with_values(self.read(self._projected(features)))

    def embed(self, features: VisionFeatures) -> Tensor:
        """Return each item in the common space, of length one: ``(items, width)``, float32."""
        items = self._projected(features).float().split([g.num_tokens for g in features.grids])
        if self.whole is None:
            return normalize(torch.stack([item.mean(0) for item in items]), dim=-1)
        return normalize(torch.stack([item[0] + item[1:].mean(0) for item in items]), dim=-1)

    def embed_texts(self, sentences: Tensor) -> Tensor:
        """Return texts in the common space, of length one.

        Shapes:
            sentences: ``(texts, sentence_width)``, by the frozen encoder
            returns: ``(texts, width)``, float32
        """
        weight = next(self.texts.parameters())
        return normalize(self.texts(sentences.to(weight)).float(), dim=-1)

    def idle_parameters(self) -> frozenset[str]:
        """Name what only the contrast with texts needs."""
        return frozenset(["scale", *(f"texts.{n}" for n, _ in self.texts.named_parameters())])

    def last_linear(self) -> nn.Linear:
        """Return the layer to the text width."""
        return self.read
