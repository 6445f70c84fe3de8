"""What a probe finds: one score with its interval, beside chance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mmlm.evaluation.probes.alignment import Alignment


@dataclass(frozen=True)
class Probed:
    """One probe's score.

    Args:
        probe: ``kinds``, ``places``, or one of `mmlm.evaluation.probes.zero_shot`.
        set: The benchmark, or ``drawn`` for pictures that are made here.
        n: Pictures.
        score: Accuracy of kinds and of what is found; area under the ROC curve of places.
        low: The lower end of its 95 % interval.
        high: The upper end.
        chance: What the commonest kind gives; 0.5 for places; one in so many, without learning.
    """

    probe: str
    set: str
    n: int
    score: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True)
class Probes:
    """Everything that was probed, and what could not be."""

    encoder: tuple[Probed, ...]
    alignment: tuple[Alignment, ...]
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "encoder": [asdict(each) for each in self.encoder],
            "alignment": [asdict(each) for each in self.alignment],
            "left_out": list(self.left_out),
        }
