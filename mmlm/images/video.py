"""The video policy: which frames of a clip are taken, and what becomes of their tokens.

    clip ──► frames (budget) ──► tiles, one each ──► encoder ──► pool, or drop ──► one after another
                                                     └ roll: between its blocks

Like an image policy it sees sizes alone; frames are opened by `mmlm.images.frames`. Three ways
to make less of a clip, or to let its frames meet:

    pool   average in time and space, behind the connector (PLLaVA, arXiv 2404.16994)
    drop   leave out tokens whose pixels are those of the frame before (VideoLLaMA 3, arXiv
           2501.13106): which ones depends on the pixels, so the processor decides it before it
           counts placeholders
    roll   a part of each frame's tokens moves on to the next frame before every block of the
           encoder (All-in-one, arXiv 2203.07303); it has no weights and changes no count
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from mmlm.config import PartConfig
from mmlm.features import Grid
from mmlm.images.base import ImagePolicyConfig, image_policies
from mmlm.images.squash import SquashConfig
from mmlm.images.tiles import TilesConfig
from mmlm.registry import Registry

video_policies: Registry[FramesConfig] = Registry("video policy", plural="video_policies")


@video_policies.register("frames")
class FramesConfig(PartConfig):
    """Clips as frames, evenly taken, within a budget."""

    max_frames: int = Field(default=16, ge=1)
    """Most frames of a clip."""

    per_second: float | None = Field(default=None, gt=0)
    """Frames for each second of a film, up to the budget; by default always the whole budget.
    Lists of frames have no seconds."""

    image: dict[str, Any] | None = None
    """How a frame becomes the encoder's input, as in `model.image`; by default the same as a
    picture, or `squash` where pictures are cut into tiles."""

    joined: bool = False
    """Whether reducer and connector get the frames as one item, as a resampler over a whole clip
    or `reducer: {use: pool, frames: …}` wants it. By default each frame is an item."""

    pool: tuple[int, int, int] | None = None
    """Frames, rows and columns that are left, behind the connector; a shorter clip keeps its own.
    PLLaVA: [16, 12, 12]."""

    drop: float | None = Field(default=None, ge=0, le=255)
    """Leave out a token whose pixels differ from those of the frame before by no more than this,
    in the mean, in grey levels from 0 to 255. VideoLLaMA 3: 0.1."""

    roll: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the tokens of a frame that move on to the next. All-in-one: 0.25."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.pool is not None and min(self.pool) < 1:
            raise ValueError(f"pool {list(self.pool)} must be three numbers from 1")
        if self.drop is not None and (self.pool is not None or self.joined):
            raise ValueError(
                "drop compares the tokens of one frame with those of the frame before, and behind "
                "pool or joined there are none; choose one of them"
            )
        self.frame_policy(SquashConfig())
        return self

    def frame_policy(self, policy: ImagePolicyConfig) -> ImagePolicyConfig:
        """Return how a frame is cut, beside how a picture is."""
        if self.image is not None:
            chosen = image_policies.read(self.image, origin="model.video.image")
            if isinstance(chosen, TilesConfig):
                raise ValueError("image must make one tile of a frame; use squash, crop or native")
            return chosen
        return SquashConfig() if isinstance(policy, TilesConfig) else policy

    def num_frames(self, there: int, seconds: float | None = None) -> int:
        """Return how many frames are taken.

        Args:
            there: Frames that the clip has, at least one.
            seconds: How long it is, where that is known.
        """
        wanted = self.max_frames
        if self.per_second is not None and seconds is not None:
            wanted = max(1, round(seconds * self.per_second))
        return max(1, min(wanted, self.max_frames, there))

    def pooled(self, grid: Grid) -> Grid:
        """Return the grid behind `pool`."""
        if self.pool is None:
            return grid
        return Grid(*(min(own, most) for own, most in zip(grid, self.pool, strict=True)))


def evenly(there: int, wanted: int) -> list[int]:
    """Return which frames are taken: the middles of equal parts, in order, none twice.

    >>> evenly(10, 4)
    [1, 3, 6, 8]
    >>> evenly(3, 3)
    [0, 1, 2]
    """
    return [(2 * place + 1) * there // (2 * wanted) for place in range(wanted)]
