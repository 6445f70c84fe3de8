"""In which number format a run computes, and what its optimiser keeps beside it.

    fp32            everything in float32
    bf16            computes in bfloat16; a float32 copy of what learns is moved and rounded
    bf16_autocast   weights in float32, rounded for every operation
    bf16_pure       no float32 copy: least memory, and small updates are lost
    fp16            computes in float16, for GPUs without bf16; a float32 copy as with bf16, and the
                    loss is multiplied so that small gradients are not lost (`optim`)

Measured on one core of a CPU with AVX-512 bf16 (10 Llama layers of width 576, 1,024 tokens,
forward and backward): fp32 3.2 s, autocast 1.9 s, bf16 1.9 s; bf16 needs the least memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from mmlm.training.recipe import RunConfig


@dataclass(frozen=True)
class Precision:
    """How to compute.

    Args:
        name: The word in `run.precision`, never auto.
        dtype: Number format of the model's weights.
        keep_copies: Whether what learns has a float32 copy in the optimiser.
        autocast: Whether operations are rounded one by one.
        reason: Why it was chosen, for the log.
    """

    name: str
    dtype: torch.dtype
    keep_copies: bool
    autocast: bool
    reason: str

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context in which the forward pass runs."""
        if not self.autocast:
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)


def choose_precision(run: RunConfig, device: torch.device) -> Precision:
    """Turn `run.precision` into what this device does."""
    name, reason = run.precision, "as the recipe says"
    if name == "auto":
        fast, reason = _bf16_is_fast(device)
        name = "bf16" if fast else "fp32"
    low = {"bf16": torch.bfloat16, "bf16_pure": torch.bfloat16, "fp16": torch.float16}
    dtype = low.get(name, torch.float32)
    return Precision(
        name=name,
        dtype=dtype,
        keep_copies=name != "bf16_pure",
        autocast=name == "bf16_autocast",
        reason=reason,
    )


def _bf16_is_fast(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return fast, "this GPU computes in bf16" if fast else "this GPU has no bf16"
    if device.type == "cpu":
        asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, ask, bool)() for ask in asks)
        return fast, "this CPU computes in bf16" if fast else "this CPU has no bf16 instructions"
    return False, f"bf16 is not tried on {device.type}"
