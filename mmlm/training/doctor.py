"""What this machine brings to a training: devices, number formats, attention, memory.

It tries nothing and changes nothing; what a model can do is proven when a run starts.
"""

from __future__ import annotations

import importlib.util

import torch

from mmlm.language import HeadRule
from mmlm.modeling.backends import attention_backends
from mmlm.modeling.head_liger import missing
from mmlm.training.attention import usable
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
        *_attention(device, torch.bfloat16 if precision.autocast else precision.dtype),
        ("head", _head(device)),
        ("sharding", _sharding()),
    ]


def _head(device: torch.device) -> str:
    """Say what computes the loss behind the head."""
    reason = missing(device, HeadRule())
    if reason is None:
        return "Liger's fused kernel, on the positions that are learnt alone"
    return f"plain PyTorch, on the positions that are learnt alone; Liger's kernel is not: {reason}"


def _attention(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Say which attention a run would use, which others are here, and how to get a faster one."""
    best = next(usable(device, dtype))[0]
    rows = [("attention", f"{best.use}: {best.about}; proven on the model when a run starts")]
    for name in attention_backends:
        one = attention_backends[name]
        missing = one.missing(device, dtype)
        if one is best:
            continue
        if missing is None:
            rows.append(("", f"{name} is here: {one.about}"))
        elif device.type == "cuda" and one.mend and one.speed > best.speed:
            rows.append(("", f"{name} would be faster, but {missing}; {one.mend}"))
        else:
            rows.append(("", f"{name} is not: {missing}"))
    return rows


def _sharding() -> str:
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    extra = (
        "DeepSpeed is installed" if deepspeed else "DeepSpeed is not installed (mmlm[deepspeed])"
    )
    return f"none on one device, ddp on several; {extra}"
