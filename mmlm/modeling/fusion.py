"""Image features take the places of their placeholders among the text embeddings.

Features are placed in reading order: row by row, left to right. Going on with a wrong
number would train on the wrong image without a sign of it, so every difference is an error.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from mmlm.errors import AlignmentError


def place_image_features(
    text: Float[Tensor, "batch tokens width"],
    features: Float[Tensor, "features width"],
    token_ids: Int[Tensor, "batch tokens"],
    *,
    placeholder_id: int,
) -> Float[Tensor, "batch tokens width"]:
    """Replace the embedding of every placeholder by the next image feature.

    Raises:
        AlignmentError: if there are more placeholders than features, or fewer.
    """
    slots = token_ids == placeholder_id
    wanted, given = int(slots.sum()), features.shape[0]
    if wanted != given:
        raise AlignmentError(
            f"The batch has {wanted} image placeholders (token {placeholder_id}) but the "
            f"encoder gave {given} features. Each feature needs exactly one placeholder. "
            f"Most often the text was cut inside an image: raise `run.row_tokens` or the "
            f"length limit, or pass as many images as the text names."
        )
    return text.masked_scatter(slots.unsqueeze(-1), features.to(text.dtype))
