"""Liger's kernel gives the loss and the gradients of our own head.

On a GPU it runs as it is; without one Triton's interpreter runs the same kernel on the CPU, in a
process of its own, because the interpreter is chosen when the kernel is imported.
Tolerance: float32, sums in another order; the largest relative difference is told in the failure.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmlm.language import HeadRule
from mmlm.modeling import head
from mmlm.modeling.head_liger import fused_loss, missing

ROOT = Path(__file__).parents[2]
RTOL = 1e-5
HAS_GPU = torch.cuda.is_available()


def assert_the_same(rule, *, bias, device):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16, device=device), torch.randn(101, 16, device=device)
    offsets = torch.randn(101, device=device) if bias else None
    targets = torch.randint(101, (37,), device=device)
    weights = torch.rand(37, device=device)
    leaves = [one.requires_grad_() for one in (hidden, weight, offsets) if one is not None]
    sums = head._LossAlone.apply(hidden, weight, offsets, targets, weights, rule)
    wanted = torch.autograd.grad(sums, leaves)
    with torch.no_grad():
        losses, found = fused_loss(
            hidden.detach(), weight.detach(), None if offsets is None else offsets.detach(),
            targets, weights, rule, [True, True, bias],
        )  # fmt: skip
    torch.testing.assert_close((losses * weights).sum(), sums.detach(), rtol=RTOL, atol=0)
    for ours, theirs in zip(found, wanted, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=RTOL * float(theirs.abs().max()))


def compare(device):
    # The interpreter cannot call the tanh of CUDA's library, which a soft cap needs.
    rules = [HeadRule()] if device == "cpu" else [HeadRule(), HeadRule(softcap=5.0)]
    for rule in rules:
        for bias in (False, True):
            assert_the_same(rule, bias=bias, device=device)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is not here")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not here")
def test_ligers_kernel_gives_our_loss_and_gradients():
    if HAS_GPU:
        compare("cuda")
        return
    done = subprocess.run(
        [sys.executable, "-m", "tests.modeling.test_head_liger"], cwd=ROOT, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same" in done.stdout


def test_a_cpu_and_a_factor_on_the_logits_are_left_to_our_own_head():
    assert "CUDA" in missing(torch.device("cpu"), HeadRule())
    assert "factor" in missing(torch.device("cuda"), HeadRule(scale=0.5))


if __name__ == "__main__":
    compare("cpu")
    print("the same")
