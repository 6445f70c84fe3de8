"""Adapters from stage to stage: put beside the weights, gone on with, or worked into them.

A stage whose words under `adapters:` are those of the stage before goes on with the same
adapters. One with others, or with none, begins by merging them: from then on the merged weights
count as learnt, and checkpoints hold them. What adapters are is known to
`mmlm.language.adapters`; what of them learns, to `mmlm.training.learning`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import CheckpointError, ConfigError, TrainingError
from mmlm.language.adapters import AdapterConfig, add_adapters, choose_layers, merge_adapters
from mmlm.training.learning import match_names
from mmlm.training.optim import stable_name
from mmlm.training.recipe import StageConfig
from mmlm.whole import WholeModel

_MARK, _BELOW = ".lora_", ".base_layer.weight"


def check_stages(model: Any, stages: Iterable[StageConfig]) -> None:
    """Read the `learn` and `adapters` of all stages against a model, before the first begins.

    Raises:
        ConfigError: if a pattern matches nothing, or adapters cannot be put where they should be.
        MissingExtraError: if the adapters of a stage need a package that is not installed.
    """
    plain = [name for name, _ in model.named_parameters()]
    for stage in stages:
        config = stage.adapter_config()
        try:
            if config is not None and len(config.ranks) > 1 and isinstance(model, WholeModel):
                raise ConfigError(
                    f"adapters {config.use} cannot be merged, and a stock class taken whole has no "
                    f"parts beside which a folder could keep them. Use lora."
                )
            layers = [] if config is None else choose_layers(model, config)
            kinds = [] if config is None else [*config.ranks]
            match_names(_names_with(plain, layers, kinds), stage.patterns)
        except ConfigError as error:
            raise ConfigError(f"stages.{stage.name}: {error}") from None


def _names_with(names: Sequence[str], layers: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """Return the names that parameters will have once adapters stand beside some layers."""
    tuned = set(layers)
    found: list[str] = []
    for name in names:
        layer, _, leaf = name.rpartition(".")
        found.append(f"{layer}.base_layer.{leaf}" if layer in tuned else name)
    for kind in kinds:
        found += [f"{layer}.lora_{ab}.{kind}.weight" for layer in layers for ab in "AB"]
    return found


def change_adapters(
    model: Any,
    masters: dict[str, Tensor],
    *,
    before: AdapterConfig | None,
    after: AdapterConfig | None,
    seed: int,
) -> str | None:
    """Bring a model from one stage's adapters to another's.

    Args:
        model: The joined model.
        masters: What has learnt so far, by stable name; merged weights are put in.
        before: The adapters that are there.
        after: Those that are wanted.
        seed: Begins their initialisation.

    Returns:
        What was done, in a line; None if nothing was.

    Raises:
        ConfigError: if the adapters cannot be put where they should be.
        TrainingError: if merging the earlier ones would change what the model says.
    """
    if before == after:
        return None
    done: list[str] = []
    if before is not None:
        done.append(
            f"those of the stage before merged, logits moved by {merge(model, masters):.0e}"
        )
    if after is not None:
        torch.manual_seed(seed)
        dtype = model.lm_head.weight.dtype
        layers = add_adapters(model, after)
        # In the precision of the weights beside them; the optimiser keeps float32 copies.
        for name, parameter in model.named_parameters():
            if _MARK in name:
                parameter.data = parameter.data.to(dtype)
        done.append(f"{after.use} of rank {after.rank} beside {len(layers)} layers")
    return ", ".join(done)


def merge(model: Any, masters: dict[str, Tensor]) -> float:
    """Work the adapters into the weights, and count these weights as learnt.

    The entries are the weights themselves, not copies: adapters on a large model stay cheap.
    """
    below = [stable_name(name) for name, _ in model.named_parameters() if _BELOW in name]
    try:
        difference = merge_adapters(model)
    except CheckpointError as error:
        raise TrainingError(
            f"{error} They are merged because this stage does not have the adapters of the stage "
            f"before: give it the same ones, or use run.precision fp32."
        ) from None
    for name in [name for name in masters if _MARK in name]:
        del masters[name]
    weights = {stable_name(name): parameter for name, parameter in model.named_parameters()}
    for name in below:
        masters[name] = weights[name].detach()
    return difference
