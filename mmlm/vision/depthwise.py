"""Depthwise convolutions that learn in bf16 on a CPU are computed in float32.

PyTorch has no fast kernel for the gradient of a depthwise convolution in bf16 on a CPU. For the
last third of EfficientNet-Lite0, 32 tiles of 128 pixels, forward and backward took 186 ms in bf16,
and 78 ms with those layers alone in float32, channels last (two cores, torch 2.15). Weights stay
in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.overrides import TorchFunctionMode


@contextmanager
def quick_depthwise(pixels: Tensor, *, learns: bool) -> Generator[None]:
    """Compute depthwise convolutions in float32 where that is quicker.

    Args:
        pixels: What the encoder is called with.
        learns: Whether gradients are wanted; without them bf16 is as quick.
    """
    if not learns or pixels.device.type != "cpu" or pixels.dtype != torch.bfloat16:
        yield
        return
    with _InFloat32():
        yield


class _InFloat32(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func is not conv2d or not _is_depthwise(*args, **kwargs):
            return func(*args, **kwargs)
        given, weight, bias, *rest = (*args, None) if len(args) == 2 else args
        bias = kwargs.pop("bias", bias)
        wide = given.float().contiguous(memory_format=torch.channels_last)
        bias = None if bias is None else bias.float()
        return func(wide, weight.float(), bias, *rest, **kwargs).to(given.dtype)


def _is_depthwise(
    input: Tensor,  # noqa: A002  # conv2d's own name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    del bias, stride, padding, dilation
    return weight.shape[1] == 1 and groups > 1 and input.dtype == torch.bfloat16
