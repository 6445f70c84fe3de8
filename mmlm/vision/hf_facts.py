"""What has to be known about transformers to load an image tower of it.

Where a tower sits in a joint checkpoint, how its config spells sides and patches, how its
image processor normalises, and how maps of features are laid out. Where a family breaks a
rule it gets one row of facts here, and no branch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES
from transformers.utils import logging

from mmlm.errors import ConfigError
from mmlm.features import Size

UNFIT: dict[str, str] = {
    "vit_mae": (
        "hides most patches and shuffles the others, so that its features have no places; use "
        "timm's weights of the same name, such as vit_base_patch16_224.mae"
    ),
}
"""Towers that this encoder cannot run, and why."""

OF_CLIPS = ("videomae", "vivit", "xclip_vision_model", "timesformer")
"""Towers that take several frames at once; `mmlm.vision.hf_clips` runs most of them."""

PREFIX_OF = {"dinov3_convnext": 1, "pvt": 1}
"""Tokens before the places of a map, for towers that are no ViT and put some there."""

OF_PATCHES = ("qwen2_5_vl_vision",)
"""Towers that take the patches of all pictures in one row; `mmlm.vision.qwen_vit` runs them."""

PROCESSOR_OF = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "dinov2": "bit",
    "dinov2_with_registers": "bit",
    "mlcd_vision_model": "clip",
    "aimv2_vision_model": "clip",
    "tipsv2_vision_model": "siglip",
    "siglip2_vision_model": "siglip2",
    "qwen2_5_vl_vision": "qwen2_5_vl",
}
"""Whose image processor to ask for mean and deviation, where a folder has none of its own."""

KEYS_OF = {"qwen2_5_vl_vision": {r"^(model\.)?visual\.": ""}}
"""Where the weights of a tower stand in a joint checkpoint, where transformers does not know."""

_OF_PIXELS = ("num_channels", "image_size", "in_channels", "patch_size")
_OF_JOINT_MODELS = (
    "text_config", "vision_config", "decoder", "encoder", "backbone_config", "vocab_size",
    "audio_config", "sampling_rate", "num_mel_bins", "prediction_length",
)  # fmt: skip
_CODES_OF_PICTURES = ("beit", "flava_image_model")
"""Towers whose `vocab_size` counts the codes of pictures, not words."""

_RESAMPLE = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class PixelFacts(NamedTuple):
    """How pixels are resized and normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str


@cache
def image_model_types() -> tuple[str, ...]:
    """Return the model types of transformers whose configs speak of pixels alone.

    By their configs: importing every model would take half a minute. Towers of joint models that
    can be built alone are among them. A few turn out to be no encoder when they are built.
    """
    public, found = set(dir(transformers)), list[str]()
    for model_type, name in CONFIG_MAPPING_NAMES.items():
        if model_type not in MODEL_MAPPING_NAMES and _model_name(name) not in public:
            continue
        try:
            config: Any = CONFIG_MAPPING[model_type]()
        except Exception:  # a config that needs arguments or a package is none of ours
            continue
        words = {"vocab_size"} if model_type in _CODES_OF_PICTURES else set[str]()
        joint = any(hasattr(config, name) for name in _OF_JOINT_MODELS if name not in words)
        if not joint and any(hasattr(config, name) for name in _OF_PIXELS):
            found.append(model_type)
    return tuple(found)


def load_tower(
    checkpoint: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    choose: Callable[[PretrainedConfig, PretrainedConfig], Any] | None = None,
) -> PreTrainedModel:
    """Load the image tower of a checkpoint, alone, with all of its weights.

    Args:
        checkpoint: A folder or a Hub id.
        revision: Branch, tag or commit on the Hub.
        dtype: Type of the weights.
        choose: Names the class, given the config of the checkpoint and that of the tower in it;
            by default the bare model.

    Raises:
        ConfigError: if there is none, or weights are missing.
    """
    try:
        whole = AutoConfig.from_pretrained(checkpoint, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"vision.checkpoint {checkpoint!r} cannot be read: {error}") from None
    config = vision_part_of(whole, checkpoint)
    tower_class: Any = class_of(config) if choose is None else choose(whole, config)
    try:
        with _quiet():  # that a text tower beside it is left out is meant
            tower, report = tower_class.from_pretrained(
                checkpoint, revision=revision, config=config, dtype=dtype,
                output_loading_info=True, key_mapping=KEYS_OF.get(config.model_type),
            )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"vision.checkpoint {checkpoint!r} cannot be loaded: {error}") from None
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise ConfigError(
            f"{checkpoint} lacks {len(missing)} weights of its {config.model_type} tower "
            f"({', '.join(missing[:3])} …), which would stay random. It is not a checkpoint of "
            f"this tower; name one that is."
        )
    return tower


def vision_part_of(config: PretrainedConfig, name: str) -> PretrainedConfig:
    """Return the config of the image tower: the config itself, or the one inside it.

    Raises:
        ConfigError: if this is no image encoder, or one that does not fit.
    """
    inner = getattr(config, "vision_config", None)
    found = inner if isinstance(inner, PretrainedConfig) else config
    if reason := UNFIT.get(found.model_type):
        raise ConfigError(f"The {found.model_type} of {name} {reason}.")
    if found.model_type not in OF_PATCHES and not _takes_pixels(class_of(found)):
        raise ConfigError(
            f"{name} is a {found.model_type}, which is no image encoder: its model takes "
            f"{getattr(class_of(found), 'main_input_name', 'no pixels')!r}. Name a CLIP, SigLIP, "
            f"DINOv2 or another tower that takes pixel_values."
        )
    return found


def _takes_pixels(tower_class: type[PreTrainedModel]) -> bool:
    """Whether a model's input is pixels: it says so, or its first argument is called so."""
    names = list(signature(tower_class.forward).parameters)[1:2]
    return "pixel_values" in (getattr(tower_class, "main_input_name", None), *names)


def class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the bare model that belongs to a config."""
    if type(config) in MODEL_MAPPING:
        found: Any = MODEL_MAPPING[type(config)]
    else:
        found = getattr(transformers, _model_name(type(config).__name__), None)
        found = found or _only_class_of(type(config))
    if found is None or isinstance(found, (tuple, list)):
        raise ConfigError(
            f"transformers {transformers.__version__} has no single bare model for "
            f"{config.model_type!r}. Name the checkpoint of an image tower."
        )
    return found


def _only_class_of(config_class: type[PretrainedConfig]) -> type[PreTrainedModel] | None:
    """Return the one model beside a config that is built from it, whatever it is called.

    Some releases give the tower of a joint model a name of its own and do not export it.
    """
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    if not name.startswith("transformers.models.") or find_spec(name) is None:
        return None
    built_from = [
        each
        for each in vars(import_module(name)).values()
        if isinstance(each, type)
        and issubclass(each, PreTrainedModel)
        and each.config_class is config_class
    ]
    return built_from[0] if len(built_from) == 1 else None


def _model_name(config_name: str) -> str:
    """Return the name of the bare model of a config's class."""
    return config_name.replace("Config", "Model")


def new_tower(config: PretrainedConfig) -> PreTrainedModel:
    """Build an untrained tower."""
    if type(config) in MODEL_MAPPING:
        return AutoModel.from_config(config).eval()
    tower_class: Any = class_of(config)
    return tower_class._from_config(config).eval()


def config_at(config: PretrainedConfig, side: Size) -> PretrainedConfig:
    """Return the same config for another side."""
    values = config.to_dict()
    old = values.get("image_size")
    values["image_size"] = list(side) if isinstance(old, (list, tuple)) else side.height
    model_type = values.pop("model_type")
    return AutoConfig.for_model(model_type, **values)


def side_of(config: PretrainedConfig) -> Size | None:
    """Return the side that a config names, if it names one."""
    side = getattr(config, "image_size", None)
    if isinstance(side, int):
        return Size(side, side)
    return Size(*side) if isinstance(side, (list, tuple)) and len(side) == 2 else None


def patch_of(config: PretrainedConfig) -> int | None:
    """Return the side of a patch that a config names, if it names one."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, (list, tuple)) and len(set(patch)) == 1:
        patch = patch[0]
    return patch if isinstance(patch, int) else None


def channels_of(config: PretrainedConfig) -> int:
    """Return how many channels a pixel has."""
    channels = getattr(config, "num_channels", 3)
    return channels if isinstance(channels, int) else 3


def pixel_facts(checkpoint: str | None, revision: str | None, model_type: str) -> PixelFacts:
    """Return how pictures are resized and normalised for a checkpoint.

    The checkpoint's own image processor decides; without one, the defaults of the family's.

    Raises:
        ConfigError: if neither is there.
    """
    values: dict[str, Any] = {}
    if checkpoint is not None:
        try:
            values, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint, revision=revision)
        except OSError:
            values = {}
    default = _processor_defaults(model_type)
    mean, std = (values.get(key) or default.get(key) for key in ("image_mean", "image_std"))
    if mean is None or std is None:
        raise ConfigError(
            f"Nothing says how to normalise pixels for {checkpoint or model_type}: it has no "
            f"preprocessor_config.json. Set vision.mean and vision.std."
        )
    if values.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    resample = values.get("resample", default.get("resample"))
    name = _RESAMPLE.get(int(resample)) if resample is not None else "bicubic"
    return PixelFacts(_channels(mean), _channels(std), name or "bicubic")


def map_layout(features: Tensor, side: Size) -> tuple[tuple[int, int], int, int]:
    """Return grid, no prefix, and width of a map ``(tiles, ?, ?, ?)``.

    Channels stand first or last; the grid has the picture's proportions.
    """
    _, first, middle, last = features.shape
    if middle * side.width == last * side.height:
        return (middle, last), 0, first
    return (first, middle), 0, last


def map_to_tokens(features: Tensor, width: int) -> Tensor:
    """Turn a map with channels first or last into ``(tiles, places, width)``."""
    if features.shape[1] == width:
        return features.flatten(2).transpose(1, 2)
    return features.flatten(1, 2)


def _processor_defaults(model_type: str) -> dict[str, Any]:
    """Return the class defaults of the image processor of a family; empty if it has none."""
    names: Any = IMAGE_PROCESSOR_MAPPING_NAMES.get(PROCESSOR_OF.get(model_type, model_type))
    for name in names.values() if isinstance(names, dict) else names or ():
        found = getattr(transformers, name or "", None)
        if found is not None and getattr(found, "image_mean", None) is not None:
            keys = ("image_mean", "image_std", "resample")
            return {key: getattr(found, key, None) for key in keys}
    return {}


@contextmanager
def _quiet() -> Generator[None]:
    """Silence transformers' report of weights that are not used."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _channels(values: Any) -> tuple[float, ...]:
    """Return one number for each of three channels."""
    return (float(values),) * 3 if isinstance(values, (int, float)) else tuple(map(float, values))
