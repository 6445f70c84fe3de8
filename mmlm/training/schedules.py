"""The learning rate as a pure function of how far a stage is.

Progress is a share of the stage (by samples, steps or tokens, as `until` counts), so no
schedule needs to know the number of steps ahead, and a resumed run needs no state.
"""

from __future__ import annotations

import math

from mmlm.training.recipe import StageConfig


def rate(stage: StageConfig, *, progress: float, step: int) -> float:
    """Return the factor on the peak rate.

    Args:
        stage: Which schedule, warm-up and end.
        progress: Share of the stage that is done, from 0 to 1.
        step: The number of the step, from 0.

    >>> stage = StageConfig.from_dict({"name": "a", "learn": ["connector.*"], "data": "x",
    ...                                "until": {"epochs": 1}, "warmup": 0.1})
    >>> [round(rate(stage, progress=p, step=9), 3) for p in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    progress = min(max(progress, 0.0), 1.0)
    if stage.warmup >= 1:
        rise, start = min(1.0, (step + 1) / stage.warmup), 0.0
    else:
        rise = min(1.0, progress / stage.warmup) if stage.warmup else 1.0
        start = stage.warmup
    return rise * _fall(stage, max(0.0, (progress - start) / max(1.0 - start, 1e-9)))


def _fall(stage: StageConfig, progress: float) -> float:
    if stage.schedule == "constant":
        return 1.0
    if stage.schedule == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        share = min(1.0, (1.0 - progress) / stage.decay)
    return stage.final_lr + (1.0 - stage.final_lr) * share
