"""Tokens that are weighted sums of features: how a map of features becomes a smaller one.

Numbers only, as in every image policy: which features, with which weights. The sums are formed in
`mmlm.modeling.pictures`. LLaVA-OneVision's `anyres_max_9` is computed so (arXiv 2408.03326).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SLACK = 1.1  # LLaVA-OneVision: a map that is longer by less than this stays as it is


@dataclass(frozen=True)
class Blend:
    """An order in which each token is a weighted sum of a few features.

    Shapes:
        places: ``(tokens, k)``, as `ImagePolicyConfig.arrange` numbers features and marks
        weights: ``(tokens, k)``, which add up to one for each token
    """

    places: NDArray[np.int64]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.places)


def shrunk(places: NDArray[np.int64], most: int, mark: int) -> Blend | None:
    """Shrink a map to about `most` features, or return None where it is hardly larger.

    Each new feature is the bilinear mean of the four around it, with the edges of pixels aligned
    (`torch.nn.functional.interpolate`, mode bilinear); the mark ends each row.

    Returns:
        Places and weights ``(rows · (columns + 1), 4)``.
    """
    ratio = math.sqrt(places.size / most)
    if ratio <= _SLACK:
        return None
    (above, below, low), (left, right, near) = (
        _neighbours(old, max(1, int(old // ratio))) for old in places.shape
    )
    corners = [
        places[np.ix_(rows, columns)] for rows in (above, below) for columns in (left, right)
    ]
    shares = [np.outer(rows, columns) for rows in (1 - low, low) for columns in (1 - near, near)]
    cells, weights = np.stack(corners, axis=-1), np.stack(shares, axis=-1)
    ends = np.full((len(above), 1, 4), -1 - mark, dtype=np.int64)
    whole_end = np.broadcast_to(np.array([1.0, 0.0, 0.0, 0.0]), ends.shape)
    return Blend(
        np.concatenate([cells, ends], axis=1).reshape(-1, 4),
        np.concatenate([weights, whole_end], axis=1).reshape(-1, 4),
    )


def _neighbours(
    old: int, new: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return, along one side, the two neighbours of each new place, and the later one's share."""
    at = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
    before = np.minimum(at.astype(np.int64), old - 1)
    return before, np.minimum(before + 1, old - 1), at - before


def framed(lines: Blend, whole_picture: NDArray[np.int64] | None, first: bool) -> Blend:
    """Put the thumbnail's features, each by itself, before or behind a shrunk map."""
    if whole_picture is None:
        return lines
    alone = np.repeat(whole_picture[:, None], 4, axis=1)
    shares = np.tile(np.array([[1.0, 0.0, 0.0, 0.0]]), (len(alone), 1))
    places = [alone, lines.places] if first else [lines.places, alone]
    weights = [shares, lines.weights] if first else [lines.weights, shares]
    return Blend(np.concatenate(places), np.concatenate(weights))
