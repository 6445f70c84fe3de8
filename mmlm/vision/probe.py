"""Finding out about a network by running it without arithmetic.

Weights and pixels are stood in for by tensors of the `meta` device, which have shapes and a
graph and no contents: a tower of any size is probed in milliseconds. Networks that look at
values fall back to a real run. Nothing here knows a library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmlm.errors import ConfigError
from mmlm.features import Size

MOST_PREFIX = 16
"""More tokens than this before the patches are no CLS and registers, but something else."""

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
    dtype, device = _home(module)
    try:
        return run(_shape_twin(module), torch.empty(shape, dtype=dtype, device="meta"))
    except Exception:  # any operator may refuse meta tensors, each in its own way
        with torch.no_grad(), _unchanged(module):
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
    dtype, _ = _home(module)
    try:
        twin = _shape_twin(module)
        with torch.enable_grad():
            run(twin, torch.empty(shape, dtype=dtype, device="meta")).sum().backward()
    except Exception:  # see `run_shapes`
        return _idle_by_arithmetic(module, run, shape)
    return frozenset(name for name, weight in twin.named_parameters() if weight.grad is None)


def _shape_twin(module: nn.Module) -> nn.Module:
    """Copy a network without its contents: every weight and buffer is on the meta device.

    A copy, because networks keep tensors of their last run, which must not be empty ones.
    """
    twins: dict[int, Any] = {}
    for weight in module.parameters():
        empty = torch.empty_like(weight, device="meta")
        twins[id(weight)] = nn.Parameter(empty, requires_grad=weight.is_floating_point())
    for buffer in module.buffers():
        twins[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, twins)


@contextmanager
def _unchanged(module: nn.Module) -> Generator[None]:
    """Put back what a run notes down: Swin makes its windows smaller for good at a small size."""
    plain = (bool, int, float, str, tuple)
    kept = [
        (each, {name: value for name, value in vars(each).items() if isinstance(value, plain)})
        for each in module.modules()
    ]
    try:
        yield
    finally:
        for each, values in kept:
            vars(each).update(values)


def _home(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the type and the device of a network's weights."""
    first = next(module.parameters(), torch.empty(0))
    return first.dtype, first.device


def _idle_by_arithmetic(
    module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...]
) -> frozenset[str]:
    """Do what `idle_parameters` does with real numbers."""
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    first = next(iter(weights.values()), None)
    if first is None:
        return frozenset()
    with torch.enable_grad(), _unchanged(module):
        features = run(module, torch.zeros(shape, dtype=first.dtype, device=first.device))
        grads: Any = torch.autograd.grad(features.sum(), list(weights.values()), allow_unused=True)
    return frozenset(name for name, grad in zip(weights, grads, strict=True) if grad is None)


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
        if 0 < rows * columns <= tokens <= rows * columns + MOST_PREFIX:
            return (rows, columns), tokens - rows * columns
    root = round((tokens * size.height / size.width) ** 0.5)
    if root and tokens % root == 0 and size.height * (tokens // root) == size.width * root:
        return (root, tokens // root), 0
    raise ConfigError(
        f"{origin} gives {tokens} tokens for {size.height} x {size.width} pixels, which is no "
        f"grid{f' of patches of {patch}' if patch else ''}. A connector needs one feature for each "
        f"place."
    )
