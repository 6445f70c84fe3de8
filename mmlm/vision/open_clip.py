"""The encoder `open_clip`: the image tower of a checkpoint in the form of open_clip.

So are published BiomedCLIP, RemoteCLIP and many CLIPs of other domains: a folder or a repository
with `open_clip_config.json` and weights that hold both towers. The image tower alone is built and
read, so that a text tower from elsewhere is never asked for. Position tables are resized in two
dimensions when another side is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.errors import ConfigError, MissingExtraError
from mmlm.features import Size, VisionFeatures
from mmlm.storage.parts import locate
from mmlm.vision.base import VisionConfig, VisionEncoder, VisionFacts, encoders, pack_tokens
from mmlm.vision.positions import resize_table
from mmlm.vision.probe import idle_parameters, run_shapes
from mmlm.vision.timm_weights import read_tensors

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_PREFIX = "visual."
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@encoders.register("open_clip")
class OpenClipVisionConfig(VisionConfig):
    """The image tower of an open_clip checkpoint."""

    checkpoint: str
    """A Hub id or folder with `open_clip_config.json`, or open_clip's name of an architecture,
    such as `ViT-B-32`, with `weights`."""

    weights: str | None = None
    """A weight file to read instead of the checkpoint's own: a path, or `package:NAME/FILE`."""

    pretrained: bool = True
    """Whether weights are read; false leaves the tower untrained."""

    layer: int = -1
    """Which block: -1 is the last."""

    norm: bool = True
    """Whether the tower's last norm is applied to what the block gives."""

    side_px: int | None = Field(default=None, ge=1)
    """Side of the pictures in pixels; by default that of the checkpoint."""

    mean: tuple[float, ...] | None = None
    """Mean of each channel; by default that of the checkpoint, or OpenAI's."""

    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; by default that of the checkpoint, or OpenAI's."""

    resample: str = "bicubic"
    """How pictures are resized: bilinear, bicubic, lanczos or nearest-exact."""

    def load(self, *, dtype: torch.dtype | None = None) -> OpenClipVisionEncoder:
        """Build the image tower, read its weights, and probe it."""
        source = _source_of(self.checkpoint, self.weights)
        if self.pretrained and source.weights is None:
            raise ConfigError(
                f"{self.checkpoint} comes without weights that can be read. Name a file in "
                f"`vision.weights`, or set `vision.pretrained: false` to start untrained."
            )
        side = self.side_px or _side_of(source.settings)
        sized = {**source.settings["vision_cfg"], "image_size": side}
        settings = {**source.settings, "vision_cfg": sized}
        try:
            tower = _built(settings)
            if self.pretrained:
                _read_into(tower, source, side)
            facts = self._facts(tower, source, settings, side)
        except ConfigError:
            raise
        except Exception as error:  # whatever a network raises, the size does not work
            raise ConfigError(
                f"{self.checkpoint} cannot be used at vision.side_px {side}: "
                f"{' '.join(str(error).split())[:300]}. Its own side is "
                f"{_side_of(source.settings)}; leave vision.side_px out."
            ) from error
        return self._encoder(tower.to(dtype or torch.float32), facts)

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> VisionEncoder:
        """Build the tower from what its facts hold, without reading weights."""
        if facts.tower is None:
            raise ConfigError("An open_clip encoder needs `tower` in its facts. Save it again.")
        return self._encoder(_built(facts.tower), facts)

    def _encoder(self, tower: nn.Module, facts: VisionFacts) -> OpenClipVisionEncoder:
        return OpenClipVisionEncoder(tower.eval(), facts, _feature(self.layer, norm=self.norm))

    def _facts(
        self, tower: nn.Module, source: _Source, settings: dict[str, Any], side: int
    ) -> VisionFacts:
        """Probe the tower at `side`."""
        features = run_shapes(tower, _feature(self.layer, norm=self.norm), (1, 3, side, side))
        _, width, rows, columns = features.shape
        said = source.preprocess
        return VisionFacts(
            width=width,
            side=(side, side),
            grid=(rows, columns),
            stride=max(1, side // rows),
            mean=self.mean or tuple(said.get("mean") or _MEAN),
            std=self.std or tuple(said.get("std") or _STD),
            resample=self.resample,
            feature=f"forward_intermediates[{self.layer}]{' (norm)' if self.norm else ''}",
            tower=settings,
        )


class OpenClipVisionEncoder(VisionEncoder):
    """Runs an image tower of open_clip and packs one of its maps.

    Shapes:
        pixels:  ``(tiles, 3, height, width)``, normalised
        returns: values ``(tiles · rows · columns, width)``
    """

    def __init__(
        self, tower: nn.Module, facts: VisionFacts, feature: Callable[[Any, Tensor], Tensor]
    ) -> None:
        super().__init__(facts)
        self.tower = tower
        self._feature = feature

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode tiles."""
        size = Size(*pixels.shape[-2:])
        self.facts.out_grid(size)  # refuses a size that the tower does not take
        dtype = next(self.tower.parameters()).dtype
        features = self._feature(self.tower, pixels.to(dtype))
        return pack_tokens(features.flatten(2).transpose(1, 2), self.facts, size)

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters after the chosen map."""
        idle = idle_parameters(self.tower, self._feature, (1, 3, *self.facts.side))
        return frozenset(f"tower.{name}" for name in idle)


class _Source(NamedTuple):
    """Where a tower comes from."""

    settings: dict[str, Any]
    preprocess: dict[str, Any]
    weights: str | None


def _source_of(checkpoint: str, weights: str | None) -> _Source:
    """Find config and weights of a checkpoint."""
    if find_spec("open_clip") is None:
        raise MissingExtraError(
            "open_clip", needed_for="vision: {use: open_clip}", extra="encoders"
        )
    library: Any = import_module("open_clip")
    known = library.get_model_config(checkpoint)
    if known is not None:
        found = None if weights is None else locate(weights, origin="vision.weights")
        return _Source(_settings(known), {}, found)
    place = locate(checkpoint, origin="vision.checkpoint")
    try:
        values = json.loads(Path(_file(place, _CONFIG)).read_text(encoding="utf-8"))
        settings = _settings(values["model_cfg"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"vision.checkpoint {checkpoint!r} is neither an architecture of open_clip "
            f"{library.__version__} nor a folder or repository with {_CONFIG}: {error}"
        ) from None
    if weights is not None:
        return _Source(settings, values.get("preprocess_cfg", {}), locate(weights))
    return _Source(settings, values.get("preprocess_cfg", {}), _first_weights(place))


def _settings(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Return what the image tower alone is built from."""
    return {
        "embed_dim": model_cfg["embed_dim"],
        "vision_cfg": {**model_cfg["vision_cfg"], "timm_model_pretrained": False},
        "quick_gelu": bool(model_cfg.get("quick_gelu", False)),
    }


def _file(place: str, name: str) -> str:
    """Return a file of a folder, or of a repository on the Hub."""
    if Path(place).is_dir():
        return str(Path(place) / name)
    from huggingface_hub import hf_hub_download

    return hf_hub_download(place, name)


def _first_weights(place: str) -> str | None:
    for name in _WEIGHTS:
        try:
            path = _file(place, name)
        except OSError:
            continue
        if Path(path).is_file():
            return path
    return None


def _side_of(settings: dict[str, Any]) -> int:
    side = settings["vision_cfg"].get("image_size", 224)
    return int(side[0] if isinstance(side, list | tuple) else side)


def _built(settings: dict[str, Any]) -> nn.Module:
    """Build an untrained image tower."""
    if find_spec("open_clip") is None:
        raise MissingExtraError(
            "open_clip", needed_for="vision: {use: open_clip}", extra="encoders"
        )
    model: Any = import_module("open_clip.model")
    # The public builder makes the text tower as well, which may have to be fetched.
    return model._build_vision_tower(
        settings["embed_dim"], settings["vision_cfg"], settings["quick_gelu"]
    ).eval()


def _read_into(tower: nn.Module, source: _Source, side: int) -> None:
    """Read the weights of the image tower, and resize its positions where the side differs."""
    assert source.weights is not None  # `load` has seen to it
    state = read_tensors(Path(source.weights), source.weights)
    own = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
    wanted = tower.state_dict()
    lacking = sorted(set(wanted) - set(own))
    if lacking:
        raise ConfigError(
            f"{source.weights} lacks {len(lacking)} tensors of the image tower "
            f"({_PREFIX}{lacking[0]} …). It is no checkpoint of this architecture."
        )
    old = _side_of(source.settings)
    for name, weight in wanted.items():
        if own[name].shape != weight.shape:
            patch = side / round((weight.shape[-2] - 1) ** 0.5)
            grids = [(round(px / patch), round(px / patch)) for px in (old, side)]
            own[name] = resize_table(own[name], grids[0], grids[1], weight.shape, name=name)
    tower.load_state_dict({name: own[name] for name in wanted})


def _feature(layer: int, *, norm: bool) -> Callable[[Any, Tensor], Tensor]:
    """Return the function from tower and pixels to a map ``(tiles, width, rows, columns)``."""

    def feature(tower: Any, pixels: Tensor) -> Tensor:
        found = tower.forward_intermediates(
            pixels,
            indices=-layer if layer < 0 else [layer],
            normalize_intermediates=norm,
            intermediates_only=True,
            output_fmt="NCHW",
        )
        return found["image_intermediates"][0]

    return feature
