"""Where pictures meet words: how alike they are after each layer of the language model.

UniFork's question (arXiv 2506.17202) put to any checkpoint: at which layer do a picture and its
text look most alike? Likeness is the mutual k nearest neighbours of the Platonic Representation
Hypothesis (arXiv 2405.07987). Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import EvaluationError
from mmlm.evaluation.asking.backend import LocalBackend
from mmlm.evaluation.benchmarks.items import Item
from mmlm.generation.batch import model_inputs
from mmlm.messages import assistant as says
from mmlm.messages import user
from mmlm.whole import WholeModel, WholeProcessor

_FEWEST = 10
_NEIGHBOURS = 10
_ASKED = "What is this?"


@dataclass(frozen=True)
class Alignment:
    """How alike pictures and texts are at one layer of the language model; 0 is the embedding."""

    set: str
    layer: int
    n: int
    neighbours: int
    score: float
    chance: float


def align_by_layer(
    backend: LocalBackend, name: str, items: Sequence[Item], *, neighbours: int = _NEIGHBOURS
) -> list[Alignment]:
    """Compare, at every layer, which pictures are near each other with which texts are.

    A picture is the mean over its positions in the language model, a text that over its own.

    Raises:
        EvaluationError: if there are too few different pictures with texts.
    """
    texts = [_text_of(item) for item in items]
    k = min(neighbours, max(1, len(items) // 5))
    if len(items) < _FEWEST or len(set(texts)) < len(texts) / 2:
        raise EvaluationError(
            f"{name}: alignment needs at least {_FEWEST} pictures, most with texts of their own "
            f"(got {len(items)} pictures and {len(set(texts))} texts)."
        )
    processor, token = backend.processor, _image_token(backend)
    shown: list[Tensor] = []
    said: list[Tensor] = []
    for item, text in zip(items, texts, strict=True):
        row = processor.encode_chat([user(_ASKED, item.images)], with_pixels=True)
        shown.append(_layers(backend, row, torch.tensor(row.ids) == token))
        row = processor.encode_chat([user(_ASKED), says(text)], with_labels=True)
        assert row.labels is not None
        said.append(_layers(backend, row, torch.tensor(row.labels) != -100))
    pictures, words = torch.stack(shown, dim=1), torch.stack(said, dim=1)
    return [
        Alignment(name, layer, len(items), k, mutual_neighbours(a, b, k), k / (len(items) - 1))
        for layer, (a, b) in enumerate(zip(pictures, words, strict=True))
    ]


def _image_token(backend: LocalBackend) -> int:
    whole = isinstance(backend.processor, WholeProcessor)
    return int(backend.processor.image_token_id if whole else backend.model.config.image_token_id)


def _layers(backend: LocalBackend, row: Any, mask: Tensor) -> Tensor:
    """Return the mean over some positions after every layer: ``(layers + 1, width)``.

    Raises:
        EvaluationError: if the class does not show its layers.
    """
    model: Any = backend.model
    inputs = model_inputs([row], backend.processor, model)
    if isinstance(model, WholeModel):
        model = model.stock.base_model
    else:
        inputs["logits_to_keep"] = 1
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=True).hidden_states
    if not states:
        raise EvaluationError(f"{type(model).__name__} does not show what its layers make.")
    return torch.stack([state[0].cpu()[mask].float().mean(dim=0) for state in states])


def _text_of(item: Item) -> str:
    answer = item.target.references[0] if item.target.references else ""
    return " ".join(f"{item.columns.get('question', '')} {answer}".split())


def mutual_neighbours(first: Tensor, second: Tensor, k: int) -> float:
    """Return the mean share of the k nearest neighbours that two sets of features have in common.

    Shapes:
        first, second: ``(items, width)``, the widths may differ

    >>> line = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> mutual_neighbours(line, line, 1)
    1.0
    """
    near: list[Tensor] = []
    for features in (first, second):
        unit = torch.nn.functional.normalize(features.double() - features.double().mean(0), dim=-1)
        likeness = unit @ unit.T
        likeness.fill_diagonal_(-torch.inf)
        near.append(likeness.topk(k, dim=-1).indices)
    shared = (near[0][:, :, None] == near[1][:, None, :]).any(dim=-1).double().mean()
    return float(shared)
