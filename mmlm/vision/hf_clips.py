"""The encoder `hf_clips`: towers of transformers that take a whole clip (VideoMAE, ViViT, X-CLIP).

Such a tower sees a fixed number of frames at once and gives a map for every few of them. A
picture is shown to it as often as it takes frames. To the rest of the house the frames of a clip
are channels of one tile, and its features one item of several frames.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from mmlm.errors import ConfigError
from mmlm.features import Size, VisionFeatures
from mmlm.vision import hf_facts
from mmlm.vision.base import VisionEncoder, VisionFacts, encoders, pack_tokens
from mmlm.vision.hf import HFVisionConfig
from mmlm.vision.probe import idle_parameters, run_shapes

IN_BATCH = ("xclip_vision_model",)
"""Towers whose frames stand under one another in the batch."""

MODEL_TYPES = ("videomae", "vivit", *IN_BATCH)
"""Towers whose tokens stand frame by frame, row by row."""


@encoders.register("hf_clips")
class HFClipsConfig(HFVisionConfig):
    """A tower of transformers that takes whole clips, by Hub id or folder."""

    layer: int | Literal["last"] = "last"
    """Which hidden state: `last` is what the tower gives."""

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if self.layers or self.prefix != "drop" or (self.side_px or self.channels) is not None:
            raise ValueError("a tower of clips has no layers, prefix, side_px or channels to set")
        return self

    def load(self, *, dtype: torch.dtype | None = None) -> VisionEncoder:
        """Load the tower, and find out what it gives."""
        tower = self._tower(dtype or torch.float32).eval()
        kind, config = tower.config.model_type, tower.config
        if kind not in MODEL_TYPES:
            raise ConfigError(
                f"{self._name} is a {kind}, and `hf_clips` takes {', '.join(MODEL_TYPES)}. A tower "
                f"of pictures is `use: hf`; clips go through it frame by frame."
            )
        side, (depth, patch) = hf_facts.side_of(config), _tubelet(config)
        frames = int(getattr(config, "num_frames", 0))
        if side is None or frames < depth:
            raise ConfigError(f"The config of {self._name} names no image_size or num_frames.")
        grid = (side.height // patch, side.width // patch)
        found = run_shapes(tower, self._feature(frames), (1, frames * 3, *side))
        maps = frames // depth
        pixels = self._pixel_facts(kind, 3)
        facts = VisionFacts(
            width=int(found.shape[-1]),
            side=(side.height, side.width),
            grid=grid,
            patch=patch,
            stride=patch,
            num_prefix=int(found.shape[1]) - maps * grid[0] * grid[1],
            mean=pixels.mean,
            std=pixels.std,
            resample=pixels.resample,
            feature="last_hidden_state" if self.layer == "last" else f"hidden_states[{self.layer}]",
            maps=maps,
            frames=frames,
        )
        return HFClipsEncoder(tower, facts, self._feature(frames))

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> VisionEncoder:
        """Build the tower from its config, without reading weights."""
        if tower_config is None:
            raise ConfigError("An hf_clips encoder needs its `vision_config`. Save it again.")
        settings = {key: value for key, value in tower_config.items() if key != "model_type"}
        config = AutoConfig.for_model(tower_config["model_type"], **settings)
        return HFClipsEncoder(hf_facts.new_tower(config), facts, self._feature(facts.frames))

    def _feature(self, frames: int) -> Any:
        """Return the function from tower and pixels to ``(tiles, prefix + places, width)``."""
        layer = self.layer

        def feature(tower: Any, pixels: Tensor) -> Tensor:
            clips = pixels.unflatten(1, (frames, -1))
            in_batch = tower.config.model_type in IN_BATCH
            given = clips.flatten(0, 1) if in_batch else clips
            output = tower(given, output_hidden_states=layer != "last", return_dict=True)
            tokens = output.last_hidden_state if layer == "last" else output.hidden_states[layer]
            if not in_batch:
                return tokens
            return tokens[:, 1:].unflatten(0, (-1, frames)).flatten(1, 2)  # each frame has a CLS

        return feature


class HFClipsEncoder(VisionEncoder):
    """Runs a tower on clips.

    Shapes:
        pixels:  ``(tiles, frames · channels, height, width)``, normalised
        returns: values ``(tiles · maps · rows · columns, width)``
    """

    def __init__(self, tower: PreTrainedModel, facts: VisionFacts, feature: Any) -> None:
        super().__init__(facts)
        self.tower = tower
        self._feature = feature

    @property
    def tower_config(self) -> dict[str, Any]:
        """The tower's config as transformers writes it."""
        return self.tower.config.to_dict()

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode clips."""
        size = Size(*pixels.shape[-2:])
        self.facts.out_grid(size)  # refuses a size that the tower does not take
        return pack_tokens(self._feature(self.tower, pixels.to(self.tower.dtype)), self.facts, size)

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters that are not used."""
        facts = self.facts
        shape = (1, facts.frames * facts.channels, *facts.side)
        idle = idle_parameters(self.tower, self._feature, shape)
        return frozenset(f"tower.{name}" for name in idle)


def _tubelet(config: Any) -> tuple[int, int]:
    """Return how many frames make one map, and the side of a patch."""
    tubelet = getattr(config, "tubelet_size", 1)
    if isinstance(tubelet, (list, tuple)):
        return int(tubelet[0]), int(tubelet[1])
    return int(tubelet), int(config.patch_size)
