"""Low-rank adapters on the language model, through PEFT: LoRA, DoRA, QLoRA and MM-LoRA.

    choose_layers     which layers a config puts adapters beside; says what is in the way
    add_adapters      put adapters beside the linear layers of the language part, and nowhere else
    adapters_off      the model as it was before them, for a while
    merge_adapters    work them into the weights, and prove it on the logits
    save_adapters     a folder that PEFT itself opens, the connector in `modules_to_save`

The connector is never wrapped: it learns as it is, under its own name. Written for any module
and the name of its language part. What learns, and at which rate, is decided in training.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from mmlm.config import PartConfig
from mmlm.errors import CheckpointError, ConfigError, MissingExtraError
from mmlm.language.four_bits import (
    compute_dtype,
    is_four_bit,
    load_bitsandbytes,
    quantise,
    unpacked,
)
from mmlm.language.routing import CANNOT_MERGE, IMAGES, TEXT, is_routed, route_by_token
from mmlm.registry import Registry

LANGUAGE = "model.language"
"""The language part of the joined model."""
_NAME = TEXT
# Layers whose weight the fused kernels of state-space models read past `forward`, on a GPU only.
_READ_BY_KERNELS = ("out_proj", "conv1d")
# Merging rounds each weight once. Largest relative difference of logits seen in float32: 3e-6; an
# adapter that is left out moves them by 1e-2 or more. bfloat16 keeps 8 bits of each weight.
_MERGE_FLOAT32, _MERGE_HALVES = 1e-4, 6e-2


class AdapterConfig(PartConfig):
    """Base of the adapters: a product of two thin matrices beside each chosen linear layer."""

    rank: int = Field(default=16, ge=1)
    """Rank of the product."""

    alpha: float | None = Field(default=None, gt=0)
    """The product is scaled by alpha / rank; twice the rank when left out."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the product, while training."""

    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which layers of the language model: all linear ones, or those with these names, such as
    [q_proj, v_proj]."""

    weight_decomposed: ClassVar[bool] = False
    quantised: ClassVar[bool] = False

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each product, by PEFT's name of it."""
        return {_NAME: self.rank}

    @property
    def scale(self) -> float:
        """The alpha that is used."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


adapters = Registry["AdapterConfig"]("adapter")
"""Kinds of adapters, by the name that recipes use."""


@adapters.register("lora")
class LoraAdapterConfig(AdapterConfig):
    """LoRA (Hu et al. 2021, arXiv 2106.09685)."""


@adapters.register("dora")
class DoraAdapterConfig(AdapterConfig):
    """DoRA: the direction of each weight is adapted apart from its length (arXiv 2402.09353)."""

    weight_decomposed: ClassVar[bool] = True


@adapters.register("qlora")
class QloraAdapterConfig(AdapterConfig):
    """LoRA beside weights in 4-bit NormalFloat (arXiv 2305.14314); needs bitsandbytes."""

    quantised: ClassVar[bool] = True


@adapters.register("mm_lora")
class MMLoraAdapterConfig(AdapterConfig):
    """MM-LoRA: text and images each have a LoRA of their own (Arcana, arXiv 2410.13733).

    It cannot be merged, so that a trained folder names its base and keeps them beside it.
    """

    image_rank: int | None = Field(default=None, ge=1)
    """Rank of the product for image tokens; that for text when left out. The paper has 64 beside
    192."""

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each product, by PEFT's name of it."""
        return {TEXT: self.rank, IMAGES: self.image_rank or self.rank}


def choose_layers(model: Any, config: AdapterConfig, *, prefix: str = LANGUAGE) -> list[str]:
    """Return the layers that adapters would stand beside; nothing is changed.

    Args:
        model: The joined model, or any `PreTrainedModel`.
        config: What kind of adapters, and where.
        prefix: The name of the language part; empty for a language model by itself.

    Raises:
        ConfigError: if `targets` names no layer, or a chosen layer cannot take an adapter.
        MissingExtraError: if PEFT or bitsandbytes is not installed.
    """
    _peft()
    if config.quantised:
        load_bitsandbytes("adapters: qlora")
    layers = linear_layers(model, prefix)
    chosen = _chosen(layers, config, used=_used(model, layers))
    for name in chosen:
        _check_layer(name, layers[name], config)
    return chosen


def add_adapters(model: Any, config: AdapterConfig, *, prefix: str = LANGUAGE) -> list[str]:
    """Put adapters beside the linear layers of the language part.

    The weights below an adapter stop learning, the adapters learn, and everything else keeps
    what `requires_grad` said.

    Args:
        model: The joined model, or any `PreTrainedModel`.
        config: What kind of adapters, and where.
        prefix: The name of the language part; empty for a language model by itself.

    Returns:
        The names of the layers that have one now.

    Raises:
        ConfigError: if adapters are there already, or see `choose_layers`.
        MissingExtraError: if PEFT or bitsandbytes is not installed.
    """
    peft = _peft()
    if getattr(model, "peft_config", None):
        raise ConfigError("The model carries adapters already. Merge them before adding others.")
    chosen = choose_layers(model, config, prefix=prefix)
    transposed = type(model.get_submodule(chosen[0])).__name__ == "Conv1D"
    if config.quantised:
        quantise(model, chosen)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for name, rank in config.ranks.items():
        settings = peft.LoraConfig(
            r=rank,
            lora_alpha=config.scale * rank / config.rank,
            lora_dropout=config.dropout,
            target_modules=chosen,
            use_dora=config.weight_decomposed,
            fan_in_fan_out=transposed,
            bias="none",
        )
        model.add_adapter(settings, adapter_name=name)
    if len(config.ranks) > 1:
        route_by_token(model)
    beside = {module for module in model.modules() if isinstance(module, _tuner_layer())}
    below = {parameter for layer in beside for parameter in layer.get_base_layer().parameters()}
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag and parameter not in below)
    if len(beside) != len(chosen):
        raise ConfigError(
            f"PEFT put adapters beside {len(beside)} layers where {len(chosen)} were chosen. "
            f"Name the layers in `adapters.targets`."
        )
    return chosen


def linear_layers(model: Any, prefix: str = LANGUAGE) -> dict[str, Any]:
    """Return the linear layers below `prefix` by name, the head aside.

    Raises:
        ConfigError: if there are none.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and name.startswith(prefix and f"{prefix}.")
        and not (_leaf(name) in _READ_BY_KERNELS and name.split(".")[-2:-1] == ["mixer"])
    }
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no linear layers below {prefix!r}, so there is nothing "
            f"to put adapters beside. Leave `adapters` out; or, if the checkpoint is quantised, "
            f"name the one that it was made from."
        )
    return found


def _used(model: Any, layers: Mapping[str, Any]) -> set[str]:
    """Return the last names of layers that are called; some models read a weight past `forward`."""
    called: set[str] = set()
    leaves = {layer: _leaf(name) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_hook(lambda module, *_: called.add(leaves[module]))
        for layer in leaves
    ]
    try:
        _probe(model)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _chosen(layers: Mapping[str, Any], config: AdapterConfig, *, used: set[str]) -> list[str]:
    targets = sorted(used) if config.targets == "all-linear" else config.targets
    unknown = [target for target in targets if target not in used]
    if unknown or not targets:
        raise ConfigError(
            f"adapters.targets names {', '.join(map(repr, unknown)) or 'nothing'}; the language "
            f"model has {', '.join(sorted(used))}. Name some of these, or write all-linear."
        )
    return [name for name in layers if _leaf(name) in targets]


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _check_layer(name: str, layer: Any, config: AdapterConfig) -> None:
    """Refuse a layer that this kind of adapter cannot stand beside."""
    from torch import nn

    kind, weight = type(layer).__name__, layer.weight
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ConfigError(
            f"adapters {config.use}: {name} is a {kind} that holds its weight as {weight.dtype}: "
            f"the checkpoint is quantised already. Name the checkpoint that it was made from; "
            f"{{use: qlora}} then holds its weights in 4 bits."
        )
    if config.quantised and type(layer) is not nn.Linear:
        raise ConfigError(
            f"adapters qlora: {name} is a {kind}, which cannot be held in 4 bits. Use lora, or "
            f"another language model."
        )


@contextmanager
def adapters_off(model: Any) -> Generator[None]:
    """Run the model without its adapters, as a reference; restored at the end."""
    layers: list[Any] = [one for one in model.modules() if isinstance(one, _tuner_layer())]
    # PEFT's own way freezes the adapters as well, which FSDP2 would remember for ever.
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def merge_adapters(model: Any) -> float:
    """Work the adapters into the weights below them, in place, and prove it on the logits.

    Layers held in 4 bits become ordinary ones.

    Args:
        model: The joined model, or any `PreTrainedModel` with adapters.

    Returns:
        The largest difference of the logits, relative to their size.

    Raises:
        CheckpointError: if there are no adapters, or the logits moved; the adapters then stay.
    """
    tuned = {
        name: module for name, module in model.named_modules() if isinstance(module, _tuner_layer())
    }
    if not tuned:
        raise CheckpointError("The model carries no adapters, so there is nothing to merge.")
    if is_routed(model):
        raise CheckpointError(
            f"The adapters cannot be merged. {CANNOT_MERGE}. Save with `delta=True`, which keeps "
            f"them beside the base."
        )
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    before = _probe(model)
    merged = {name: _merged(layer) for name, layer in tuned.items()}
    for name, layer in merged.items():
        model.set_submodule(name, layer)
    difference = float((_probe(model) - before).abs().max() / before.abs().max().clamp_min(1e-9))
    dtype = model.get_input_embeddings().weight.dtype
    # The 4-bit kernels of a CPU compute in bfloat16, whatever the precision around them.
    halves = str(dtype) != "torch.float32" or any(_is_quantised(layer) for layer in tuned.values())
    limit = _MERGE_HALVES if halves else _MERGE_FLOAT32
    if not difference <= limit:
        for name, layer in tuned.items():
            model.set_submodule(name, layer)
        raise CheckpointError(
            f"Merging the adapters moved the logits by {difference:.1e} of their size (allowed "
            f"{limit:.0e}), so they stay beside the weights. Save with `delta=True`, or merge in "
            f"float32."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(flags.get(parameter, True))
    _forget(model)
    return difference


def remove_adapters(model: Any) -> None:
    """Take the adapters away, in place: the layers below them are as they were before."""
    tuned = [name for name, one in model.named_modules() if isinstance(one, _tuner_layer())]
    for name in tuned:
        model.set_submodule(name, model.get_submodule(name).get_base_layer())
    _forget(model)


def _forget(model: Any) -> None:
    """Let transformers know that no adapters are there any more."""
    model._hf_peft_config_loaded = False
    model.token_router = None
    if hasattr(model, "peft_config"):
        del model.peft_config


def _merged(layer: Any) -> Any:
    """Return an ordinary layer that does what a layer and its adapter do; the old one stays."""
    import copy

    import torch

    base = layer.get_base_layer()
    dtype = compute_dtype(base)
    # In float32 on a copy: the weight is rounded once, and can be had back if the proof fails.
    whole = copy.deepcopy(layer)
    plain = unpacked(base)
    plain.weight.data = plain.weight.data.float()
    whole.base_layer = plain
    with torch.no_grad():
        if _is_quantised(layer):
            delta = _delta_of_quantised(layer)
            plain.weight.data += delta.to(plain.weight)
        else:
            whole.merge(safe_merge=True)
    plain.weight.data = plain.weight.data.to(dtype)
    return plain


def _delta_of_quantised(layer: Any) -> Any:
    """Return what an adapter adds to the weight of a 4-bit layer, in float32."""
    a = layer.lora_A[_NAME].weight.float()
    b = layer.lora_B[_NAME].weight.float()
    return (b @ a) * layer.scaling[_NAME]


def _is_quantised(layer: Any) -> bool:
    return is_four_bit(layer.get_base_layer())


def _probe(model: Any) -> Any:
    """Return logits of a few random tokens, in float32."""
    import torch

    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(4096, int(embedding.shape[0])), (1, 12), generator=generator)
    image = getattr(model.config, "image_token_id", None)
    ids[ids == image] = 0 if image != 0 else 1
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids.to(embedding.device), use_cache=False).logits.float()
    for module, training in modes.items():
        module.training = training
    return logits


def save_adapters(
    model: Any,
    folder: str | Path,
    *,
    base: str = "",
    carry: Sequence[str] = ("model.connector",),
    rename: Callable[[str], str] = str,
) -> None:
    """Write a folder that `PeftModel.from_pretrained` reads, with the connector in it.

    Args:
        model: A model with adapters.
        folder: Where to; written whole or not at all.
        base: Where the model without adapters is: a Hub id or a folder.
        carry: Names of modules that learnt as they are and travel whole.
        rename: From a name in this model to that in the class under which `base` is opened.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from mmlm.storage.atomic import atomic_folder

    if not getattr(model, "peft_config", None):
        raise CheckpointError("The model carries no adapters. Save it with Assistant.save.")
    if is_routed(model):
        raise CheckpointError(
            f"PEFT has no such adapter. {CANNOT_MERGE}. Save with `delta=True`, which MMLM reads."
        )
    config = model.peft_config[_NAME]
    state = get_peft_model_state_dict(model, adapter_name=_NAME)
    for name in carry:
        module = model.get_submodule(name)
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    tensors = {
        f"base_model.model.{rename(key)}": value.detach().contiguous()
        for key, value in state.items()
    }
    layers = sorted(name for name, m in model.named_modules() if isinstance(m, _tuner_layer()))
    settings = type(config)(
        **{
            **config.to_dict(),
            "target_modules": [rename(name) for name in layers],
            "modules_to_save": [rename(name) for name in carry] or None,
            "base_model_name_or_path": base,
            "inference_mode": True,
        }
    )
    with atomic_folder(folder) as unfinished:
        save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        settings.save_pretrained(str(unfinished))


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", needed_for="Adapters", extra="train") from None
    return peft


def _tuner_layer() -> Any:
    _peft()
    from peft.tuners.lora import LoraLayer

    return LoraLayer
