"""The connector `level_merge`: hidden states are averaged with learnt weights (COMM, 2310.08825).

For each encoder every state goes through a norm and a linear map of its own, and their mean is
taken with weights that sum to 1. What the second and later encoders give goes through an MLP
besides, so that it meets the first; all are joined channel by channel and projected.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.errors import AlignmentError
from mmlm.features import VisionFeatures


@connectors.register("level_merge")
class LevelMergeConnectorConfig(ConnectorConfig):
    """Average the hidden states of each encoder with learnt weights, and join the encoders."""

    groups: tuple[int, ...] = Field(default=(1,), min_length=1)
    """How many hidden states each encoder gives, such as [24, 6] for COMM. With [1] alone the
    features themselves are read."""

    @property
    def layers(self) -> int:
        """How many further hidden states are read."""
        return 0 if self.groups == (1,) else sum(self.groups)

    def build(self, *, vision_width: int, text_width: int) -> LevelMergeConnector:
        """Build the connector between features and embeddings of these widths."""
        return LevelMergeConnector(vision_width, text_width, self)


class LevelMergeConnector(Connector):
    """Averages levels.

    Shapes:
        values:  ``(tokens, vision_width)``, read only where no levels are
        layers:  as many of the same shape as the config says
        returns: ``(tokens, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: LevelMergeConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        count, encoders = sum(config.groups), len(config.groups)
        self.norms = nn.ModuleList(nn.LayerNorm(vision_width) for _ in range(count))
        self.maps = nn.ModuleList(nn.Linear(vision_width, text_width) for _ in range(count))
        # One level needs no weight.
        self.weights = nn.ParameterList(
            nn.Parameter(torch.zeros(levels)) for levels in config.groups if levels > 1
        )
        self.meet = nn.ModuleList(
            nn.Sequential(
                nn.Linear(text_width, text_width), nn.GELU(), nn.Linear(text_width, text_width)
            )
            for _ in range(encoders - 1)
        )
        self.project = nn.Linear(text_width * encoders, text_width)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Average, join and project."""
        levels = [layer.values for layer in features.layers] or [features.values]
        wanted = len(self.norms)
        if len(levels) != wanted or any(each.shape != levels[0].shape for each in levels):
            raise AlignmentError(
                f"level_merge reads {wanted} hidden states of one shape "
                f"(connector.groups {list(self.config.groups)}), and the encoder gives "
                f"{len(levels)}: {[tuple(each.shape) for each in levels]}. Name as many in "
                f"`layers`, and for several encoders use `vision: {{use: mixture, fuse: levels}}`."
            )
        pairs = zip(self.norms, self.maps, levels, strict=True)
        mapped = [linear(norm(level)) for norm, linear, level in pairs]
        parts, start, weights = list[Tensor](), 0, iter(self.weights)
        for number, count in enumerate(self.config.groups):
            own = torch.stack(mapped[start : start + count])
            share = next(weights).softmax(0) if count > 1 else own.new_ones(1)
            merged = (own * share.to(own.dtype)[:, None, None]).sum(0)
            parts.append(merged if number == 0 else self.meet[number - 1](merged))
            start += count
        return features.with_values(self.project(torch.cat(parts, -1)))

    def last_linear(self) -> nn.Linear:
        """Return the projection."""
        return self.project
