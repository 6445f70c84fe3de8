"""The connector `fiber`: both backbones read one another inside their blocks (FIBER).

    question ──► reader ──────────┐
    pixels ──► block 0 … ──► [+] block k … [+] block n ──► features ──┐
    text ───► layer 0 … ──────► [+] layer i … [+] layer m ◄───────────┘ ──► words

FIBER (arXiv 2206.07643) puts the fusion into the backbones instead of behind them: cross-attention
in their last blocks, each behind a factor that begins at zero, so that in step 0 both are what they
were. The half in the language model is that of `cross_attention`; the one in the encoder reads
the question. The paper's text backbone is an encoder, and its two halves exchange states block by
block; a language model must not see its own answer, so the encoder reads the question's words
alone, through a small reader. Its two stages, captions and then boxes, are stages of a recipe:
boxes are written as text.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.base import connectors
from mmlm.connectors.cross_attention import (
    CrossAttentionConnector,
    CrossAttentionConnectorConfig,
)
from mmlm.connectors.question import (
    Conditioning,
    QuestionConfig,
    QuestionReader,
    WordAttention,
    Words,
    last_blocks,
)
from mmlm.errors import ConfigError


@connectors.register("fiber")
class FiberConnectorConfig(CrossAttentionConnectorConfig, QuestionConfig):
    """Let the last blocks of the encoder read the question, and layers of the LLM the picture."""

    encoder_blocks: int = Field(default=6, ge=1)
    """How many of the last blocks that the features depend on read the question."""

    encoder_heads: int = Field(default=8, ge=1)
    """Number of heads in them, which divides the width of the encoder."""

    def build(self, *, vision_width: int, text_width: int) -> FiberConnector:
        """Build the connector between features and embeddings of these widths."""
        return FiberConnector(vision_width, text_width, self)


class _Fusion(nn.Module):
    """Attention to the words, behind a factor that begins at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.read = WordAttention(width, width, heads)
        self.fusion_gate = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor, words: Words) -> Tensor:
        """Return what is to be added to the tokens."""
        return self.fusion_gate * self.read(tokens, words)


class FiberConnector(CrossAttentionConnector, Conditioning):
    """Fuses inside the encoder, and inside the language model.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(items, text_width)``, a mark for each; what layers read, as its one layer
    """

    def __init__(self, vision_width: int, text_width: int, config: FiberConnectorConfig) -> None:
        super().__init__(vision_width, text_width, config)
        if vision_width % config.encoder_heads:
            raise ConfigError(
                f"connector.encoder_heads {config.encoder_heads} does not divide the width of the "
                f"encoder, {vision_width}."
            )
        self.reader = QuestionReader(text_width, vision_width, config)
        self.fusions = nn.ModuleList(
            _Fusion(vision_width, config.encoder_heads) for _ in range(config.encoder_blocks)
        )

    def places_in_encoder(self, num_blocks: int) -> tuple[int, ...]:
        """Return the last blocks."""
        return last_blocks(len(self.fusions), num_blocks, name="fiber")

    def condition(self, index: int, tokens: Tensor, words: Words) -> Tensor:
        """Add what the patches read of the question."""
        given = tokens.to(words.values.dtype)
        return (given + self.fusions[index](given, words)).to(tokens.dtype)
