"""Depthwise convolutions in bf16 on a CPU: the same values, by a quicker way."""

import torch
from torch import nn

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


def test_other_convolutions_and_other_precisions_are_left_alone():
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 8, 3).bfloat16()
    pixels = torch.randn(2, 4, 8, 8).bfloat16()
    wide = nn.Conv2d(4, 4, 3, groups=4)
    with quick_depthwise(pixels, learns=True):
        assert torch.equal(plain(pixels), plain.forward(pixels))
        before = plain(pixels)
        wide_before = wide(pixels.float())
    assert torch.equal(plain(pixels), before)
    assert torch.equal(wide(pixels.float()), wide_before)


def test_without_gradients_nothing_is_changed():
    layer = nn.Conv2d(8, 8, 3, groups=8).bfloat16()
    pixels = torch.randn(2, 8, 6, 6).bfloat16()
    with torch.no_grad():
        before = layer(pixels)
        with quick_depthwise(pixels, learns=False):
            assert torch.equal(layer(pixels), before)
