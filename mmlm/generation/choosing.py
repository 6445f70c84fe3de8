"""Which token comes next: the likeliest one, or one drawn from the likely ones.

The logits are changed by transformers' own processors, in the order in which `generate` applies
them, so that the same settings mean the same here and there.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmlm.generation.settings import GenerationSettings

Top = tuple[tuple[int, float], ...]
"""The likeliest tokens with their log-probabilities."""


class Chooser:
    """Chooses one token after another.

    Args:
        settings: How to choose.
        prompt: The tokens of the conversation, which a repetition penalty looks at.
        device: Where the logits are.
    """

    def __init__(self, settings: GenerationSettings, prompt: list[int], device: Any) -> None:
        self._ids = torch.tensor([prompt], device=device)
        self._samples = settings.temperature > 0
        self._processors = _processors(settings)
        self._generator: torch.Generator | None = None
        if settings.seed is not None:
            self._generator = torch.Generator(device=device).manual_seed(settings.seed)

    def choose(
        self, logits: Float[Tensor, "1 vocabulary"], num_top: int = 0
    ) -> tuple[int, float, Top]:
        """Return the next token, its log-probability, and the likeliest ones.

        Log-probabilities are the model's own, before temperature and the like.
        """
        change: Any = self._processors  # its annotations ask for legacy tensor classes
        scores = change(self._ids, logits.clone())
        if self._samples:
            chances = torch.softmax(scores, dim=-1)
            token = int(torch.multinomial(chances, 1, generator=self._generator))
        else:
            token = int(scores.argmax(-1))
        self._ids = torch.cat([self._ids, self._ids.new_tensor([[token]])], dim=1)
        plain = torch.log_softmax(logits[0], dim=-1)
        best = plain.topk(num_top) if num_top else None
        top: Top = ()
        if best is not None:
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return token, float(plain[token]), top


def _processors(settings: GenerationSettings) -> LogitsProcessorList:
    """Return what changes the logits, in the order in which `generate` applies it."""
    chain = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature > 0:
        if settings.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            chain.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            chain.append(TopPLogitsWarper(settings.top_p))
    return chain
