"""What a joined model is made of, as `config.json` holds it.

The parts are stored as plain dictionaries, in the words of a recipe, next to what had to be
probed once (`vision_facts`). Only the language model and the vision tower are real
sub-configs of transformers. Typed views of the parts are properties. Nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig

from mmlm.connectors import ConnectorConfig, connectors
from mmlm.errors import ConfigError
from mmlm.features import ClipSize, Grid, Size
from mmlm.images import (
    Blend,
    FramesConfig,
    ImagePlan,
    ImagePolicyConfig,
    Tile,
    image_policies,
    video_policies,
)
from mmlm.language import HeadRule
from mmlm.reducers import ReducerConfig, reducers
from mmlm.vision import VisionConfig, VisionFacts, encoders


class TokenCounter:
    """Counts the tokens of a picture or clip from its size; holds no weights, opens no pixels.

    Args:
        policy: How a picture becomes tiles.
        facts: What the encoder does with a tile.
        reducer: What changes the number of features, if anything.
        connector: The connector, which may change the number too (a resampler).
        video: What becomes of clips; None takes none.
    """

    def __init__(
        self,
        policy: ImagePolicyConfig,
        facts: VisionFacts,
        reducer: ReducerConfig | None,
        connector: ConnectorConfig,
        video: FramesConfig | None = None,
    ) -> None:
        self.policy = policy
        self.facts = facts
        self.reducer = reducer
        self.connector = connector
        self.video = video
        self.frame_policy = policy if video is None else video.frame_policy(policy)

    @property
    def side(self) -> Size:
        """The input size of the encoder."""
        return Size(*self.facts.side)

    @property
    def step(self) -> int:
        """Side in pixels of the cell that becomes one token, where tiles have any size."""
        factor = getattr(self.reducer, "factor", 1)
        factor = (factor if isinstance(factor, int) else 1) * self.connector.cell
        features = max(1, self.facts.step // self.facts.stride)
        return self.facts.step * (factor // gcd(factor, features))

    @property
    def is_flat(self) -> bool:
        """Whether pixels travel as one row of numbers; see `mmlm.modeling.pictures`."""
        several = bool(self.facts.parts) or self.facts.frames > 1
        return self.policy.ragged or several or self.video is not None

    @property
    def needs_sizes(self) -> bool:
        """Whether the model must be told the sizes of the pictures."""
        return self.is_flat or self.policy.needs_sizes

    def plan(self, size: Size | ClipSize) -> ImagePlan:
        """The tiles of a picture of this size, or the frames of a clip."""
        if isinstance(size, ClipSize):
            count = size.frames if self.facts.frames == 1 else 1  # or one tile of many frames
            return ImagePlan((self._tile_of_frame(size),) * count, count, 1)
        return self.policy.plan(size, self.side, self.step)

    def _tile_of_frame(self, size: ClipSize) -> Tile:
        """The one tile that a frame becomes.

        Raises:
            ConfigError: if this model takes no clips.
        """
        if self.video is None:
            raise ConfigError(
                "This model takes no clips. Write `video: {use: frames}` under `model:`, or call "
                "`assistant.with_video()`."
            )
        (tile,) = self.frame_policy.plan(size.frame, self.side, self.step).tiles
        return tile

    def length(self, size: Size | ClipSize) -> int:
        """How many rows of `pixel_values` a picture or clip takes."""
        tiles = self.plan(size).tiles
        if not self.is_flat:
            return len(tiles)
        numbers = sum(self.facts.num_numbers(tile.size) for tile in tiles)
        return numbers + self.num_mask(size)

    def num_tiles(self, size: Size | ClipSize) -> int:
        """How many tiles of the encoder's own size a picture or clip costs, rounded up by tile."""
        own = self.side.height * self.side.width
        tiles = self.plan(size).tiles
        return sum(-(-tile.size.height * tile.size.width // own) for tile in tiles)

    def num_mask(self, size: Size | ClipSize) -> int:
        """How many numbers behind a clip's pixels say which of its tokens are kept."""
        if not isinstance(size, ClipSize) or self.video is None or self.video.drop is None:
            return 0
        return self.grid_of_clip(size).num_tokens

    def grid_of_clip(self, size: ClipSize) -> Grid:
        """The grid of a clip behind the connector, before anything is pooled or dropped."""
        tile = self._tile_of_frame(size)
        if self.video is not None and self.video.joined:
            own = self.facts.out_grid(tile.size)
            grid = Grid(own.frames * len(self.plan(size).tiles), own.rows, own.columns)
            if self.reducer is not None:
                grid = self.reducer.out_grid(grid)
            return self.connector.out_grid(grid)
        frame = self.grid_of_tile(tile.size)
        return Grid(frame.frames * len(self.plan(size).tiles), frame.rows, frame.columns)

    @property
    def marks_frames(self) -> bool:
        """Whether the marks of the image policy (ends of rows) stand in frames as well."""
        video = self.video
        if video is None or video.pool is not None or video.drop is not None or video.joined:
            return False
        return self.frame_policy is self.policy and self.facts.frames == 1

    def grid_of_tile(self, size: Size) -> Grid:
        """The grid that a tile of this size has when it reaches the language model."""
        grid = self.facts.out_grid(size)
        if self.reducer is not None:
            grid = self.reducer.out_grid(grid)
        return self.connector.out_grid(grid)

    def count(self, size: Size | ClipSize) -> int:
        """The number of placeholders of a picture or clip of this size."""
        if isinstance(size, ClipSize):
            return self._count_clip(size)
        plan = self.plan(size)
        grids = [self.grid_of_tile(tile.size) for tile in plan.tiles]
        order = self.policy.arrange(size, plan, grids)
        return sum(grid.num_tokens for grid in grids) if order is None else len(order)

    def _count_clip(self, size: ClipSize) -> int:
        """The number of placeholders of a clip: all that follows from its size."""
        grid = self.grid_of_clip(size)
        if self.video is None:
            return grid.num_tokens
        if size.kept:
            return size.kept
        frame = Grid(grid.frames // size.frames, grid.rows, grid.columns)
        order = self.order(size, [frame] * size.frames) if self.marks_frames else None
        return self.video.pooled(grid).num_tokens if order is None else len(order)

    def num_items(self, size: Size | ClipSize) -> int:
        """How many items a picture or clip is when its tokens are put in order."""
        if isinstance(size, ClipSize):
            return len(self.plan(size).tiles) if self.marks_frames else 1
        return len(self.plan(size).tiles)

    def order(
        self, size: Size | ClipSize, grids: Sequence[Grid]
    ) -> NDArray[np.int64] | Blend | None:
        """Say in which order the tokens of a picture or clip are read; see `arrange`."""
        if not isinstance(size, ClipSize):
            return self.policy.arrange(size, self.plan(size), grids)
        if not self.marks_frames:
            return None
        plan = self.policy.plan(size.frame, self.side, self.step)
        pieces: list[NDArray[np.int64]] = []
        first = 0
        for grid in grids:
            places = self.policy.arrange(size.frame, plan, [grid])
            if places is None or isinstance(places, Blend):  # frames are never tiled
                return None
            pieces.append(np.where(places >= 0, places + first, places))
            first += grid.num_tokens
        return np.concatenate(pieces)

    @property
    def tokens_per_tile(self) -> int:
        """The number of tokens of one tile of the encoder's own size."""
        return self.grid_of_tile(self.side).num_tokens


class MMLMConfig(PretrainedConfig):
    """Config of `MMLMForConditionalGeneration`.

    Args:
        text_config: The language model's own config.
        vision_config: The vision tower's own config, or None where it has none (raw patches).
        image: The image policy, as in a recipe: ``{"use": "letterbox"}``.
        vision: The encoder, as in a recipe: ``{"use": "hf", "checkpoint": …, "layer": -2}``.
        vision_facts: What was probed when the encoder was first built.
        reducer: The reducer, or None.
        connector: The connector.
        video: What becomes of clips, or None: ``{"use": "frames", "max_frames": 16}``.
        image_token_id: The id of the placeholder.
        head: What the language model does to its logits (soft cap, scale), see `HeadRule`.
        sources: Where the parts came from, for the card: ids, revisions, packages, notes.
    """

    model_type = "mmlm"
    # transformers declares a property where it reads a table.
    sub_configs = {  # noqa: RUF012  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
    }
    # No remote code; TRL reads the attribute of classes that transformers does not hold.
    auto_map: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        image: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        vision_facts: dict[str, Any] | None = None,
        reducer: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        image_token_id: int = 0,
        head: dict[str, Any] | None = None,
        sources: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        video: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.image = image or {"use": "squash"}
        self.vision = vision or {"use": "patches"}
        self.vision_facts = vision_facts
        self.reducer = reducer
        self.connector = connector or {"use": "linear"}
        self.video = video
        self.image_token_id = image_token_id
        self.head = head or {}
        self.sources = sources or {}
        super().__init__(**kwargs)
        # After `super`, which would forget the attention that a loaded language model runs with.
        self.text_config = _sub_config(text_config, default="llama")
        self.vision_config = None if vision_config is None else _sub_config(vision_config)
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def image_token_index(self) -> int:
        """The name that LLaVA gives to `image_token_id`; pipelines and TRL ask for it."""
        return self.image_token_id

    @property
    def image_policy(self) -> ImagePolicyConfig:
        """The image policy as a typed config."""
        return image_policies.read(self.image, origin="config.json: image")

    @property
    def vision_part(self) -> VisionConfig:
        """The encoder as a typed config."""
        return encoders.read(self.vision, origin="config.json: vision")

    @property
    def facts(self) -> VisionFacts:
        """What was probed of the encoder."""
        return VisionFacts.from_dict(self.vision_facts or {}, origin="config.json: vision_facts")

    @property
    def reducer_part(self) -> ReducerConfig | None:
        """The reducer as a typed config, or None."""
        if self.reducer is None:
            return None
        return reducers.read(self.reducer, origin="config.json: reducer")

    @property
    def connector_part(self) -> ConnectorConfig:
        """The connector as a typed config."""
        return connectors.read(self.connector, origin="config.json: connector")

    @property
    def video_part(self) -> FramesConfig | None:
        """The video policy as a typed config, or None."""
        if self.video is None:
            return None
        return video_policies.read(self.video, origin="config.json: video")

    @property
    def head_rule(self) -> HeadRule:
        """What the language model does to its logits."""
        return HeadRule.from_dict(self.head, origin="config.json: head")

    def counter(self) -> TokenCounter:
        """Return what counts the tokens of a picture from its size."""
        return TokenCounter(
            self.image_policy,
            self.facts,
            self.reducer_part,
            self.connector_part,
            self.video_part,
        )


def _sub_config(values: Any, *, default: str | None = None) -> PretrainedConfig:
    """Turn a dictionary into the config class that its `model_type` names."""
    if isinstance(values, PretrainedConfig):
        return values
    settings = dict(values or {})
    model_type = settings.pop("model_type", default)
    return AutoConfig.for_model(model_type, **settings)
