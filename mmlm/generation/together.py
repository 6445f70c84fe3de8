"""Several answers at once: one forward reads the last token of each of them.

    Sessions ──► Together.step(answers) ──► the next logits of each
                 you are here

Each conversation keeps a cache of its own (see `mmlm.generation.session`); while answers grow
together their caches stand in one, padded on the left. Reading one token costs a small model
nearly the same for four answers as for one, because the weights are fetched once. In float32
the answers are those that each would get alone, token for token.

Caches that forget or cannot be cut (sliding windows, states) are stepped one after another.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from mmlm.generation.answering import Answering
from mmlm.generation.session import Sessions, can_crop, checked

log = logging.getLogger("mmlm.generation")


class Together:
    """Steps the answers of one model.

    Args:
        sessions: What prepared the answers.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._group: list[Answering] = []
        self._pads: list[int] = []
        self._cache: Any = None

    def step(self, answers: Sequence[Answering]) -> list[Tensor | Exception]:
        """Let the model read the last token of each answer; a fault is that of one answer alone.

        Shapes:
            returns: ``(1, vocabulary)`` for each answer, in order, or what went wrong with it
        """
        group = [answer for answer in answers if _joins(answer)]
        if len(group) < 2:
            self.part()
            return [self._alone(answer) for answer in answers]
        if [id(answer) for answer in group] != [id(answer) for answer in self._group]:
            self.part()
            self._join(group)
        try:
            rows = dict(zip(map(id, group), self._forward(), strict=True))
        except Exception:
            # Most often memory: what is too much for all may do for each.
            log.warning("%d answers go on one by one: no common step", len(group), exc_info=True)
            self._cut_back()
            self.part()
            return [self._alone(answer) for answer in answers]
        return [rows[id(a)] if id(a) in rows else self._alone(a) for a in answers]

    def part(self) -> None:
        """Give every answer its own cache back; needed before an answer ends."""
        for row, (answer, padding) in enumerate(zip(self._group, self._pads, strict=True)):
            cache = self._empty()
            for index, layer in enumerate(self._cache.layers):
                keys = layer.keys[row : row + 1, :, padding:].clone()
                cache.update(keys, layer.values[row : row + 1, :, padding:].clone(), index)
            answer.kept.cache = cache
        self._group, self._pads, self._cache = [], [], None

    def _join(self, group: list[Answering]) -> None:
        """Put the caches of some answers into one."""
        lengths = [len(answer.kept.keys) for answer in group]
        self._pads = [max(lengths) - length for length in lengths]
        self._cache = self._empty()
        for index in range(len(group[0].kept.cache.layers)):
            layers = [answer.kept.cache.layers[index] for answer in group]
            keys, values = (
                torch.cat(
                    [
                        pad(getattr(layer, name), (0, 0, padding, 0))
                        for layer, padding in zip(layers, self._pads, strict=True)
                    ]
                )
                for name in ("keys", "values")
            )
            self._cache.update(keys, values, index)
        self._group = list(group)

    @torch.inference_mode()
    def _forward(self) -> list[Tensor | Exception]:
        device = self._sessions.model.device
        places = [len(answer.kept.keys) for answer in self._group]
        mask = torch.ones(len(places), self._cache.get_seq_length() + 1, dtype=torch.long)
        for row, padding in enumerate(self._pads):
            mask[row, :padding] = 0
        with self._sessions.using():
            output = self._sessions.model(
                input_ids=torch.tensor([[answer.token] for answer in self._group], device=device),
                attention_mask=mask.to(device),
                position_ids=torch.tensor([[place] for place in places], device=device),
                past_key_values=self._cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        logits = output.logits[:, -1].float()
        for answer in self._group:
            answer.kept.keys.append(answer.token)
        return [_checked(logits[row : row + 1]) for row in range(len(places))]

    def _cut_back(self) -> None:
        """Undo a step that broke in the middle: some layers have one position too many."""
        length = len(self._group[0].kept.keys) + self._pads[0]
        for layer in self._cache.layers:
            layer.crop(length - layer.get_seq_length())

    def _alone(self, answer: Answering) -> Tensor | Exception:
        try:
            return self._sessions.step(answer)
        except Exception as fault:
            return fault

    def _empty(self) -> Any:
        return DynamicCache(config=self._sessions.model.config.text_config)


def _joins(answer: Answering) -> bool:
    """Whether an answer's cache can stand beside others: every layer holds every position."""
    cache, length = answer.kept.cache, len(answer.kept.keys)
    return can_crop(cache) and all(layer.get_seq_length() == length for layer in cache.layers)


def _checked(logits: Tensor) -> Tensor | Exception:
    try:
        return checked(logits)
    except Exception as fault:
        return fault
