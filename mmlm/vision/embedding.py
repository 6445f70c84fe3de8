"""The encoder `embedding`: a picture as the one vector that a CLIP or SigLIP compares with texts.

    pixels ──► image tower ──► its embedding, of length one ─┬─────────────────► one token a tile
                                                             └─► projection ──► the space of an
                                                                                older CLIP (`into`)

With `into`, an assistant that was trained on the embeddings of an older CLIP goes on with a newer
one: the projection brings the new vectors into the old space, and connector and language model
stay as they are (XBT, arXiv 2405.14715). The projection learns from texts alone: both checkpoints
embed the same texts, and what holds for texts holds for the pictures that each of them puts
beside those texts. That is the objective `text_space` in `mmlm.training`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Self

import torch
import transformers
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mmlm.errors import ConfigError
from mmlm.features import Size, VisionFeatures
from mmlm.storage.parts import locate
from mmlm.vision import hf_facts
from mmlm.vision.base import VisionConfig, VisionEncoder, VisionFacts, encoders
from mmlm.vision.probe import idle_parameters, run_shapes

_CLASSES = {
    "clip_vision_model": ("CLIPVisionModelWithProjection", "image_embeds"),
    "siglip_vision_model": ("SiglipVisionModel", "pooler_output"),
}
"""Towers that have an embedding: the class that computes it, and what it is called there."""


@encoders.register("embedding")
class EmbeddingVisionConfig(VisionConfig):
    """The one vector of a picture that a CLIP or SigLIP compares with texts."""

    checkpoint: str | None = None
    """A CLIP or SigLIP: a Hub id, a folder, or `package:NAME/FOLDER`."""

    revision: str | None = None
    """Branch, tag or commit on the Hub."""

    config: dict[str, Any] | None = None
    """The image tower's own config with `model_type`, for a tower that starts untrained."""

    into: str | None = None
    """An older CLIP or SigLIP into whose space a projection brings the vector."""

    into_width: int | None = Field(default=None, ge=1)
    """Width of that space; by default as `into` says."""

    depth: int = Field(default=3, ge=1)
    """Linear layers of the projection."""

    hidden_width: int | None = Field(default=None, ge=1)
    """Width between them; by default four times that of the older space."""

    mean: tuple[float, ...] | None = None
    """Mean of each channel; by default that of the checkpoint's image processor."""

    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; by default that of the image processor."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.checkpoint is None) == (self.config is None):
            raise ValueError("name either checkpoint, or the config of an untrained tower")
        return self

    @property
    def projects(self) -> bool:
        """Whether the vector is brought into another space."""
        return self.into is not None or self.into_width is not None

    def load(self, *, dtype: torch.dtype | None = None) -> EmbeddingEncoder:
        """Load the image tower with its weights; a projection comes untrained."""
        tower = self._tower(dtype or torch.float32).eval()
        config: Any = tower.config
        side = hf_facts.side_of(config)
        if side is None:
            raise ConfigError(f"The config of {self._name} names no image_size.")
        found = hf_facts.pixel_facts(
            None if self.checkpoint is None else locate(self.checkpoint),
            self.revision,
            config.model_type,
        )
        own = run_shapes(tower, _embedding, (1, hf_facts.channels_of(config), *side)).shape[-1]
        facts = VisionFacts(
            width=self._width(own),
            side=(side.height, side.width),
            grid=(1, 1),
            patch=hf_facts.patch_of(config),
            stride=max(side),
            channels=hf_facts.channels_of(config),
            mean=self.mean or found.mean,
            std=self.std or found.std,
            resample=found.resample,
            feature=_CLASSES[config.model_type][1] + (" projected" if self.projects else ""),
        )
        return EmbeddingEncoder(tower, facts, self, own)

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> EmbeddingEncoder:
        """Build the tower from its config, without reading weights."""
        if tower_config is None:
            raise ConfigError("The encoder embedding needs its `vision_config`. Save it again.")
        values = {key: value for key, value in tower_config.items() if key != "model_type"}
        tower = _new(AutoConfig.for_model(tower_config["model_type"], **values))
        shape = (1, facts.channels, *facts.side)
        return EmbeddingEncoder(tower, facts, self, run_shapes(tower, _embedding, shape).shape[-1])

    @property
    def _name(self) -> str:
        return self.checkpoint or f"the {(self.config or {}).get('model_type')} tower"

    def _tower(self, dtype: torch.dtype) -> PreTrainedModel:
        if self.config is not None:
            values = {key: value for key, value in self.config.items() if key != "model_type"}
            try:
                config = AutoConfig.for_model(self.config.get("model_type", ""), **values)
            except Exception as error:  # each family checks its config in its own way
                raise ConfigError(f"vision.config cannot be used: {error}") from None
            tower: Any = _new(config)
            return tower.to(dtype)
        checkpoint = locate(str(self.checkpoint), origin="vision.checkpoint")
        return hf_facts.load_tower(
            checkpoint, revision=self.revision, dtype=dtype, choose=_class_of
        )

    def _width(self, own: int) -> int:
        """Return the width of what comes out.

        Raises:
            ConfigError: if the older checkpoint has no embedding.
        """
        if self.into_width is not None or self.into is None:
            return self.into_width or own
        place = locate(self.into, origin="vision.into")
        try:
            whole: Any = AutoConfig.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise ConfigError(f"vision.into {self.into!r} cannot be read: {error}") from None
        width = getattr(whole, "projection_dim", None)
        if width is None and hasattr(whole, "text_config"):
            width = getattr(whole.text_config, "projection_size", None)
        if width is None:
            raise ConfigError(
                f"vision.into {self.into!r} is a {whole.model_type}, whose space pictures and "
                f"texts do not share. Name a CLIP or SigLIP with both towers."
            )
        return int(width)


class EmbeddingEncoder(VisionEncoder):
    """Runs an image tower and gives its embedding, brought into another space where asked.

    Args:
        tower: The image tower.
        facts: What is known about it.
        config: What was asked for.
        own_width: Width of the tower's own embedding.

    Shapes:
        pixels:  ``(tiles, channels, height, width)``, normalised
        returns: values ``(tiles, width)``, each of length one
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        facts: VisionFacts,
        config: EmbeddingVisionConfig,
        own_width: int,
    ) -> None:
        super().__init__(facts)
        self.tower = tower
        self.projection: nn.Sequential | None = None
        if config.projects:
            hidden = config.hidden_width or 4 * facts.width
            widths = [own_width, *[hidden] * (config.depth - 1), facts.width]
            layers: list[nn.Module] = []
            for before, after in pairwise(widths):
                layers += [nn.Linear(before, after), nn.GELU()]
            self.projection = nn.Sequential(*layers[:-1]).to(tower.dtype)

    @property
    def tower_config(self) -> dict[str, Any]:
        """The tower's config as transformers writes it."""
        config: PretrainedConfig = self.tower.config
        return config.to_dict()

    def train(self, mode: bool = True) -> EmbeddingEncoder:
        """Let the tower stay in evaluation mode where only the projection learns."""
        super().train(mode)
        learns = any(weight.requires_grad for weight in self.tower.parameters())
        self.tower.train(mode and learns)
        return self

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Embed tiles."""
        grid = self.facts.out_grid(Size(*pixels.shape[-2:]))
        found = _embedding(self.tower, pixels.to(self.tower.dtype))
        values = self.projected(found).to(self.tower.dtype)
        return VisionFeatures(values, (grid,) * len(values))

    def projected(self, embeddings: Tensor) -> Tensor:
        """Bring embeddings of the tower's own space, pictures' or texts', to length one and over.

        Shapes:
            embeddings: ``(items, own width)``
            returns: ``(items, width)``, float32
        """
        unit = normalize(embeddings.float(), dim=-1)
        if self.projection is None:
            return unit
        weight = next(self.projection.parameters())
        return normalize(self.projection(unit.to(weight.dtype)).float(), dim=-1)

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters of the tower that its embedding does not need."""
        idle = idle_parameters(self.tower, _embedding, (1, self.facts.channels, *self.facts.side))
        return frozenset(f"tower.{name}" for name in idle)


def _embedding(tower: Any, pixels: Tensor) -> Tensor:
    """Return what the tower compares with texts: ``(tiles, width)``."""
    return tower(pixels, return_dict=True)[_CLASSES[tower.config.model_type][1]]


def _class_of(whole: PretrainedConfig, part: PretrainedConfig) -> Any:
    """Return the class that computes the embedding of an image tower.

    Raises:
        ConfigError: if the tower has none.
    """
    if part.model_type not in _CLASSES:
        raise ConfigError(
            f"A {part.model_type} gives no embedding that is compared with texts; these do: "
            f"{', '.join(_CLASSES)}. Use `vision: {{use: hf}}` for its features."
        )
    given = getattr(whole, "projection_dim", None)
    if given is not None and whole is not part:
        part.projection_dim = given  # the joint config decides, whatever that of the tower says
    return getattr(transformers, _CLASSES[part.model_type][0])


def _new(config: PretrainedConfig) -> PreTrainedModel:
    """Build an untrained tower."""
    return _class_of(config, config)._from_config(config).eval()
