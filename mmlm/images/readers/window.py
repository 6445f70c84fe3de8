"""Grey values of any depth become bytes: full scale, spread, or through a window.

A window is `[level, width]`: what lies below `level - width / 2` is black, above
`level + width / 2` white, and between them the values rise in a straight line.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"


def grey_bytes(values: Array, window: str | tuple[float, float] = "full") -> Array:
    """Map grey values onto bytes.

    Args:
        values: ``(height, width)``, of any number type.
        window: ``full`` keeps the scale, ``spread`` goes from the least to the greatest value,
            and ``(level, width)`` shows a part.

    Returns:
        uint8, ``(height, width)``.
    """
    floats = values.dtype.kind == "f"
    numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if isinstance(window, tuple):
        level, width = window
        return between(numbers, level - width / 2, level + width / 2)
    low, high = float(numbers.min()), float(numbers.max())
    if window == "spread":
        return between(numbers, low, high)
    # Integers that fit into 16 bits keep their full scale (65,535 is white), floats from 0 to 1
    # or from 0 to 255 theirs. Anything else has no known white.
    if floats and low >= 0 and high <= 1:
        scaled = numbers * 255.0
    elif floats and low >= 0 and high <= 255:
        scaled = numbers
    elif not floats and low >= 0 and high <= 65_535:
        scaled = numbers / 257.0
    else:
        return between(numbers, low, high)
    return np.round(scaled).astype(np.uint8)


def between(values: Array, low: float, high: float) -> Array:
    """Map `low` onto black and `high` onto white, straight between them.

    >>> between(np.array([-5.0, 0.0, 5.0, 99.0]), 0.0, 10.0).tolist()
    [0, 0, 128, 255]
    """
    scaled = (values - low) * 255.0 / (high - low if high > low else 1.0)
    return np.round(np.clip(scaled, 0.0, 255.0)).astype(np.uint8)
