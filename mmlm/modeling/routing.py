"""Asking the language model which experts a picture needs, before they run (MoVA).

    base encoder ─► connector ─► coarse tokens ─┐
    list of experts, question ──────────────────┴─► language model ─► letters ─► experts run

Before a picture is encoded for good, the language model sees it through the base encoder alone, as
a few pooled tokens, with the question and the list of experts (arXiv 2404.13046, section 3.2). MoVA
lets it write letters; here the scores of all letters are read where the answer would begin, and
those above that of "none" are taken, the best `most` of them: one pass for all pictures of a step.

It is the language model as it is, with whatever adapters it carries; MoVA's LoRA for routing alone
is not here. It learns to choose from ordinary rows whose answers are letters, as in the paper.
Choosing has no gradient. The question is the one that the connector reads, never an answer
(`mmlm.modeling.questions`), so that learning, answering and measuring choose alike.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mmlm.errors import ConfigError
from mmlm.features import ClipSize, Size, VisionFeatures
from mmlm.modeling.attention import borders_given
from mmlm.modeling.pictures import sizes_of, tile_sizes
from mmlm.vision.experts import NOTHING, Choice, RoutingWords, only

COARSE_SIDE = 12
"""Rows and columns of the tokens that the choice is made from: 144 in MoVA."""


class Router:
    """Chooses experts for the pictures of a step.

    Args:
        words: The tokens of the prompt.
        most: How many experts a picture gets at most.
    """

    def __init__(self, words: RoutingWords, most: int) -> None:
        self.words, self.most = words, most
        self.head: Any = None
        """The head of the language model, which the joined model has."""

    @classmethod
    def of(cls, config: Any, connector: Any) -> Router | None:
        """Return the router of a model, or None where its encoders are not chosen.

        Raises:
            ConfigError: if the connector does not fuse experts.
        """
        part = config.vision_part
        words = getattr(part, "routing", None)
        if not isinstance(words, RoutingWords):
            return None
        if not hasattr(connector, "widths") or config.reducer is not None:
            raise ConfigError(
                "vision.fuse experts gives a layer for each chosen expert on the grid of the first "
                "encoder, and needs a connector that fuses them. Use `connector: {use: "
                "mov_adapter}`, and no `reducer`: it pools the fused features itself."
            )
        return cls(words, part.most)

    @contextmanager
    def looking(
        self,
        inner: Any,
        numbers: Tensor,
        image_sizes: Tensor | None,
        questions: Sequence[Tensor] | None,
    ) -> Generator[None]:
        """Let the experts that are chosen for each picture run alone.

        Nothing is asked where `mmlm.vision.experts.only` has said already which these are.

        Args:
            inner: The `MMLMModel`.
            numbers: The pixels, in one row.
            image_sizes: ``(pictures, 2)``
            questions: ``(words, text_width)`` for each tile; None asks nothing.
        """
        if inner.vision.choice is not None:
            yield
            return
        sizes = sizes_of(image_sizes)
        learns = any(weight.requires_grad for weight in inner.vision.encoders[0].parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            pixels = numbers.to(next(inner.vision.parameters()))
            base = inner.vision.base(pixels, tile_sizes(inner.counter, sizes))
        with only(inner.vision, self.choose(inner, base, sizes, questions)):
            yield

    def choose(
        self,
        inner: Any,
        base: VisionFeatures,
        sizes: Sequence[Size | ClipSize],
        questions: Sequence[Tensor] | None,
    ) -> Choice:
        """Return which experts look at each tile: all, where there is no head to ask.

        Args:
            inner: The `MMLMModel`.
            base: What the first encoder gave, tile after tile.
            sizes: Of the pictures.
            questions: ``(words, text_width)`` for each tile; None asks nothing.
        """
        if self.head is None:
            return Choice(None, base)
        with torch.no_grad(), borders_given(False):
            said = self._said(inner, base, sizes, questions)
            chosen = self.letters(self.head(said[:, None])[:, 0])
        counts = [len(inner.counter.plan(size).tiles) for size in sizes]
        tiles = [own for own, count in zip(chosen, counts, strict=True) for _ in range(count)]
        return Choice(tiles, base)

    def letters(self, logits: Tensor) -> list[list[int]]:
        """Return the experts whose letters score above "none", the best first.

        Shapes:
            logits: ``(pictures, vocabulary)``
        """
        scores = logits[:, list(self.words.letters)].float()
        above = (scores > logits[:, [self.words.none]].float()).tolist()
        order = scores.argsort(dim=-1, descending=True, stable=True).tolist()
        return [
            [expert for expert in row if wanted[expert]][: self.most]
            for row, wanted in zip(order, above, strict=True)
        ]

    def _said(
        self,
        inner: Any,
        base: VisionFeatures,
        sizes: Sequence[Size | ClipSize],
        questions: Sequence[Tensor] | None,
    ) -> Tensor:
        """Return the hidden state where the answer would begin: ``(pictures, width)``."""
        coarse = coarse_tokens(inner, base)
        embed = inner.get_input_embeddings()
        device = coarse[0].device
        head, middle, tail = (
            embed(torch.tensor(ids, device=device))
            for ids in (self.words.head, self.words.middle, self.words.tail)
        )
        rows: list[Tensor] = []
        first = 0
        for size in sizes:
            last = first + len(inner.counter.plan(size).tiles)
            asked = head[:0] if questions is None else questions[first].to(head)
            seen = [tile.to(head) for tile in coarse[first:last]]
            rows.append(torch.cat([head, *seen, middle, asked, tail]))
            first = last
        # Padded on the left, as prompts are when many are answered at once.
        padded = pad_sequence([row.flip(0) for row in rows], batch_first=True).flip(1)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(padded.shape[1], device=device).flip(0) < lengths[:, None]
        out = inner.language(
            inputs_embeds=padded,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        )
        return out.last_hidden_state[:, -1]


def coarse_tokens(inner: Any, base: VisionFeatures) -> list[Tensor]:
    """Return a few tokens of each tile as the language model reads them, from the base alone.

    Shapes:
        returns: ``(at most COARSE_SIDE², text_width)`` for each tile
    """
    nothing = (NOTHING,) * len(base.grids)
    layers = tuple(
        VisionFeatures(base.values.new_zeros(0, width), nothing) for width in inner.connector.widths
    )
    seen = inner.connect(VisionFeatures(base.values, base.grids, layers=layers))
    tiles: list[Tensor] = []
    for item, grid in zip(seen.items(), seen.grids, strict=True):
        maps = item.view(grid.frames * grid.rows, grid.columns, -1).movedim(-1, 0).float()
        side = (min(maps.shape[1], COARSE_SIDE), min(maps.shape[2], COARSE_SIDE))
        pooled = functional.adaptive_avg_pool2d(maps, side).movedim(0, -1)
        tiles.append(pooled.flatten(0, 1).to(item.dtype))
    return tiles
