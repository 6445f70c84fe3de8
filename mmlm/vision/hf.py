"""The encoder `hf`: any image tower of transformers that gives one feature for each place.

Towers inside joint checkpoints (CLIP, SigLIP, LLaVA …) are loaded alone. Position tables are
resized in two dimensions when another side is asked for, once, at load, so that the stock
class computes the same without a flag. Only the facts come from here: which side is taken,
what the grid is and how pixels are normalised; cutting pictures is done by `mmlm.images`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mmlm.errors import ConfigError
from mmlm.features import Size, VisionFeatures
from mmlm.storage.parts import locate
from mmlm.vision import hf_facts, naflex, qwen_vit
from mmlm.vision.base import VisionConfig, VisionEncoder, VisionFacts, encoders, pack_tokens
from mmlm.vision.channels import for_channels, with_channels
from mmlm.vision.positions import resize_positions
from mmlm.vision.probe import count_grid, idle_parameters, run_shapes, wrong_size


@encoders.register("hf")
class HFVisionConfig(VisionConfig):
    """An image tower of transformers, by Hub id or folder."""

    checkpoint: str | None = None
    """Hub id, folder, or `package:NAME/FOLDER`. None makes an untrained tower of `config`."""

    revision: str | None = None
    """Branch, tag or commit on the Hub."""

    config: dict[str, Any] | None = None
    """The tower's own config with `model_type`, for a tower that starts untrained."""

    layer: int | Literal["last"] = -2
    """Which hidden state: `last` is after the final norm, -2 is LLaVA's, before any norm."""

    layers: tuple[int, ...] = ()
    """Further hidden states, for a connector that reads several: token_packer, qladder, …"""

    side_px: int | None = Field(default=None, ge=1)
    """Side of the pictures in pixels; by default that of the checkpoint."""

    channels: int | None = Field(default=None, ge=1)
    """Channels of a pixel; other than the checkpoint's, the stem is spread over them."""

    prefix: Literal["drop", "drop_first", "keep_as_tokens"] = "drop"
    """What becomes of CLS and registers; stock LLaVA can drop the first alone, or keep all."""

    mean: tuple[float, ...] | None = None
    """Mean of each channel; by default that of the checkpoint's image processor."""

    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; by default that of the image processor."""

    resample: str | None = None
    """How pictures are resized; by default as the image processor does it."""

    def load(self, *, dtype: torch.dtype | None = None) -> VisionEncoder:
        """Load the tower with its weights, resize it where asked, and probe it."""
        tower = self._tower(dtype or torch.float32).eval()
        if tower.config.model_type in hf_facts.OF_CLIPS:
            raise ConfigError(
                f"{self._name} is a {tower.config.model_type}, which takes whole clips. Write "
                f"`use: hf_clips`."
            )
        if self.channels not in (None, hf_facts.channels_of(tower.config)):
            tower = with_channels(tower, self.channels or 3)
        if tower.config.model_type in naflex.MODEL_TYPES:
            return self._naflex(tower)
        if tower.config.model_type in qwen_vit.MODEL_TYPES:
            return self._qwen(tower)
        native = hf_facts.side_of(tower.config)
        side = native if self.side_px is None else Size(self.side_px, self.side_px)
        if side is None:
            raise ConfigError(
                f"The config of {self._name} names no image_size. Set vision.side_px."
            )
        if native is not None and side != native and not self._takes(tower, side, native):
            tower = self._at_other_side(tower, native, side)
        facts = self._facts(tower, side)
        shape = (1, facts.channels, *facts.side)
        run_shapes(tower, _features_of(self.layer, self.layers), shape)  # refuses unknown layers
        return HFVisionEncoder(tower, facts, layer=self.layer, layers=self.layers)

    def _qwen(self, tower: PreTrainedModel) -> VisionEncoder:
        """Return the encoder of a tower that merges squares of patches itself."""
        if self.layer != "last" or self.layers:
            raise ConfigError(
                f"{self._name} is a {tower.config.model_type}, whose only features are those that "
                f"it has merged. Write `layer: last` under vision, and no `layers`."
            )
        config: Any = tower.config
        pixels = self._pixel_facts(config.model_type, int(config.in_channels))
        return qwen_vit.QwenVitEncoder(tower, qwen_vit.facts_of(config, self.side_px, pixels))

    def _naflex(self, tower: PreTrainedModel) -> VisionEncoder:
        """Wrap a tower that takes patches of pictures of any proportions."""
        config: Any = tower.config
        rows, patch = round(config.num_patches**0.5), int(config.patch_size)
        side_px = self.side_px or rows * patch
        if side_px % patch:
            raise ConfigError(
                f"vision.side_px {side_px} is not a multiple of the patch of {patch}; take "
                f"{max(1, round(side_px / patch)) * patch}."
            )
        pixels = self._pixel_facts(config.model_type, config.num_channels)
        facts = VisionFacts(
            width=config.hidden_size,
            side=(side_px, side_px),
            grid=(side_px // patch, side_px // patch),
            patch=patch,
            stride=patch,
            channels=config.num_channels,
            mean=pixels.mean,
            std=pixels.std,
            resample=pixels.resample,
            rule="multiple",
            step=patch,
            feature="last_hidden_state" if self.layer == "last" else f"hidden_states[{self.layer}]",
            num_layers=len(self.layers),
        )
        encoder = naflex.NaflexEncoder(tower, facts, layer=self.layer, layers=self.layers)
        encoder.idle_parameters()  # refuses unknown layers
        return encoder

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> VisionEncoder:
        """Build the tower from its config, without reading weights."""
        if tower_config is None:
            raise ConfigError("An hf encoder needs its `vision_config`. Save the model again.")
        settings = {key: value for key, value in tower_config.items() if key != "model_type"}
        config = AutoConfig.for_model(tower_config["model_type"], **settings)
        tower = hf_facts.new_tower(config)
        if config.model_type in naflex.MODEL_TYPES:
            return naflex.NaflexEncoder(tower, facts, layer=self.layer, layers=self.layers)
        if config.model_type in qwen_vit.MODEL_TYPES:
            return qwen_vit.QwenVitEncoder(tower, facts)
        return HFVisionEncoder(tower, facts, layer=self.layer, layers=self.layers)

    @property
    def _name(self) -> str:
        """How messages call the tower."""
        return self.checkpoint or f"the {(self.config or {}).get('model_type')} tower"

    def _tower(self, dtype: torch.dtype) -> PreTrainedModel:
        """Return the tower at its native side, with its weights or untrained."""
        if (self.checkpoint is None) == (self.config is None):
            raise ConfigError(
                "vision needs either `checkpoint`, a Hub id or folder, or `config`, the config of "
                "an untrained tower with its `model_type`."
            )
        if self.config is not None:
            settings = {key: value for key, value in self.config.items() if key != "model_type"}
            try:
                config = AutoConfig.for_model(self.config.get("model_type", ""), **settings)
                part = hf_facts.vision_part_of(config, "vision.config")
                tower: Any = hf_facts.new_tower(part)
            except ConfigError:
                raise
            except Exception as error:  # each family checks its config in its own way
                raise ConfigError(f"vision.config cannot be used: {error}") from None
            return tower.to(dtype)
        checkpoint = locate(str(self.checkpoint), origin="vision.checkpoint")
        return hf_facts.load_tower(checkpoint, revision=self.revision, dtype=dtype)

    def _at_other_side(self, tower: PreTrainedModel, native: Size, side: Size) -> PreTrainedModel:
        """Return the tower for another side, or say which sides it takes."""
        patch = hf_facts.patch_of(tower.config)

        def takes(side_px: int) -> bool:
            try:
                at = Size(side_px, side_px)
                with torch.device("meta"):
                    other = hf_facts.new_tower(hf_facts.config_at(tower.config, at))
                self._grid(other, at)
            except Exception:  # whatever a network raises, the size does not work
                return False
            return True

        step = patch or 32
        near = round(side.height / step) * step
        candidates = [near, near + step, near - step, native.height, near + 2 * step, 224, 256, 384]
        if patch and side.height % patch:
            cause = f"it is not a multiple of the patch of {patch}"
            raise wrong_size("vision.side_px", side.height, cause, takes, candidates)
        try:
            config = hf_facts.config_at(tower.config, side)
            resized = resize_positions(tower, hf_facts.new_tower(config), native, patch)
            self._grid(resized, side)
        except Exception as error:  # see `takes`
            raise wrong_size("vision.side_px", side.height, error, takes, candidates) from error
        return resized

    def _grid(self, tower: PreTrainedModel, side: Size) -> tuple[tuple[int, int], int, int]:
        """Return the grid, the number of prefix tokens and the width of the features."""
        shape = (1, hf_facts.channels_of(tower.config), *side)
        features = run_shapes(tower, _feature_of(self.layer), shape)
        if features.ndim == 4:
            return hf_facts.map_layout(features, side)
        patch = hf_facts.patch_of(tower.config)
        known = hf_facts.PREFIX_OF.get(tower.config.model_type, 0)
        grid, num_prefix = count_grid(features.shape[1] - known, side, patch, origin=self._name)
        return grid, num_prefix + known, int(features.shape[-1])

    def _facts(self, tower: PreTrainedModel, side: Size) -> VisionFacts:
        """Probe the tower at `side`."""
        try:
            grid, num_prefix, width = self._grid(tower, side)
        except ConfigError:
            raise
        except Exception as error:  # whatever a network raises, it cannot be used
            raise ConfigError(
                f"{self._name} cannot be run on pixels of {side.height} x {side.width}: {error}"
            ) from error
        stride = max(1, side.height // grid[0])
        channels = hf_facts.channels_of(tower.config)
        pixels = self._pixel_facts(tower.config.model_type, channels)
        kept = {"drop": 0, "drop_first": max(0, num_prefix - 1), "keep_as_tokens": num_prefix}
        rows, columns = (max(2, count // 2) for count in grid)
        others = (  # windows may need a least size, and divide some sizes alone
            Size(side.height + stride, side.width + stride),
            Size(rows * stride, columns * stride),
        )
        return VisionFacts(
            width=width,
            side=(side.height, side.width),
            grid=grid,
            patch=hf_facts.patch_of(tower.config),
            stride=stride,
            num_prefix=num_prefix,
            kept_prefix=kept[self.prefix],
            channels=channels,
            mean=pixels.mean,
            std=pixels.std,
            resample=pixels.resample,
            rule="multiple" if all(self._takes(tower, px, side) for px in others) else "fixed",
            step=stride,
            feature="last_hidden_state" if self.layer == "last" else f"hidden_states[{self.layer}]",
            num_layers=len(self.layers),
        )

    def _pixel_facts(self, model_type: str, channels: int) -> hf_facts.PixelFacts:
        """Return how pixels are treated: what is set here wins over what the checkpoint says."""
        checkpoint = None if self.checkpoint is None else locate(self.checkpoint)
        try:
            found = hf_facts.pixel_facts(checkpoint, self.revision, model_type)
        except ConfigError:
            if self.mean is None or self.std is None:
                raise
            found = hf_facts.PixelFacts(self.mean, self.std, "bicubic")
        return hf_facts.PixelFacts(
            self.mean or for_channels(found.mean, channels),
            self.std or for_channels(found.std, channels),
            self.resample or found.resample,
        )

    def _takes(self, tower: PreTrainedModel, size: Size, known: Size) -> bool:
        """Say whether the tower as it is gives a grid that follows the size.

        Args:
            tower: The tower.
            size: The size to try.
            known: A size that the tower takes.
        """
        patch = hf_facts.patch_of(tower.config)
        if patch and (size.height % patch or size.width % patch):
            return False
        try:
            rows, columns = self._grid(tower, known)[0]
            grid = self._grid(tower, size)[0]
        except Exception:  # whatever a network raises, the size does not work
            return False
        strides = known.height // rows, known.width // columns
        return grid == (size.height // strides[0], size.width // strides[1])


class HFVisionEncoder(VisionEncoder):
    """Runs a tower of transformers and packs one of its hidden states, and others beside it.

    Shapes:
        pixels:  ``(tiles, channels, height, width)``, normalised
        returns: values ``(tiles · rows · columns, width)``; as many in each of `layers`
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        facts: VisionFacts,
        *,
        layer: int | Literal["last"],
        layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__(facts)
        self.tower = tower
        self._features = _features_of(layer, layers)

    @property
    def tower_config(self) -> dict[str, Any]:
        """The tower's config as transformers writes it."""
        config: PretrainedConfig = self.tower.config
        return config.to_dict()

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode tiles."""
        size = Size(*pixels.shape[-2:])
        self.facts.out_grid(size)  # refuses a size that the tower does not take
        packed: list[VisionFeatures] = []
        for features in self.raw(pixels):
            if features.ndim == 4:
                features = hf_facts.map_to_tokens(features, self.facts.width)
            if features.shape[0] != pixels.shape[0]:  # Pixtral packs its tiles into one row itself
                features = features.unflatten(1, (pixels.shape[0], -1))[0]
            packed.append(pack_tokens(features, self.facts, size))
        return replace(packed[0], layers=tuple(packed[1:]))

    def raw(self, pixels: Tensor) -> list[Tensor]:
        """Return the features and further layers as the network gives them."""
        return self._features(self.tower, pixels.to(self.tower.dtype))

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters after the last hidden state that is used."""
        shape = (1, self.facts.channels, *self.facts.side)

        def used(tower: Any, pixels: Tensor) -> Tensor:
            return torch.cat([each.flatten() for each in self._features(tower, pixels)])

        idle = idle_parameters(self.tower, used, shape)
        return frozenset(f"tower.{name}" for name in idle)


def _feature_of(layer: int | Literal["last"]) -> Callable[[Any, Tensor], Tensor]:
    """Return the function from tower and pixels to the features that are used."""
    features = _features_of(layer, ())

    def feature(tower: Any, pixels: Tensor) -> Tensor:
        return features(tower, pixels)[0]

    return feature


def _features_of(
    layer: int | Literal["last"], layers: tuple[int, ...]
) -> Callable[[Any, Tensor], list[Tensor]]:
    """Return the function from tower and pixels to the features, and further ones, in one run."""

    def features(tower: Any, pixels: Tensor) -> list[Tensor]:
        if layer == "last" and not layers:
            return [tower(pixels, return_dict=True).last_hidden_state]
        output = tower(pixels, output_hidden_states=True, return_dict=True)
        states = output.hidden_states
        picked: list[Tensor] = []
        named: list[tuple[str, int | Literal["last"]]] = [("layer", layer)]
        for key, index in named + [("layers", each) for each in layers]:
            if index == "last":
                picked.append(output.last_hidden_state)
                continue
            if not -len(states) <= index < len(states):
                raise ConfigError(
                    f"vision.{key} {index} is beyond this tower, which has {len(states)} hidden "
                    f"states: from {-len(states)} to {len(states) - 1}, or 'last'."
                )
            picked.append(states[index])
        return picked

    return features
