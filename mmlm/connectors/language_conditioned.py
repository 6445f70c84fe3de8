"""The connector `language_conditioned`: the question's words inside late blocks (TransVG++).

    question ──► reader ──────────┐ read by each patch, through a narrow adapter
    pixels ──► block 0 … k-1 ──► [+] block k … [+] block n ──► MLP ──► tokens

TransVG++ (arXiv 2206.06619) drops the fusion behind the encoder: its late blocks become language
conditioned by adapters, so that what is seen hangs on what is asked. A gate that begins at zero
stands behind each adapter, so that an untrained one leaves the encoder as it is. The paper reads
the box off a [REG] token; here the language model writes it as text, as every answer.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.base import connectors
from mmlm.connectors.mlp import MLPConnector
from mmlm.connectors.question import (
    Conditioning,
    QuestionConfig,
    QuestionReader,
    WordAttention,
    Words,
    last_blocks,
)
from mmlm.errors import ConfigError
from mmlm.features import VisionFeatures


@connectors.register("language_conditioned")
class LanguageConditionedConnectorConfig(QuestionConfig):
    """Let late blocks of the encoder read the question, and project the features by an MLP."""

    encoder_blocks: int = Field(default=4, ge=1)
    """How many of the last blocks that the features depend on read the question."""

    adapter_width: int = Field(default=64, ge=1)
    """Width inside the adapters."""

    heads: int = Field(default=4, ge=1)
    """Number of heads of the adapters, which divides their width."""

    depth: int = Field(default=2, ge=1)
    """Linear layers of the MLP behind the encoder."""

    def build(self, *, vision_width: int, text_width: int) -> LanguageConditionedConnector:
        """Build the connector between features and embeddings of these widths."""
        return LanguageConditionedConnector(vision_width, text_width, self)


class _Adapter(nn.Module):
    """Down, read the words, up, and a gate that begins closed."""

    def __init__(self, vision_width: int, config: LanguageConditionedConnectorConfig) -> None:
        super().__init__()
        width = config.adapter_width
        self.down = nn.Linear(vision_width, width)
        self.read = WordAttention(width, vision_width, config.heads)
        self.up = nn.Linear(width, vision_width)
        self.adapter_gate = nn.Parameter(torch.zeros(vision_width))

    def forward(self, tokens: Tensor, words: Words) -> Tensor:
        """Return what is to be added to the tokens."""
        read = self.read(self.down(tokens), words)
        some = words.mask.any(-1)[:, None, None]
        return torch.where(some, self.adapter_gate * self.up(nn.functional.gelu(read)), 0.0)


class LanguageConditionedConnector(Conditioning):
    """Lets blocks of the encoder read the question, and projects what comes out.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(tokens, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: LanguageConditionedConnectorConfig
    ) -> None:
        super().__init__()
        if config.adapter_width % config.heads:
            raise ConfigError(
                f"connector.heads {config.heads} does not divide connector.adapter_width "
                f"{config.adapter_width}."
            )
        self.config = config
        self.reader = QuestionReader(text_width, vision_width, config)
        self.adapters = nn.ModuleList(
            _Adapter(vision_width, config) for _ in range(config.encoder_blocks)
        )
        self.project = MLPConnector(vision_width, text_width, depth=config.depth)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Project each feature."""
        return self.project(features)

    def places_in_encoder(self, num_blocks: int) -> tuple[int, ...]:
        """Return the last blocks."""
        return last_blocks(len(self.adapters), num_blocks, name="language_conditioned")

    def condition(self, index: int, tokens: Tensor, words: Words) -> Tensor:
        """Add what the patches read of the question."""
        given = tokens.to(words.values.dtype)
        return (given + self.adapters[index](given, words)).to(tokens.dtype)

    def last_linear(self) -> nn.Linear:
        """Return the last layer of the MLP."""
        return self.project.last_linear()
