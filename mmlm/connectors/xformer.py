"""The connector `xformer`: queries over two encoders, one of which sees details (X-Former).

    first encoder (CLIP) ──► Q-Former ──► queries ─┬──────────► queries read details ──► tokens
    second encoder (MAE) ──► details read queries ─┘                  ▲
                                     └────────────────────────────────┘

The queries read the first encoder as in BLIP-2. What the second one gives then reads the queries,
so that it learns what is in the picture, and the queries read that in turn (arXiv 2407.13851,
section 3.2). The stage in which a decoder of MAE paints the picture again is not here.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.activations import activation
from mmlm.connectors.attention import Attention, normal_
from mmlm.connectors.base import connectors
from mmlm.connectors.groups import each_group
from mmlm.connectors.qformer import QFormerConnector, QFormerConnectorConfig
from mmlm.features import VisionFeatures

_ENCODERS = 2


@connectors.register("xformer")
class XFormerConnectorConfig(QFormerConnectorConfig):
    """Let queries read one encoder, and then the details of a second one; a fixed number of tokens.

    The encoders stand in `vision: {use: mixture, fuse: levels}`, each with one state in `layers`.
    """

    rounds: int = Field(default=1, ge=1)
    """How often details and queries read one another."""

    @property
    def layers(self) -> int:
        """How many hidden states are read: one of each encoder."""
        return _ENCODERS

    def build(self, *, vision_width: int, text_width: int) -> XFormerConnector:
        """Build the connector between features and embeddings of these widths."""
        return XFormerConnector(vision_width, text_width, self)


class DetailRound(nn.Module):
    """Details read the queries, and the queries read the details; norms as in the Q-Former.

    Shapes:
        queries: ``(items, queries, width)``
        details: ``(items, tokens, vision_width)``
    """

    def __init__(self, vision_width: int, config: XFormerConnectorConfig) -> None:
        super().__init__()
        width, eps, heads = config.width, config.eps, config.heads
        self.telling = Attention(vision_width, width, heads=heads, head_width=width // heads)
        self.telling_norm = nn.LayerNorm(vision_width, eps=eps)
        self.reading = Attention(width, vision_width, heads=heads)
        self.reading_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_width),
            activation(config.activation),
            nn.Linear(config.mlp_width, width),
        )
        self.mlp_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, queries: Tensor, details: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and details after the round."""
        details = self.telling_norm(self.telling(details, queries) + details)
        queries = self.reading_norm(self.reading(queries, details) + queries)
        return self.mlp_norm(self.mlp(queries) + queries), details


class XFormerConnector(QFormerConnector):
    """Reads each picture twice with the same queries.

    Shapes:
        layers:  two of ``(tokens, vision_width)``, one of each encoder
        returns: ``(items · config.tokens, text_width)``
    """

    def __init__(self, vision_width: int, text_width: int, config: XFormerConnectorConfig) -> None:
        super().__init__(vision_width, text_width, config)
        self.rounds = nn.ModuleList(DetailRound(vision_width, config) for _ in range(config.rounds))
        normal_(self.rounds)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Read each picture with both encoders."""
        return each_group(features, self._read, self.config.out_grid, layers=_ENCODERS)

    def _read(self, maps: list[Tensor]) -> Tensor:
        meaning, details = (each.flatten(1, 3) for each in maps[1:])
        queries = self.after_layers(meaning)
        for turn in self.rounds:
            queries, details = turn(queries, details)
        return self.project(queries)
