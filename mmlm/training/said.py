"""The learnt texts of a batch, as text: for objectives that give them to another tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmlm.data.planning import NOT_LEARNT, Planned


class Said(NamedTuple):
    """One stretch of learnt tokens: an answer, or a caption."""

    row: int
    """Row of the batch in which it stands."""

    begin: int
    """Its first position there."""

    text: str


def texts_of(labels: Tensor, tokenizer: Any) -> list[Said]:
    """Return the learnt texts of a batch, row by row, in reading order.

    Args:
        labels: ``(batch, tokens)``, packed or padded.
        tokenizer: The language model's, from which the labels come.
    """
    found: list[Said] = []
    for row, line in enumerate(labels.cpu().numpy()):
        for first, last in stretches(line):
            text = tokenizer.decode(line[first:last].tolist(), skip_special_tokens=True)
            found.append(Said(row, first, text.strip()))
    return found


def stretches(labels: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return where learnt tokens begin and end, for those of more than the end of a turn.

    >>> stretches(np.array([-100, 5, 6, -100, 7, -100, 8, 9]))
    [(1, 3), (6, 8)]
    """
    learnt = np.concatenate([[False], labels != NOT_LEARNT, [False]])
    edges = np.flatnonzero(learnt[1:] != learnt[:-1]).reshape(-1, 2).tolist()
    return [(first, last) for first, last in edges if last - first > 1]


def num_texts(samples: Sequence[Planned]) -> int:
    """Count the learnt texts of planned samples."""
    return sum(len(stretches(sample.labels)) for sample in samples)


def on_device(module: torch.nn.Module, device: torch.device) -> None:
    """Bring a module that is no part of the model to where the batch is."""
    weight = next(module.parameters(), None)
    if weight is not None and weight.device != device:
        module.to(device)
