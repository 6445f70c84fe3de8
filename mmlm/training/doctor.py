"""What this machine brings to a training: devices, number formats, attention, memory.

It tries nothing and changes nothing; what a model can do is proven when a run starts.
"""

from __future__ import annotations

import importlib.util

import torch

from mmlm.training.memory import memory_here
from mmlm.training.precision import choose_precision
from mmlm.training.recipe import RunConfig


def describe_machine() -> list[tuple[str, str]]:
    """Return what was found, as pairs of a word and a sentence."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(RunConfig(), device)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    return [
        ("device", f"{device.type}, {name}, {memory_here(device) / 2**30:.1f} GiB"),
        ("precision", f"{precision.name}: {precision.reason}"),
        ("attention", _attention(device)),
        ("sharding", _sharding()),
    ]


def _attention(device: torch.device) -> str:
    flash = importlib.util.find_spec("flash_attn") is not None
    if device.type != "cuda":
        return "one SDPA call for each sample; FlashAttention needs a GPU"
    if flash:
        return "FlashAttention 2, from the package flash-attn"
    return (
        "one SDPA call for each sample; faster: pip install 'mmlm[flash]', or for a kernel "
        "without compiling, run.attention: kernels-community/flash-attn"
    )


def _sharding() -> str:
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    extra = (
        "DeepSpeed is installed" if deepspeed else "DeepSpeed is not installed (mmlm[deepspeed])"
    )
    return f"none on one device, ddp on several; {extra}"
