"""The connector `grounded_qformer`: a Q-Former inside the language model (LG-QFormer).

    layers 0 … k-1 of the language model ──► hidden states at the picture's places
                                                    │ linear
    picture ──► cross-attention ──► Q-Former ◄── + queries
                                       │ linear
                            places before layer k ──► layers k … n

The paper (arXiv 2311.07449) finds that what a Q-Former gives is nearer to representations in the
middle of a frozen language model than to its input. It lets the queries see the prompt as the
language model's encoder represents it, and hands the result to the decoder, past the encoder.
No stage of representation learning stands before that.

Language models here are decoders alone, for which the paper names no form. The obvious one: the
lower layers are the encoder. The placeholders begin as learnt marks, read the words before them in
layers 0 … k-1, and what stands there then is what the queries begin with; what they found replaces
it before layer k. Words behind a picture are not read, as a decoder must not see its own answer:
put the question before the picture where the queries are to know it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.attention import STD
from mmlm.connectors.base import connectors
from mmlm.connectors.injection import Injecting, Seen, spread
from mmlm.connectors.qformer import QFormerConnector, QFormerConnectorConfig
from mmlm.features import Grid, VisionFeatures, by_grid


@connectors.register("grounded_qformer")
class GroundedQFormerConnectorConfig(QFormerConnectorConfig):
    """Let queries that are hidden states of the language model read the picture (LG-QFormer)."""

    place: int | None = Field(default=None, ge=1)
    """Before which layer of the language model; by default the one in the middle."""

    def build(self, *, vision_width: int, text_width: int) -> GroundedQFormerConnector:
        """Build the connector between features and embeddings of these widths."""
        return GroundedQFormerConnector(vision_width, text_width, self)


class GroundedQFormerConnector(QFormerConnector, Injecting):
    """Marks the places of each picture, and fills them inside the language model.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(items · config.tokens, text_width)``, the same marks for each item; the
            features themselves, as its one layer
    """

    def __init__(
        self, vision_width: int, text_width: int, config: GroundedQFormerConnectorConfig
    ) -> None:
        super().__init__(vision_width, text_width, config)
        self.place = config.place
        self.marks = nn.Parameter(torch.randn(config.tokens, text_width) * STD)
        self.enter = nn.Linear(text_width, config.width)
        nn.init.normal_(self.enter.weight, std=STD)
        nn.init.zeros_(self.enter.bias)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Return the marks of each picture, and its features for later."""
        count = len(features.grids)
        grids = (Grid(1, 1, self.config.tokens),) * count
        read = VisionFeatures(features.values, features.grids)
        return VisionFeatures(self.marks.repeat(count, 1), grids, layers=(read,))

    def places(self, num_layers: int) -> tuple[int, ...]:
        """Return the one layer before which the places are filled."""
        place = num_layers // 2 if self.place is None else self.place
        return spread(1, place, 1, num_layers, name="grounded_qformer")

    def inject(self, index: int, hidden: Tensor, seen: Seen) -> Tensor:
        """Let what stands at the places of each picture read it, and put the result there."""
        del index
        if seen.features is None:
            return hidden
        (pictures,) = seen.features.layers
        dtype = self.enter.weight.dtype
        here = hidden[seen.slots].unflatten(0, (-1, self.config.tokens)).to(dtype)
        # However loud the language model's hidden states are, the queries hear their direction.
        beside = self.enter(nn.functional.layer_norm(here, here.shape[-1:]))
        items, found = pictures.items(), dict[int, Tensor]()
        for _, members in by_grid(pictures):
            context = torch.stack([items[index] for index in members])
            read = self.after_layers(context, beside[members])
            found |= zip(members, self.project(read), strict=True)
        filled = torch.cat([found[index] for index in range(len(items))])
        return hidden.masked_scatter(seen.slots[..., None], filled.to(hidden.dtype))
