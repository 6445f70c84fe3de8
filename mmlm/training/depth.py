"""Layers by their depth: slices of them in `learn`, rates that fall towards the input, drop-path.

A layer is what stands under a number in a parameter's name (``vision.tower.blocks.7.attn…``).
Which parameters a pattern without a slice matches is said in `mmlm.training.learning`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.errors import ConfigError

_LAYERED = ("vision", "language")


def depth_of(name: str) -> int | None:
    """Return the number of the layer that a parameter stands in, or None.

    >>> depth_of("language.layers.7.mlp.up_proj.weight")
    7
    >>> depth_of("connector.layers.weight") is None
    True
    """
    return next((int(word) for word in name.split(".") if word.isdigit()), None)


def split_slice(pattern: str) -> tuple[str, slice | None]:
    """Split a pattern from the layers that it is limited to.

    >>> split_slice("vision.*[12:]")
    ('vision.*', slice(12, None, None))
    >>> split_slice("vision.*")
    ('vision.*', None)
    """
    if not pattern.endswith("]") or ":" not in pattern.rpartition("[")[2]:
        return pattern, None
    body, _, words = pattern[:-1].rpartition("[")
    first, _, last = words.partition(":")
    if not all(word == "" or word.isdigit() for word in (first, last)):
        return pattern, None
    return body, slice(int(first) if first else None, int(last) if last else None)


def is_inside(name: str, layers: slice | None) -> bool:
    """Whether a parameter stands in one of the layers; what stands in none is never inside."""
    if layers is None:
        return True
    depth = depth_of(name)
    return depth is not None and (layers.start or 0) <= depth < (layers.stop or depth + 1)


def with_layer_decay(
    rates: Mapping[str, float], public: Mapping[str, str], decay: float | None
) -> dict[str, float]:
    """Return rates that fall by `decay` from each layer to the one below it.

    In the encoder and the language model alone. The top layer of a part keeps its rate, and so
    does what stands above all layers; what stands below them (embeddings) has the rate of a layer
    below the first.

    Args:
        rates: The rate of each parameter that learns.
        public: The public name of each.
        decay: The factor; None changes nothing.
    """
    if decay is None:
        return dict(rates)
    deepest: dict[str, int] = {}
    for name in rates:
        depth = depth_of(public[name])
        if depth is not None and _part(public[name]) in _LAYERED:
            part = _part(public[name])
            deepest[part] = max(deepest.get(part, 0), depth)
    found: dict[str, float] = {}
    for name, rate in rates.items():
        part, depth = _part(public[name]), depth_of(public[name])
        top = deepest.get(part)
        if top is None or (depth is None and "embed" not in public[name]):
            found[name] = rate
        else:
            found[name] = rate * decay ** (top - (-1 if depth is None else depth))
    return found


def _part(public: str) -> str:
    return public.removeprefix("adapters.").split(".")[0]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers of an encoder: the members of its longest list of like modules."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    alike = [list(m) for m in lists if len({type(child) for child in m}) == 1]
    return max(alike, key=len, default=[])


@contextmanager
def drop_path(module: nn.Module, most: float) -> Generator[None]:
    """Leave out layers of an encoder at random while it learns.

    A layer that is left out for a tile hands on what it was given; others are scaled so that the
    mean stays. The share grows from nothing at the first layer to `most` at the last.

    Args:
        module: The encoder.
        most: The share at the last layer; 0 does nothing.

    Raises:
        ConfigError: if the encoder stands still, or has no layers.
    """
    blocks = blocks_of(module) if most else []
    if most and not (blocks and any(p.requires_grad for p in module.parameters())):
        raise ConfigError(
            f"drop_path is {most}, and the encoder {'stands still' if blocks else 'has no layers'},"
            f" so nothing would be left out. Name vision.* in `learn`, or leave drop_path out."
        )
    hooks = [
        block.register_forward_hook(_dropping(most * number / max(len(blocks) - 1, 1)))
        for number, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _dropping(share: float) -> Any:
    def hook(block: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        before = given[0] if given else None
        after: Any = output[0] if isinstance(output, tuple) else output
        if not block.training or not share or not isinstance(before, Tensor):
            return output
        if before.shape != after.shape:
            return output
        shape = (before.shape[0],) + (1,) * (before.dim() - 1)
        kept = torch.rand(shape, device=before.device) >= share
        mixed = before + (after - before) * kept.to(before.dtype) / (1 - share)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook
