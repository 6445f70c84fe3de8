"""Which token comes next: the likeliest one, or one drawn from the likely ones.

The logits are changed by transformers' own processors, in the order in which `generate` applies
them, so that the same settings mean the same here and there.
"""

from __future__ import annotations

from collections.abc import Callable
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

from mmlm.errors import CheckpointError
from mmlm.generation.settings import GenerationSettings

_DRAWS = 64
"""How often a token is drawn before all are looked through for one that is allowed."""

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
        self._plain: Tensor = torch.empty(0)
        self._samples = settings.temperature > 0
        self._processors = _processors(settings)
        self._generator: torch.Generator | None = None
        if settings.seed is not None:
            self._generator = torch.Generator(device=device).manual_seed(settings.seed)

    def choose(
        self,
        logits: Float[Tensor, "1 vocabulary"],
        num_top: int = 0,
        allows: Callable[[int], bool] | None = None,
    ) -> tuple[int, float, Top]:
        """Return the next token, its log-probability, and the likeliest ones.

        Log-probabilities are the model's own, before temperature and the like.

        Args:
            logits: What the model says.
            num_top: How many likeliest tokens to return.
            allows: Which tokens may be chosen; all when left out.
        """
        self._plain = logits
        change: Any = self._processors  # its annotations ask for legacy tensor classes
        scores = change(self._ids, logits.clone())
        token = self._draw(scores)
        if allows is not None:
            token = self._allowed(scores, token, allows)
        self._ids = torch.cat([self._ids, self._ids.new_tensor([[token]])], dim=1)
        plain = torch.log_softmax(logits[0], dim=-1)
        best = plain.topk(num_top) if num_top else None
        top: Top = ()
        if best is not None:
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return token, float(plain[token]), top

    def _draw(self, scores: Float[Tensor, "1 vocabulary"]) -> int:
        if self._samples:
            chances = torch.softmax(scores, dim=-1)
            return int(torch.multinomial(chances, 1, generator=self._generator))
        return int(scores.argmax(-1))

    def _allowed(
        self, scores: Float[Tensor, "1 vocabulary"], token: int, allows: Callable[[int], bool]
    ) -> int:
        """Draw again without what is not allowed, which is a draw among what is.

        Raises:
            CheckpointError: if the vocabulary holds no token that is allowed.
        """
        scores = scores.clone()
        for _ in range(_DRAWS):
            if allows(token):
                return token
            scores[0, token] = -torch.inf
            if not torch.isfinite(scores).any():
                break
            token = self._draw(scores)
        # top-k and top-p leave few tokens; where none of them fits, the likeliest other one does.
        raw = torch.argsort(self._plain[0], descending=True).tolist()
        found = next((candidate for candidate in raw if allows(candidate)), None)
        if found is None:
            raise CheckpointError(
                "No token of this model can continue the answer in the form that was asked for. "
                "Ask for plain text."
            )
        return found


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
