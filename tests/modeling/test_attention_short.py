"""Many short segments at once give what one call for each gives, forward and backward."""

import pytest
import torch
from torch import nn

from mmlm.modeling import attention
from mmlm.modeling.attention_short import MOST_TOKENS, are_short, lay_out

HEADS, KEY_HEADS, WIDTH = 6, 2, 8
LENGTHS = (7, 1, 12, 3, 5)
SHARED = ((0, 0), (0, 7), (0, 0), (8, 12), (2, 3))
"""The second segment goes on from the whole first one, the fourth from the third, the last from a
stretch inside the first."""


def attended(states, gradient, seen, monkeypatch, *, at_once, scaling=None):
    monkeypatch.setattr(attention, "are_short", lambda *_: at_once)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    output, _ = attention.segment_attention(
        nn.Module(), *states, None, scaling=scaling, cu_seq_lens_q=borders, seen_before=seen
    )
    return output, torch.autograd.grad(output, states, gradient)


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("shared", [False, True])
def test_it_is_what_separate_calls_give(shared, scaling, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    states = [
        torch.randn(1, heads, tokens, WIDTH, generator=draw, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    gradient = torch.randn(1, tokens, HEADS, WIDTH, generator=draw)
    seen = torch.tensor(SHARED, dtype=torch.int32) if shared else None
    words = {"scaling": scaling, "monkeypatch": monkeypatch}
    apart, of_apart = attended(states, gradient, seen, at_once=False, **words)
    once, of_once = attended(states, gradient, seen, at_once=True, **words)
    assert once.is_contiguous() == apart.is_contiguous()
    torch.testing.assert_close(once, apart, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(of_once, of_apart, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_every_token_has_one_place_and_sees_no_padding():
    seen = torch.tensor(SHARED, dtype=torch.int32)
    layout = lay_out(torch.tensor([0, *LENGTHS]).cumsum(0), seen)
    token = torch.arange(sum(LENGTHS))
    assert torch.equal(layout.queries.flatten()[layout.place_of_query], token)
    assert torch.equal(layout.keys.flatten()[layout.place_of_key], token)
    for number, (length, (begin, count)) in enumerate(zip(LENGTHS, SHARED, strict=True)):
        start = sum(LENGTHS[:number])
        for row in range(length):
            wanted = [*range(begin, begin + count), *range(start, start + row + 1)]
            assert layout.keys[number][layout.seen[number, row]].tolist() == wanted


def test_few_or_long_segments_are_left_to_separate_calls():
    assert are_short([20] * 8, None, 64)
    assert not are_short([20] * 3, None, 64)
    assert not are_short([20] * 8, None, 16)
    assert not are_short([20] * 8 + [MOST_TOKENS + 1], None, 64)
    assert not are_short([20] * 8, torch.tensor([[0, 0]] * 7 + [[0, MOST_TOKENS]]), 64)


def test_under_autocast_it_computes_in_its_precision():
    states = [torch.randn(1, n, 40, 32, requires_grad=True) for n in (4, 2, 2)]
    states[2] = states[2].detach().bfloat16().requires_grad_()  # a projection gives bfloat16
    borders = torch.tensor([0, 10, 20, 30, 40], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention.segment_attention(nn.Module(), *states, None, cu_seq_lens_q=borders)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert [state.grad.dtype for state in states] == [torch.float32] * 2 + [torch.bfloat16]
