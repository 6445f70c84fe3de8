"""Many short segments at once give what one call for each gives, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmlm.modeling import attention
from mmlm.modeling.attention_short import MOST_TOKENS, Parts, lay_out, part

HEADS, KEY_HEADS, WIDTH = 6, 2, 8
LENGTHS = (7, 1, 12, 3, 5)
SHARED = ((0, 0), (0, 7), (0, 0), (8, 12), (2, 3))
"""The second segment goes on from the whole first one, the fourth from the third, the last from a
stretch inside the first."""


ALONE = Parts((), (0, 1, 2, 3, 4))
ALL_AT_ONCE = Parts(((0, 1, 2, 3, 4),), ())
IN_GROUPS = Parts(((0, 4), (1, 3)), (2,))
FIRST_AND_LAST_ALONE = Parts(((1, 2, 3),), (0, 4))


def attended(states, gradient, seen, monkeypatch, parts, *, scaling=None):
    monkeypatch.setattr(attention, "part", lambda *_, **__: parts)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    output, _ = attention.segment_attention(
        nn.Module(), *states, None, scaling=scaling, cu_seq_lens_q=borders, seen_before=seen
    )
    return output, torch.autograd.grad(output, states, gradient)


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("parts", [ALL_AT_ONCE, IN_GROUPS, FIRST_AND_LAST_ALONE])
def test_it_is_what_separate_calls_give(parts, shared, scaling, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    states = [
        torch.randn(1, heads, tokens, WIDTH, generator=draw, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    gradient = torch.randn(1, tokens, HEADS, WIDTH, generator=draw)
    seen = torch.tensor(SHARED, dtype=torch.int32) if shared else None
    words = {"scaling": scaling, "monkeypatch": monkeypatch}
    apart, of_apart = attended(states, gradient, seen, parts=ALONE, **words)
    once, of_once = attended(states, gradient, seen, parts=parts, **words)
    assert once.is_contiguous() == apart.is_contiguous()
    torch.testing.assert_close(once, apart, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(of_once, of_apart, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4), (1, 3), (0, 4), (2,)])
def test_every_token_has_one_place_and_sees_no_padding(chosen):
    layout = lay_out(LENGTHS, SHARED, chosen, torch.device("cpu"))
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    tokens = [starts[n] + inside for n in chosen for inside in range(LENGTHS[n])]
    assert layout.tokens.tolist() == tokens
    assert layout.queries.flatten()[layout.place_of_query].tolist() == tokens
    assert layout.keys.flatten()[layout.place_of_key].tolist() == tokens
    for place, number in enumerate(chosen):
        (begin, count), start = SHARED[number], starts[number]
        for row in range(LENGTHS[number]):
            wanted = [*range(begin, begin + count), *range(start, start + row + 1)]
            assert layout.keys[place][layout.seen[place, row]].tolist() == wanted


def parted(lengths, before=None, *, heads=9, head_width=64):
    return part(tuple(lengths), before or (0,) * len(lengths), heads=heads, head_width=head_width)


def test_few_long_or_narrow_segments_are_left_to_separate_calls():
    assert parted([20] * 8) == Parts((tuple(range(8)),), ())
    for alone in (parted([20] * 3), parted([20] * 8, head_width=16), parted([200] * 8)):
        assert not alone.groups
    assert parted([20] * 8 + [MOST_TOKENS + 1]) == Parts((tuple(range(8)),), (8,))
    assert parted([20] * 8, (0,) * 7 + (MOST_TOKENS,)).alone == (7,)


def test_segments_of_like_length_are_done_together_and_a_longer_one_by_itself():
    # One sample of 100 tokens among 38 of 25 would fill three quarters of the places with padding.
    assert parted([25] * 20 + [100] + [25] * 18).alone == (20,)
    assert len(parted([20, 60] * 12).groups) == 2


@given(
    lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(0, 60)), min_size=1, max_size=40)
)
@settings(deadline=None, max_examples=60)
def test_every_segment_is_done_once(lengths):
    found = parted([own for own, _ in lengths], tuple(count for _, count in lengths))
    done = [number for group in (*found.groups, found.alone) for number in group]
    assert sorted(done) == list(range(len(lengths)))
    assert list(found.alone) == sorted(found.alone)


def test_under_autocast_it_computes_in_its_precision():
    states = [torch.randn(1, n, 40, 32, requires_grad=True) for n in (4, 2, 2)]
    states[2] = states[2].detach().bfloat16().requires_grad_()  # a projection gives bfloat16
    borders = torch.tensor([0, 10, 20, 30, 40], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention.segment_attention(nn.Module(), *states, None, cu_seq_lens_q=borders)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert [state.grad.dtype for state in states] == [torch.float32] * 2 + [torch.bfloat16]
