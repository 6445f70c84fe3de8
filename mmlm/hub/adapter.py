"""Folders of PEFT: thin matrices for a base, and modules that learnt whole beside them.

    adapter_config.json          names the base, rank, scale, layers
    adapter_model.safetensors    the matrices; `modules_to_save`, such as the connector

Read with its base, an adapter is worked into the weights, proven on the logits; several on one
base at once are the work of `mmlm serve --adapter`. Names may be those of MMLM's class or of
any stock class that MMLM reads. Written, a folder stands beside the stock folder that it is for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import CheckpointError, MissingExtraError
from mmlm.hub.save import save
from mmlm.hub.stock import match, stock_classes
from mmlm.hub.weights import PICKLED, read_file, read_json
from mmlm.language.adapters import merge_adapters, remove_adapters, save_adapters
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.processing import MMLMProcessor

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base"
CONNECTOR = "model.connector"
_PREFIX = "base_model.model."
_THIN = (".lora_A.", ".lora_B.", ".lora_magnitude_vector", ".lora_embedding_")


def is_adapter(folder: Path) -> bool:
    """Whether a folder is one of PEFT, and no model or delta beside it."""
    others = ("config.json", "delta.json")
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in others)


def base_of(folder: Path) -> Path | str:
    """Return where the base of an adapter is: a folder, or a Hub id.

    Raises:
        CheckpointError: if the folder names none.
    """
    named = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(
            f"{folder / CONFIG} names no base (`base_model_name_or_path`). Write there the folder "
            f"or Hub id of the model that the adapter learnt on."
        )
    for place in (folder / named, Path(named)):
        if place.is_dir():
            return place
    return named


def put_adapter(model: MMLMForConditionalGeneration, folder: Path) -> float:
    """Work an adapter into the weights of its base, in place.

    Args:
        model: The base.
        folder: The folder of PEFT.

    Returns:
        By how much merging moved the logits, relative to their size.

    Raises:
        CheckpointError: if a tensor has no place in this base, listing them, or is of another
            shape; or if merging moved the logits.
        MissingExtraError: if PEFT is not installed.
    """
    thin, whole = _tensors(model, folder)
    layers = sorted({key[: key.index(".lora_")] for key in thin})
    if layers:
        _add(model, folder, layers)
    own = dict(model.state_dict())
    places = {**{key: _stored(key) for key in thin}, **{key: _wrapped(key, own) for key in whole}}
    given = thin | whole
    _check(given, places, own, folder)
    filled = {places[key] for key in thin}
    if empty := sorted(key for key in own if ".lora_" in key and key not in filled):
        raise CheckpointError(
            f"{folder / WEIGHTS} lacks {len(empty)} matrices, such as {empty[0]}. Copy or "
            f"download the folder again."
        )
    with torch.no_grad():
        for key, value in given.items():
            own[places[key]].copy_(value)
    return merge_adapters(model) if layers else 0.0


def export_adapter(
    model: MMLMForConditionalGeneration, processor: MMLMProcessor, folder: Path
) -> None:
    """Write the adapters of a model as a folder of PEFT, and the base they are for beside them.

    Args:
        model: A model with adapters, such as a delta that was loaded; it loses them here.
        processor: Its processor.
        folder: Where to; the base is written into ``base`` in it.

    Raises:
        CheckpointError: if the model carries no adapters, or a folder cannot be written.
    """
    target = match(model.config).target

    def rename(name: str) -> str:
        if target is None:
            return name
        if name == CONNECTOR:
            first = f"{name}.{next(iter(model.get_submodule(name).state_dict()))}"
            theirs = rename(first)
            return theirs.rsplit(".", 1 if theirs.count(".") == 2 else 2)[0]
        (theirs,) = target.key_map(model.config).to_theirs({name: 0}, origin=name)
        return _in_memory(theirs)

    save_adapters(model, folder, base=BASE, carry=(CONNECTOR,), rename=rename)
    remove_adapters(model)
    save(model, processor, folder / BASE)


def _in_memory(name: str) -> str:
    """Return the name under which the class in memory holds what LLaVA publishes otherwise."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.", "model.vision_tower."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _tensors(
    model: MMLMForConditionalGeneration, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the thin matrices and the whole tensors under our names."""
    if not (folder / WEIGHTS).is_file():
        pickled = [path.name for path in folder.iterdir() if path.suffix in PICKLED]
        raise CheckpointError(
            f"{folder} holds no {WEIGHTS}"
            + (f" but {pickled[0]}, which is pickled and not opened" if pickled else "")
            + ". Save it again with `safe_serialization`, or download it."
        )
    state = {
        key.removeprefix(_PREFIX).replace(".modules_to_save.default.", "."): value
        for key, value in read_file(folder / WEIGHTS).items()
    }
    ours = _ours(state, model, folder)
    thin = {key: value for key, value in ours.items() if any(part in key for part in _THIN)}
    return thin, {key: value for key, value in ours.items() if key not in thin}


def _ours(
    state: dict[str, Tensor], model: MMLMForConditionalGeneration, folder: Path
) -> dict[str, Tensor]:
    """Return tensors under our names, from whichever class they were learnt on."""
    roots = {name.split(".")[0] + "." + name.split(".")[1] for name in model.state_dict()}
    if all(".".join(key.split(".")[:2]) in roots or key.startswith("lm_head") for key in state):
        return state
    faults: list[str] = []
    found = match(model.config).target
    for target in [found] if found else [stock_classes[name]() for name in stock_classes]:
        try:
            return target.to_ours(state, model.config, origin=str(folder / WEIGHTS))
        except CheckpointError as error:
            faults.append(str(error))
    raise CheckpointError(
        f"{faults[0]} The adapter learnt on another base than {type(model).__name__} of these "
        f"parts, or was saved under names that MMLM does not know."
    )


def _add(model: MMLMForConditionalGeneration, folder: Path, layers: list[str]) -> None:
    """Put empty matrices beside the layers, as the folder's config says."""
    try:
        from peft import PeftConfig
    except ImportError:
        raise MissingExtraError("peft", needed_for="Reading an adapter", extra="train") from None
    known = dict(model.named_modules())
    if absent := [name for name in layers if name not in known]:
        raise CheckpointError(
            f"{folder} has matrices for {len(absent)} layers that this base does not have, such "
            f"as {absent[0]}. It learnt on another base: name that one in {CONFIG}."
        )
    config: Any = PeftConfig.from_pretrained(str(folder))
    if getattr(config, "peft_type", None) != "LORA":
        raise CheckpointError(
            f"{folder / CONFIG}: peft_type is {config.peft_type}, of which MMLM reads LORA alone "
            f"(LoRA, DoRA). Load it with PEFT and merge it there."
        )
    config.target_modules, config.modules_to_save = set(layers), None
    config.exclude_modules = None
    config.init_lora_weights, config.inference_mode = True, False
    try:
        model.add_adapter(config, adapter_name="default")
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} does not fit this base: {str(error).splitlines()[0][:300]}. The "
            f"adapter learnt on another base, or the file is damaged."
        ) from error


def _stored(key: str) -> str:
    """Return where PEFT keeps a thin matrix inside a model."""
    if key.endswith(".lora_magnitude_vector"):
        return f"{key}.default.weight"
    stem, _, leaf = key.rpartition(".")
    return f"{stem}.default.{leaf}" if leaf == "weight" else f"{key}.default"


def _wrapped(key: str, own: dict[str, Tensor]) -> str:
    """Return the name of a whole tensor, whose layer may have matrices beside it now."""
    stem, _, leaf = key.rpartition(".")
    inner = f"{stem}.base_layer.{leaf}"
    return inner if key not in own and inner in own else key


def _check(
    given: dict[str, Tensor], places: dict[str, str], own: dict[str, Tensor], folder: Path
) -> None:
    """Refuse tensors without a place, or of another shape."""
    if lost := sorted(key for key in given if places[key] not in own):
        raise CheckpointError(
            f"{folder / WEIGHTS}: {len(lost)} of {len(given)} tensors have no place in the base: "
            f"{', '.join(lost[:5])}. The adapter learnt on another base."
        )
    for key, value in given.items():
        wanted = own[places[key]]
        if value.shape != wanted.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} has the shape {tuple(value.shape)}, and the base asks "
                f"for {tuple(wanted.shape)}. The adapter learnt on another base: name that one in "
                f"{folder / CONFIG}."
            )
