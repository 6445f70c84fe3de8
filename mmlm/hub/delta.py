"""A small folder: what was learnt, beside the names of the parts that it was learnt on.

    delta.json          the composition, and where encoder and language model come from
    delta.safetensors   every tensor that differs from those parts: the connector, adapters, …
    tokenizer, template, card, recipe

A base part is named by Hub id and revision, by package, file and sha256, or by a path from this
folder; never by an absolute path. The hash of its tensors is noted, so that a delta is never put
on another base. What has no name (an untrained encoder) is stored whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mmlm.errors import CheckpointError, ConfigError
from mmlm.hub.aside import written_aside
from mmlm.hub.save import generation_config, portable, write_papers
from mmlm.hub.weights import check_weights, read_file, read_json, write_state
from mmlm.language import add_image_token, decoder_of, head_of, languages
from mmlm.language.four_bits import four_bit_layers, four_bit_state, quantise
from mmlm.language.routing import IMAGES, TEXT, route_by_token
from mmlm.modeling import MMLMConfig, MMLMForConditionalGeneration
from mmlm.processing import MMLMProcessor
from mmlm.storage.parts import PREFIX, PackageFile
from mmlm.vision import encoders

FILE, STEM = "delta.json", "delta"
FORMAT = 1
VISION, LANGUAGE, HEAD = "model.vision.", "model.language.", "lm_head."
PREFIXES = {"vision": VISION, "language": LANGUAGE}


@dataclass(frozen=True)
class Base:
    """A base part, loaded again: its tensors by the joined model's names, and their hash."""

    state: dict[str, Tensor]
    fingerprint: str


def save_delta(
    model: MMLMForConditionalGeneration,
    processor: MMLMProcessor,
    folder: Path,
    *,
    recipe: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
) -> list[str]:
    """Write only what differs from the base parts.

    Returns:
        Why a part is stored whole, for each that is; usually empty.

    Raises:
        CheckpointError: if the folder cannot be written, or a base part cannot be had again.
    """
    state, adapters = _plain_names(model)
    quantised = four_bit_layers(model)
    bases: dict[str, Any] = {}
    reasons: list[str] = []
    learnt = dict(state)
    for part in ("vision", "language"):
        source = dict((model.config.sources or {}).get(part) or {})
        if not any(key.startswith(PREFIXES[part]) for key in state):
            continue  # raw patches have no weights
        if not _has_name(part, source):
            reasons.append(f"the {part} part has no name from which it could be loaded again")
            continue
        base = _load_base(part, source, dtype=next(model.parameters()).dtype)
        same = [key for key, value in base.state.items() if _equal(state.get(key), value)]
        for key in [*same, *_same_in_four_bits(quantised, state, base)]:
            del learnt[key]
        bases[part] = {"source": _reference(source, folder), "sha256": base.fingerprint}
    with written_aside(folder) as aside:
        write_state(learnt, aside, stem=STEM)
        config = portable(model.config)
        config.dtype = next(model.parameters()).dtype
        values = {
            "format": FORMAT,
            "config": json.loads(config.to_json_string(use_diff=False)),
            "bases": bases,
            "adapters": adapters,
            "four_bits": quantised,
        }
        (aside / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        processor.save_pretrained(aside)
        generation_config(model, processor).save_pretrained(aside)
        write_papers(model, aside, "MMLM delta", recipe, notes or {}, None)
    return reasons


def load_delta(
    folder: Path, *, dtype: torch.dtype | None = None
) -> tuple[MMLMForConditionalGeneration, MMLMProcessor]:
    """Load the base parts, put what was learnt on them, and join them.

    Raises:
        CheckpointError: if the delta is damaged, or a base part is not there or another one.
    """
    from mmlm.hub.load import build, read_processor

    values = read_json(folder / FILE)
    for key, kind in (("config", dict), ("bases", dict)):
        if not isinstance(values.get(key), kind):
            raise CheckpointError(
                f"{folder / FILE}: `{key}` is missing or damaged. Copy or download it again."
            )
    manifest = read_json(folder / "mmlm.json")
    check_weights(folder, manifest.get("weights") or {})
    learnt: dict[str, Tensor] = {}
    files = sorted(folder.glob(f"{STEM}*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no {STEM}.safetensors: what was learnt is missing. Copy or download "
            f"the folder again."
        )
    for path in files:
        learnt |= read_file(path)
    config = MMLMConfig.from_dict(values["config"])
    wanted = getattr(torch, str(values["config"].get("dtype")), torch.float32)
    state: dict[str, Tensor] = {}
    for part, base in values["bases"].items():
        source = _resolved(base["source"], folder)
        loaded = _load_base(part, source, dtype=wanted)
        if loaded.fingerprint != base["sha256"]:
            raise CheckpointError(
                f"{folder}: the {part} part was learnt on another base than {_said(source)}: the "
                f"hash of its tensors differs. Give it the version that delta.json names."
            )
        state |= loaded.state
        config.sources = {**(config.sources or {}), part: source}
    plain = {key: value for key, value in learnt.items() if "lora_" not in key}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model = build(config, state | plain, dtype=dtype or wanted, origin=str(folder))
    if values.get("four_bits"):
        quantise(model, values["four_bits"])
    if values.get("adapters"):
        _put_adapters(model, values["adapters"], learnt, folder)
    processor = read_processor(folder, config)
    model.generation_config = GenerationConfig.from_dict(
        read_json(folder / "generation_config.json")
    )
    return model.eval(), processor


def _plain_names(
    model: MMLMForConditionalGeneration,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the tensors with adapters beside them, and the adapters' configs."""
    state = {key.replace(".base_layer.", "."): value for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    adapters: dict[str, dict[str, Any]] = {}
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        settings = {**config.to_dict(), "base_model_name_or_path": None}
        adapters[name] = json.loads(json.dumps(settings, default=_plain))
    return state, adapters


def _same_in_four_bits(layers: Sequence[str], state: Mapping[str, Tensor], base: Base) -> list[str]:
    """Return the tensors of layers in 4 bits, which the base's own weights become again.

    Raises:
        CheckpointError: if the weights had learnt before they were packed.
    """
    found: list[str] = []
    for layer in layers:
        weight = base.state.get(f"{layer}.weight")
        if weight is None:
            continue  # of another part
        packed = {f"{layer}.{key}": value for key, value in four_bit_state(weight).items()}
        if not all(_equal(state.get(key), value) for key, value in packed.items()):
            raise CheckpointError(
                f"{layer} is held in 4 bits and had learnt before that, so that no base gives its "
                f"weights again. Merge the adapters and save the whole model instead."
            )
        found += packed
    return found


def _plain(value: Any) -> Any:
    return (
        sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))
    )


def _put_adapters(
    model: MMLMForConditionalGeneration,
    adapters: Mapping[str, dict[str, Any]],
    learnt: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Add the adapters to a model and fill them."""
    try:
        from peft import PeftConfig
    except ImportError:
        from mmlm.errors import MissingExtraError

        raise MissingExtraError("peft", needed_for="A delta with adapters", extra="train") from None
    for name, settings in adapters.items():
        settings = {**settings, "inference_mode": True}
        model.add_adapter(PeftConfig.from_peft_type(**settings), adapter_name=name)
    if {TEXT, IMAGES} <= set(adapters):
        route_by_token(model)
    values = {key: value for key, value in learnt.items() if "lora_" in key}
    there = {key for key in model.state_dict() if "lora_" in key}
    if there != set(values):
        odd = sorted(there ^ set(values))
        raise CheckpointError(
            f"{folder}: the adapters of {FILE} and the stored tensors disagree, as in {odd[0]}. "
            f"Copy or download the folder again."
        )
    model.load_state_dict(values, strict=False)
    dtype = model.lm_head.weight.dtype  # PEFT makes adapters in float32 beside weights in bfloat16
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def _has_name(part: str, source: Mapping[str, Any]) -> bool:
    """Whether a part can be loaded again by what is known of it."""
    if not source.get("checkpoint"):
        return False
    return part != "vision" or source.get("pretrained", True) or bool(source.get("weights"))


def _load_base(part: str, source: dict[str, Any], *, dtype: torch.dtype) -> Base:
    try:
        if part == "vision":
            encoder = encoders.read(source, origin="the encoder").load().to(dtype)
            state = {VISION + key: value for key, value in encoder.state_dict().items()}
        else:
            causal, tokenizer = languages.read(source, origin="the language model").load()
            add_image_token(tokenizer, causal)
            causal = causal.to(dtype)
            state = {LANGUAGE + k: v for k, v in decoder_of(causal).state_dict().items()}
            state |= {HEAD + k: v for k, v in head_of(causal).state_dict().items()}
    except ConfigError as error:
        raise CheckpointError(
            f"The base part {part} ({_said(source)}) cannot be loaded again: {error} A delta needs "
            f"it; save the whole model instead, or bring the part back."
        ) from error
    return Base(state, fingerprint(state))


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return a hash of names, shapes, types and bytes of tensors."""
    digest = sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def _equal(one: Tensor | None, other: Tensor) -> bool:
    if one is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.detach().cpu(), other.detach().cpu())


def _reference(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a source without paths of this machine: what is a path becomes a relative one."""
    named = dict(source)
    for key in ("checkpoint", "weights"):
        value = named.get(key)
        if not isinstance(value, str):
            continue
        if value.startswith(PREFIX):
            found = PackageFile.parse(value, origin=key)
            if found.path().is_file():  # of a folder, the hash of the tensors says enough
                named[f"{key}_sha256"] = found.pinned().sha256
        elif Path(value).exists():
            named[key] = {"path": os.path.relpath(Path(value).absolute(), folder.absolute())}
    return named


def _resolved(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a source as the registries read it, paths made whole from the delta's folder."""
    named = dict(source)
    for key in ("checkpoint", "weights"):
        value, pinned = named.get(key), named.pop(f"{key}_sha256", None)
        if isinstance(value, dict):
            named[key] = str((folder.absolute() / str(value.get("path"))).resolve())
        elif pinned is not None:
            try:
                found = PackageFile.parse(str(value), origin=key)
                found.model_copy(update={"sha256": pinned}).path()
            except ConfigError as error:
                raise CheckpointError(f"{folder}: {error}") from error
    return named


def _said(source: Mapping[str, Any]) -> str:
    return str(source.get("weights") or source.get("checkpoint"))
