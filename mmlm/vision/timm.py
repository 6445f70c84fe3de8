"""The encoder `timm`: any model of timm that has `forward_intermediates`.

The network is held in transformers' `TimmWrapperModel`, so that its weights have the names
that stock classes give them. Two features are offered, because families differ: `intermediate`
goes through `forward_intermediates`, which gives clean maps for every family; `final` is
`forward_features`, which includes the convolutional head of families that end in one
(EfficientNet: 320 channels before it, 1280 after) and is what FastVLM and PerceptionLM take.

Reading weight files is done by `mmlm.vision.timm_weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mmlm.errors import ConfigError, MissingExtraError
from mmlm.features import Grid, Size, VisionFeatures
from mmlm.vision.base import VisionConfig, VisionEncoder, VisionFacts, encoders, pack_tokens
from mmlm.vision.channels import for_channels
from mmlm.vision.probe import count_grid, idle_parameters, run_shapes, wrong_size
from mmlm.vision.timm_weights import ModelWords, load_weights, words_of

_NORMED = "forward_intermediates(norm)"
_RESAMPLE = {"bilinear": "bilinear", "bicubic": "bicubic", "lanczos": "lanczos"}


@encoders.register("timm")
class TimmVisionConfig(VisionConfig):
    """A model of timm, by name."""

    checkpoint: str
    """timm's name, such as `vit_base_patch16_siglip_224`, or `hf-hub:` with a Hub id."""

    weights: str | None = None
    """A weight file to read instead of timm's own: a path, or `package:NAME/FILE`."""

    pretrained: bool = True
    """Whether timm's weights are loaded; false leaves the network untrained."""

    feature: Literal["intermediate", "final"] = "intermediate"
    """`intermediate` is a map between blocks, after the norm; `final` is `forward_features`."""

    layer: int = -1
    """Which intermediate: -1 is the last block, or the last stage of a hierarchical network."""

    layers: tuple[int, ...] = ()
    """Further intermediates, for a connector that reads several blocks or stages."""

    side_px: int | None = Field(default=None, ge=1)
    """Side of the pictures in pixels; by default that of the weights."""

    channels: int | None = Field(default=None, ge=1)
    """Channels of a pixel; other than three, the stem is spread over them."""

    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of timm's network, such as {patch_size: 8} or {depth: 6}; weights are resampled
    where timm can."""

    prefix: Literal["drop", "drop_first", "keep_as_tokens"] = "drop"
    """What becomes of CLS and registers."""

    mean: tuple[float, ...] | None = None
    """Mean of each channel; by default what timm says."""

    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; by default what timm says."""

    resample: str | None = None
    """How pictures are resized; by default as timm says."""

    def load(self, *, dtype: torch.dtype | None = None) -> TimmVisionEncoder:
        """Build the network, read its weights, and probe it."""
        _need_timm()
        words = words_of(self.checkpoint)
        if self.arguments:
            words = words._replace(model_args=words.model_args | self.arguments)
        if self.channels is not None:
            words = words._replace(model_args=words.model_args | {"in_chans": self.channels})
        side = Size(*words.side) if self.side_px is None else Size(self.side_px, self.side_px)
        tower = self._tower(words, side)
        if self.weights is not None or self.pretrained:
            load_weights(tower.timm_model, self.checkpoint, self.weights, tower.config.model_args)
        facts = self._facts(tower, words, side)
        tower.config.hidden_size = facts.width
        return self._encoder(tower.to(dtype or torch.float32), facts)

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> TimmVisionEncoder:
        """Build the network from its config, without reading weights."""
        _need_timm()
        if tower_config is None:
            raise ConfigError("A timm encoder needs its `vision_config`. Save the model again.")
        tower = _wrapper(tower_config["architecture"], tower_config.get("model_args") or {})
        tower.config.hidden_size = facts.width
        return self._encoder(tower, facts)

    def _encoder(self, tower: Any, facts: VisionFacts) -> TimmVisionEncoder:
        """Join a network and what is known about it."""
        norm = facts.feature.startswith(_NORMED)
        feature = self._feature(norm=norm)
        if not self.layers:
            return TimmVisionEncoder(tower.eval(), facts, lambda *seen: [feature(*seen)])
        if self.feature == "final":
            raise ConfigError(
                "vision.layers names blocks or stages, and `feature: final` is behind them. Use "
                "`feature: intermediate`."
            )
        together = _intermediates((self.layer, *self.layers), norm=norm)
        return TimmVisionEncoder(tower.eval(), facts, together)

    def _feature(self, *, norm: bool) -> Callable[[Any, Tensor], Tensor]:
        """Return the function from tower and pixels to a map or tokens."""
        return _final if self.feature == "final" else _intermediate(self.layer, norm=norm)

    def _tower(self, words: ModelWords, side: Size) -> Any:
        """Build the network for a side, or say which sides it takes."""

        def attempt(side_px: int, device: str) -> Any:
            """Build the network at a side and run it by shapes, in each way that timm knows."""
            at = Size(side_px, side_px)
            fault: Exception | None = None
            for sizing in ({}, {"img_size": side_px}):
                if not sizing and at != words.side and words.fixed_side:
                    continue
                try:
                    with torch.device(device):
                        tower = _wrapper(words.architecture, words.model_args | sizing)
                    self._facts(tower, words, at)
                    return tower
                except ConfigError:
                    raise
                except Exception as error:  # whatever a network raises, the size does not work
                    fault = fault or error
            raise fault or ValueError("timm builds it at one size alone")

        def takes(side_px: int) -> bool:
            try:
                return attempt(side_px, "meta") is not None
            except Exception:  # see `attempt`
                return False

        try:
            return attempt(side.height, "cpu")
        except ConfigError:
            raise
        except Exception as error:  # see `attempt`
            near = round(side.height / 32) * 32
            candidates = [near, near + 32, near - 32, words.side[0], 224, 256, 384, 448]
            raise wrong_size("vision.side_px", side.height, error, takes, candidates) from error

    def _probe(self, tower: Any, side: Size) -> _Probe:
        """Run the network by shapes; find out what it gives."""
        shape = (1, _channels(tower), *side)
        norm = self.feature == "intermediate"
        try:
            features = run_shapes(tower, self._feature(norm=norm), shape)
        except AssertionError as error:
            if not norm or "norm" not in str(error):
                raise
            norm = False  # Hiera and others have no norm to apply between stages
            features = run_shapes(tower, self._feature(norm=False), shape)
        num_prefix = 0
        if isinstance(features, Tensor) and features.ndim == 4:
            _, width, rows, columns = features.shape
            grid = (rows, columns)
        elif isinstance(features, Tensor) and features.ndim == 3:
            num_prefix = int(getattr(tower.timm_model, "num_prefix_tokens", 0) or 0)
            width, places = features.shape[2], features.shape[1] - num_prefix
            grid, _ = count_grid(places, side, None, origin=self.checkpoint)
        else:
            grid, width = (0, 0), 0
        if grid[0] * grid[1] < 2:
            raise ConfigError(
                f"vision.feature {self.feature!r} of {self.checkpoint} is no map of features at "
                f"{side.height} x {side.width} pixels. Use `feature: intermediate`, or a larger "
                f"vision.side_px."
            )
        return _Probe(grid, num_prefix, width, norm)

    def _facts(self, tower: Any, words: ModelWords, side: Size) -> VisionFacts:
        """Probe the network at `side`."""
        grid, num_prefix, width, norm = self._probe(tower, side)
        stride = _stride(tower.timm_model, self.layer, side, grid)
        if grid[0] * stride < side.height and side != words.side:
            lost = side.height - grid[0] * stride
            raise ValueError(f"its patches of {stride} would leave out {lost} rows of pixels")
        kept = {"drop": 0, "drop_first": max(0, num_prefix - 1), "keep_as_tokens": num_prefix}
        name = f"{_NORMED if norm else 'forward_intermediates'}[{self.layer}]"
        return VisionFacts(
            width=width,
            side=(side.height, side.width),
            grid=grid,
            patch=stride if stride == _patch(tower.timm_model) else None,
            stride=stride,
            num_prefix=num_prefix,
            kept_prefix=kept[self.prefix],
            channels=_channels(tower),
            mean=self.mean or for_channels(words.mean, _channels(tower)),
            std=self.std or for_channels(words.std, _channels(tower)),
            resample=self.resample or _RESAMPLE.get(words.interpolation, "bicubic"),
            rule="multiple" if self._follows_size(tower, stride) else "fixed",
            step=stride,
            feature="final" if self.feature == "final" else name,
            num_layers=len(self.layers),
        )

    def _follows_size(self, tower: Any, stride: int) -> bool:
        """Say whether the network as it is takes any multiple of its stride."""
        try:
            grids = [
                self._probe(tower, Size(rows * stride, columns * stride)).grid == (rows, columns)
                for rows, columns in ((5, 5), (6, 9), (11, 7))
            ]
        except Exception:  # whatever a network raises, the size does not work
            return False
        return all(grids)


class _Probe(NamedTuple):
    """What a network gives at one side."""

    grid: tuple[int, int]
    num_prefix: int
    width: int
    norm: bool


class TimmVisionEncoder(VisionEncoder):
    """Runs a network of timm and packs one of its maps.

    Args:
        tower: A `TimmWrapperModel`.
        facts: What was probed.
        features: From tower and pixels to a map ``(tiles, width, rows, columns)``, or to tokens
            ``(tiles, num_prefix + places, width)``; and a map for each of `layers`.

    Shapes:
        pixels:  ``(tiles, channels, height, width)``, normalised
        returns: values ``(tiles · rows · columns, width)``
    """

    def __init__(
        self,
        tower: Any,
        facts: VisionFacts,
        features: Callable[[Any, Tensor], list[Tensor]],
    ) -> None:
        super().__init__(facts)
        self.tower = tower
        self._features = features

    @property
    def tower_config(self) -> dict[str, Any]:
        """The wrapper's config as transformers writes it."""
        return self.tower.config.to_dict()

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode tiles."""
        size = Size(*pixels.shape[-2:])
        self.facts.out_grid(size)  # refuses a size that the network does not take
        features, *more = self.raw(pixels)
        if features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)
        packed = pack_tokens(features, self.facts, size)
        return replace(packed, layers=tuple(_pack_map(each) for each in more))

    def raw(self, pixels: Tensor) -> list[Tensor]:
        """Return the features and further layers as the network gives them."""
        given = pixels.to(self.tower.dtype)
        # EfficientNet takes half the time so, and rounds otherwise: in float32 the stock class's
        # own bits are worth more.
        if given.device.type == "cpu" and given.dtype != torch.float32:
            given = given.contiguous(memory_format=torch.channels_last)
        return self._features(self.tower, given)

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters after the chosen map."""
        shape = (1, self.facts.channels, *self.facts.side)

        def used(tower: Any, pixels: Tensor) -> Tensor:
            return torch.cat([each.flatten() for each in self._features(tower, pixels)])

        idle = idle_parameters(self.tower, used, shape)
        return frozenset(f"tower.{name}" for name in idle)


def _final(tower: Any, pixels: Tensor) -> Tensor:
    """Return `forward_features`: a map with channels first, or tokens with their prefix."""
    network = tower.timm_model
    features = network.forward_features(pixels)
    if not isinstance(features, Tensor):  # CrossViT gives a list; the probe refuses it
        return features
    if features.ndim == 4 and getattr(network, "output_fmt", "NCHW") == "NHWC":
        return features.permute(0, 3, 1, 2)
    return features


def _intermediate(layer: int, *, norm: bool) -> Callable[[Any, Tensor], Tensor]:
    """Return the function for one intermediate map."""

    def feature(tower: Any, pixels: Tensor) -> Tensor:
        return _with_prefix(_run(tower.timm_model, pixels, _indices(layer), norm=norm)[0])

    return feature


def _intermediates(layers: tuple[int, ...], *, norm: bool) -> Callable[[Any, Tensor], list[Tensor]]:
    """Return the function for several maps in one run; only the first keeps its prefix."""

    def features(tower: Any, pixels: Tensor) -> list[Tensor]:
        count = len(tower.timm_model.feature_info)
        places = [layer if layer >= 0 else count + layer for layer in layers]
        for layer, place in zip(layers, places, strict=True):
            if not 0 <= place < count:
                raise ConfigError(
                    f"vision.layers {layer} is beyond this network, which has {count} "
                    f"intermediates: from {-count} to {count - 1}."
                )
        wanted = sorted(set(places))
        found = dict(zip(wanted, _run(tower.timm_model, pixels, wanted, norm=norm), strict=True))
        first, *more = (found[place] for place in places)
        maps = [each[0] if isinstance(each, tuple) else each for each in more]
        return [_with_prefix(first), *maps]

    return features


def _run(network: Any, pixels: Tensor, indices: Any, *, norm: bool) -> Any:
    """Run the network up to its intermediates: maps, or pairs of map and prefix tokens."""
    settings: dict[str, Any] = {"return_prefix_tokens": True} if _tells_prefix(network) else {}
    return network.forward_intermediates(
        pixels,
        indices=indices,
        norm=norm,
        output_fmt="NCHW",
        intermediates_only=True,
        **settings,
    )


def _with_prefix(picked: Any) -> Tensor:
    """Put prefix tokens before the places of a map."""
    if not isinstance(picked, tuple):
        return picked
    places, prefix = picked
    return torch.cat([prefix, places.flatten(2).transpose(1, 2)], dim=1)


def _pack_map(features: Tensor) -> VisionFeatures:
    """Pack a map ``(tiles, width, rows, columns)``."""
    tiles, width, rows, columns = features.shape
    values = features.permute(0, 2, 3, 1).reshape(-1, width)
    return VisionFeatures(values, (Grid(1, rows, columns),) * tiles)


def _tells_prefix(network: Any) -> bool:
    """Say whether a network has prefix tokens and hands them out beside an intermediate."""
    if not getattr(network, "num_prefix_tokens", 0):
        return False
    return "return_prefix_tokens" in signature(network.forward_intermediates).parameters


def _indices(layer: int) -> Any:
    """Return timm's words for one layer: the last n, or its index."""
    return -layer if layer < 0 else [layer]


def _wrapper(architecture: str, model_args: dict[str, Any]) -> Any:
    """Build an untrained `TimmWrapperModel`."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    config = TimmWrapperConfig(
        architecture=architecture, do_pooling=False, model_args=model_args or None
    )
    try:
        return TimmWrapperModel(config).eval()
    except ImportError as error:
        raise ConfigError(f"vision.checkpoint: {error}") from None


def _stride(network: Any, layer: int, side: Size, grid: tuple[int, int]) -> int:
    """Return how many pixels lie between two features: what timm says, if it fits the grid."""
    info = getattr(network, "feature_info", None)
    said = None
    if isinstance(info, list) and -len(info) <= layer < len(info):
        said = info[layer].get("reduction")
    for stride in (said, _patch(network)):
        if not isinstance(stride, int):
            continue
        if grid[0] in (side.height // stride, -(-side.height // stride)):
            return stride
    return max(1, side.height // grid[0])


def _patch(network: Any) -> int | None:
    """Return the side of a patch, for networks that cut the picture into patches."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, (tuple, list)) and patch else patch
    return patch if isinstance(patch, int) else None


def _channels(tower: Any) -> int:
    """Return how many channels a pixel has."""
    return int((tower.config.model_args or {}).get("in_chans", 3))


def _need_timm() -> None:
    if find_spec("timm") is None:
        raise MissingExtraError("timm", needed_for="vision: {use: timm}", extra="encoders")
