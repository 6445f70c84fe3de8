"""Which encoder of pictures goes with which of texts: how alike they see the same things.

Of pairs of pictures and captions both encoders make vectors; centred kernel alignment says how
alike the relations among the pictures are to those among their captions (Kornblith et al. 2019,
arXiv 1905.00414; without its bias for few samples, Nguyen et al. 2021, arXiv 2010.15327). Where
the score is high, two small MLPs join the encoders well (arXiv 2409.19425): see the connector
`dual_projector`. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmlm.errors import EvaluationError
from mmlm.images import open_image
from mmlm.language.sentences import SentenceConfig
from mmlm.processing import MMLMImageProcessor
from mmlm.vision import encoders

_FEWEST = 8


class Pair(NamedTuple):
    """Two encoders and how alike they are: 1 for the same relations, 0 for unrelated ones."""

    vision: str
    text: str
    score: float


def rank_pairs(
    vision: Mapping[str, dict[str, Any]],
    texts: Sequence[str],
    rows: Sequence[tuple[Any, str]],
) -> list[Pair]:
    """Score every encoder of pictures with every one of texts, the most alike first.

    Args:
        vision: Names, and the words of the encoders as in a recipe.
        texts: Checkpoints of encoders of texts.
        rows: Pictures with their captions.

    Raises:
        EvaluationError: if there are too few rows.
    """
    if len(rows) < _FEWEST:
        raise EvaluationError(
            f"{len(rows)} pictures with captions are too few to compare encoders; give at least "
            f"{_FEWEST}, better some hundreds."
        )
    captions = [caption for _, caption in rows]
    said = {name: SentenceConfig(checkpoint=name).load()(captions) for name in texts}
    found: list[Pair] = []
    for name, words in vision.items():
        shown = pooled(words, [picture for picture, _ in rows])
        found += [Pair(name, other, cka(shown, vectors)) for other, vectors in said.items()]
    return sorted(found, key=lambda pair: -pair.score)


@torch.no_grad()
def pooled(words: dict[str, Any], pictures: Sequence[Any]) -> Tensor:
    """Return the mean feature of each picture: ``(pictures, width)``, float32."""
    encoder = encoders.read(words, origin="ENCODER").load().eval().requires_grad_(False)
    policy = "native" if encoder.facts.rule == "multiple" else "squash"
    looks = MMLMImageProcessor({"use": policy}, encoder.facts.to_dict(), None, {"use": "linear"})
    rows: list[Tensor] = []
    for picture in pictures:
        pixels, size = looks.look(open_image(picture))
        if looks.counter.is_flat:
            tiles = [tile.size for tile in looks.counter.plan(size).tiles]
            features = encoder.encode_numbers(pixels, tiles)
        else:
            features = encoder(pixels)
        rows.append(features.values.float().mean(0))
    return torch.stack(rows)


def cka(first: Tensor, second: Tensor) -> float:
    """Return the linear centred kernel alignment of two sets of vectors, without its bias.

    Shapes:
        first, second: ``(items, width)``, of the same items; the widths may differ

    >>> points = torch.randn(40, 3, generator=torch.manual_seed(0))
    >>> turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.manual_seed(1)))[0]
    >>> round(cka(points, 2 * points @ turn), 6)
    1.0
    """
    kernels = [features.double() @ features.double().T for features in (first, second)]
    for kernel in kernels:
        kernel.fill_diagonal_(0.0)
    one, other = kernels
    both = _dependence(one, other)
    alone = (_dependence(one, one) * _dependence(other, other)).clamp_min(0).sqrt()
    return float(both / alone) if float(alone) > 0 else 0.0


def _dependence(one: Tensor, other: Tensor) -> Tensor:
    """Return the unbiased Hilbert-Schmidt independence criterion of kernels without diagonals."""
    n = len(one)
    trace = (one * other.T).sum()
    sums = one.sum() * other.sum() / ((n - 1) * (n - 2))
    cross = 2 * (one.sum(0) @ other.sum(1)) / (n - 2)
    return (trace + sums - cross) / (n * (n - 3))
