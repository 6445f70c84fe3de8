"""Finding out about a network by running it without arithmetic.

Weights and pixels are stood in for by tensors of the `meta` device, which have shapes and a
graph and no contents: a tower of any size is probed in milliseconds. Networks that look at
values fall back to a real run. Nothing here knows a library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmlm.errors import ConfigError
from mmlm.features import Size

ResultT = TypeVar("ResultT")


def run_shapes(
    module: nn.Module, run: Callable[[nn.Module, Tensor], ResultT], shape: tuple[int, ...]
) -> ResultT:
    """Run a module on pixels of a shape, by shapes alone where the module allows it.

    Args:
        module: The network, with its weights on any device.
        run: What to do with the network and the pixels.
        shape: Of the pixels, ``(tiles, channels, height, width)``.

    Returns:
        What `run` gave; its tensors may be on the meta device.
    """
    stand_ins = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.is_floating_point())
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    wrapped = _Runner(module, run)
    names = {f"module.{name}": tensor for name, tensor in stand_ins.items()}
    try:
        pixels = torch.empty(shape, dtype=dtype, device="meta")
        return torch.func.functional_call(wrapped, names, (pixels,))
    except Exception:  # any operator may refuse meta tensors, each in its own way
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        with torch.no_grad():
            return run(module, torch.zeros(shape, dtype=dtype, device=device))


def idle_parameters(
    module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...]
) -> frozenset[str]:
    """Name the parameters on which the result of `run` does not depend.

    Args:
        module: The network.
        run: Gives the features that are used.
        shape: Of the pixels, ``(tiles, channels, height, width)``.
    """
    stand_ins = {
        name: torch.empty_like(weight, device="meta").requires_grad_()
        for name, weight in module.named_parameters()
    }
    buffers = {
        name: torch.empty_like(buffer, device="meta") for name, buffer in module.named_buffers()
    }
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    names = {f"module.{name}": tensor for name, tensor in (stand_ins | buffers).items()}
    pixels = torch.empty(shape, dtype=dtype, device="meta")
    try:
        features = torch.func.functional_call(_Runner(module, run), names, (pixels,))
        features.sum().backward()
    except Exception:  # see `run_shapes`
        return _idle_by_arithmetic(module, run, shape)
    return frozenset(name for name, weight in stand_ins.items() if weight.grad is None)


def _idle_by_arithmetic(
    module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...]
) -> frozenset[str]:
    """Do what `idle_parameters` does with real numbers."""
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    first = next(iter(weights.values()), None)
    if first is None:
        return frozenset()
    with torch.enable_grad():
        features = run(module, torch.zeros(shape, dtype=first.dtype, device=first.device))
        grads: Any = torch.autograd.grad(features.sum(), list(weights.values()), allow_unused=True)
    return frozenset(name for name, grad in zip(weights, grads, strict=True) if grad is None)


class _Runner(nn.Module):
    """Lets `functional_call` swap the weights of a module while any function uses it."""

    def __init__(self, module: nn.Module, run: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.module = module
        self.run = run

    def forward(self, pixels: Tensor) -> Any:
        """Run the function on the module."""
        return self.run(self.module, pixels)


def wrong_size(
    key: str, side_px: int, cause: object, takes: Callable[[int], bool], candidates: Iterable[int]
) -> ConfigError:
    """Return the error for a size that an encoder does not take.

    Args:
        key: What is set, for the message: `vision.side_px`.
        side_px: The size that was asked for.
        cause: What went wrong.
        takes: Tries a size.
        candidates: Sizes to try, the best first; the first three that work are named.
    """
    works: list[int] = []
    for candidate in candidates:
        if len(works) == 3:
            break
        if candidate > 0 and candidate not in works and candidate != side_px and takes(candidate):
            works.append(candidate)
    named = ", ".join(map(str, works)) or "none that was tried"
    text = " ".join(str(cause).split())
    return ConfigError(
        f"This encoder does not take {key} {side_px}: {text[:300].rstrip('.')}. "
        f"Sizes that work: {named}."
    )


def count_grid(
    tokens: int, size: Size, patch: int | None, *, origin: str
) -> tuple[tuple[int, int], int]:
    """Split a number of tokens into a grid and prefix tokens.

    Returns:
        Rows and columns, and the number of tokens before them.

    Raises:
        ConfigError: if the tokens make no grid.
    """
    if patch:
        rows, columns = size.height // patch, size.width // patch
        if 0 < rows * columns <= tokens <= rows * columns + 64:
            return (rows, columns), tokens - rows * columns
    root = round((tokens * size.height / size.width) ** 0.5)
    if root and tokens % root == 0 and size.height * (tokens // root) == size.width * root:
        return (root, tokens // root), 0
    raise ConfigError(
        f"{origin} gives {tokens} tokens for {size.height} x {size.width} pixels, which is no "
        f"grid{f' of patches of {patch}' if patch else ''}. A connector needs one feature for each "
        f"place."
    )
