"""Depthwise convolutions in bf16 on a CPU: the same values, by a quicker way."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from torch.overrides import TorchFunctionMode

from mmlm.vision.depthwise import quick_depthwise


def convolved(layer, pixels, *, learns):
    given = pixels.clone().requires_grad_()
    with quick_depthwise(given, learns=learns):
        output = layer(given)
    output.float().square().sum().backward()
    return output, given.grad, layer.weight.grad


def test_values_and_gradients_are_those_of_bf16_within_its_rounding():
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 5, stride=2, padding=2, groups=16).bfloat16()
    pixels = torch.randn(4, 16, 9, 9).bfloat16()
    quick = convolved(layer, pixels, learns=True)
    layer.zero_grad()
    exact = nn.Conv2d(16, 16, 5, stride=2, padding=2, groups=16)
    exact.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    wanted = convolved(exact, pixels.float(), learns=True)
    for found, right in zip(quick, wanted, strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), right, rtol=2e-2, atol=2e-2)


class Watch(TorchFunctionMode):
    """Keeps the precision of every convolution that is really called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is conv2d:
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("groups", "dtype", "learns", "computed"),
    [
        (8, torch.bfloat16, True, torch.float32),
        (8, torch.bfloat16, False, torch.bfloat16),
        (8, torch.float32, True, torch.float32),
        (2, torch.bfloat16, True, torch.bfloat16),
        (1, torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_only_depthwise_ones_that_learn_in_bf16_are_computed_in_float32(
    groups, dtype, learns, computed
):
    layer = nn.Conv2d(8, 8, 3, groups=groups).to(dtype)
    pixels = torch.randn(2, 8, 6, 6).to(dtype)
    with Watch() as watch, quick_depthwise(pixels, learns=learns):
        output = layer(pixels)
    assert watch.seen == [computed]
    assert output.dtype == dtype
