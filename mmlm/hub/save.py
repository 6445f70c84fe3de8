"""Writing a model: as a stock class where it equals one, as MMLM's own, or as a delta.

    model, processor ──► match ──► stock folder, asserted on logits   (save, save_stock)
                          └──────► MMLM folder                        (save_mmlm)
                     ──► what differs from the base parts             (mmlm.hub.delta)

Every folder is written aside and put in place whole. What stands where in a stock folder is
said in `mmlm.hub.classes`; how a folder is checked, in `mmlm.hub.parity`.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from mmlm.errors import CheckpointError
from mmlm.hub.aside import written_aside
from mmlm.hub.card import write_card
from mmlm.hub.parity import assert_same, listen, listen_to_folder, rounded_tables
from mmlm.hub.remote_code import add_code
from mmlm.hub.stock import COMPOSITION, StockClass, match, refuse
from mmlm.hub.weights import MANIFEST, hash_weights, write_state
from mmlm.language.routing import CANNOT_MERGE, is_routed
from mmlm.modeling import MMLMConfig, MMLMForConditionalGeneration
from mmlm.processing import MMLMProcessor

RECIPE = "recipe.resolved.yaml"
FORMAT = 1


def save(
    model: MMLMForConditionalGeneration,
    processor: MMLMProcessor,
    folder: Path,
    *,
    recipe: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
) -> list[str]:
    """Write the stock class where the composition equals one, else MMLM's own class.

    Args:
        model: The joined model.
        processor: Its processor.
        folder: Where to; an earlier model there stays whole until the new one is.
        recipe: The resolved recipe, kept in the folder.
        notes: What the card should say, see `mmlm.hub.card`.

    Returns:
        The conditions that kept it from a stock class; empty if it is one.

    Raises:
        CheckpointError: if the folder cannot be written, or does not answer like the model.
    """
    found = match(model.config)
    if found.target is None:
        save_mmlm(model, processor, folder, recipe=recipe, notes=notes)
        return found.reasons
    save_stock(model, processor, folder, target=found.target, recipe=recipe, notes=notes)
    return []


def save_stock(
    model: MMLMForConditionalGeneration,
    processor: MMLMProcessor,
    folder: Path,
    *,
    target: StockClass | None = None,
    recipe: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
) -> float:
    """Write a folder that is a class of transformers, and assert that it answers the same.

    Returns:
        The largest difference of a logit between both, relative to the largest logit.

    Raises:
        ConfigError: if the composition is not that class; names the conditions.
        CheckpointError: if the folder cannot be written, or does not answer like the model.
    """
    if target is None:
        found = match(model.config)
        if found.target is None:
            raise refuse(found.reasons, wanted="a class of transformers")
        target = found.target
    elif reasons := target.why_not(model.config):
        raise refuse(reasons, wanted=target.class_name)
    with written_aside(folder) as aside:
        config = target.stock_config(model.config)
        config.architectures = [target.class_name]
        _write_config(config, model, aside)
        state = target.with_words(own_state(model), model.config, processor.tokenizer)
        write_state(target.to_stock(state, model.config), aside)
        tokenizer = with_named_tokens(processor.tokenizer, target.named_tokens(processor))
        target.processor(model.config, processor, tokenizer).save_pretrained(aside)
        generation_config(model, processor).save_pretrained(aside)
        target.finish(aside)
        heard = listen_to_folder(aside, processor, model.device, target=target)
        apart = assert_same(
            listen(model, processor),
            heard,
            class_name=target.class_name,
            hint=rounded_tables(model),
        )
        write_papers(model, aside, target.class_name, recipe, notes or {}, apart)
    return apart


def save_mmlm(
    model: MMLMForConditionalGeneration,
    processor: MMLMProcessor,
    folder: Path,
    *,
    recipe: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
    with_code: bool = False,
) -> None:
    """Write a folder of MMLM's own class, which `import mmlm` teaches the Auto classes.

    Args:
        model: The joined model.
        processor: Its processor.
        folder: Where to.
        recipe: The resolved recipe, kept in the folder.
        notes: What the card should say.
        with_code: Whether the modules it needs travel along, so that the Auto classes load it
            with `trust_remote_code` where MMLM is not installed; then its answer is asserted.

    Raises:
        CheckpointError: if the folder cannot be written, or does not answer like the model.
    """
    with written_aside(folder) as aside:
        config = portable(model.config)
        config.architectures = [type(model).__name__]
        _write_config(config, model, aside)
        write_state(own_state(model), aside)
        processor.save_pretrained(aside)
        generation_config(model, processor).save_pretrained(aside)
        apart = None
        if with_code:
            add_code(aside)
            apart = assert_same(
                listen(model, processor),
                listen_to_folder(aside, processor, model.device, trust=True),
                class_name=f"{type(model).__name__} with its code",
                hint=rounded_tables(model),
            )
        write_papers(model, aside, type(model).__name__, recipe, notes or {}, apart)


def own_state(model: MMLMForConditionalGeneration) -> dict[str, Tensor]:
    """Return the model's tensors by name, each once: a tied head is left to its embedding.

    Raises:
        CheckpointError: if adapters are still beside the weights that they change.
    """
    state = model.state_dict()
    adapters = [key for key in state if ".base_layer." in key or "lora_" in key]
    if adapters and is_routed(model):
        raise CheckpointError(
            f"The model cannot be saved as one folder. {CANNOT_MERGE}. Save with `delta=True`, "
            f"which keeps them beside the base."
        )
    if adapters:
        raise CheckpointError(
            f"The model carries adapters that are not merged ({adapters[0]} and "
            f"{len(adapters) - 1} more), which no model class holds. Merge them, or save with "
            f"`delta=True`, which keeps them as adapters."
        )
    head = model.lm_head.weight
    if model.config.tie_word_embeddings and head is model.get_input_embeddings().weight:
        state.pop("lm_head.weight", None)
    return state


def with_named_tokens(tokenizer: Any, names: dict[str, str]) -> Any:
    """Return a copy of a tokenizer that knows the placeholder by name too, as processors ask."""
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        named = AutoTokenizer.from_pretrained(
            folder, extra_special_tokens=names, local_files_only=True
        )
    # What is generated in a batch must begin right behind its prompt.
    named.padding_side = "left"
    for trace in ("is_local", "local_files_only", "name_or_path"):
        named.init_kwargs.pop(trace, None)
    return named


def portable(config: MMLMConfig) -> MMLMConfig:
    """Return a copy of a config without paths of this machine."""
    copy = MMLMConfig.from_dict(config.to_dict())
    for inner in (copy, copy.text_config, copy.vision_config):
        if inner is not None:
            inner._name_or_path = ""  # pyright: ignore[reportPrivateUsage]
    copy.vision = without_paths(config.vision)
    copy.sources = without_paths(config.sources)
    copy.connector = without_paths(config.connector)
    return copy


def without_paths(values: Any) -> Any:
    """Return plain values in which a folder of this machine is only its name."""
    if isinstance(values, dict):
        return {key: without_paths(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_paths(value) for value in values]
    if isinstance(values, str) and (Path(values).is_absolute() or values.startswith(("./", "../"))):
        return Path(values).name
    return values


def _write_config(config: PretrainedConfig, model: Any, folder: Path) -> None:
    config.dtype = next(model.parameters()).dtype
    config.save_pretrained(folder)


def generation_config(
    model: MMLMForConditionalGeneration, processor: MMLMProcessor
) -> GenerationConfig:
    """Return what `answer` does: greedy, up to the end of the turn; nothing of the base."""
    stops = list(processor.chat.stop_ids)
    padding = processor.tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=stops[0] if padding is None else padding,
        do_sample=False,
    )


def write_papers(
    model: MMLMForConditionalGeneration,
    folder: Path,
    class_name: str,
    recipe: dict[str, Any] | None,
    notes: dict[str, Any],
    apart: float | None,
) -> None:
    """Write what people and `load` read beside the weights: manifest, recipe and card."""
    config = portable(model.config)
    composition = {key: getattr(config, key) for key in COMPOSITION}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "saved_as": class_name,
        "composition": composition,
        "weights": hash_weights(folder),
    }
    if apart is not None:
        manifest["parity"] = {"largest_relative_logit_difference": apart}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if recipe is not None:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        (folder / RECIPE).write_text(text, encoding="utf-8")
    write_card(folder, config, class_name=class_name, notes=notes, has_recipe=recipe is not None)
