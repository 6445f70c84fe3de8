"""Which attention there is: one table, with what each needs and how to get it.

    run.attention: auto ──► the fastest of this table that is here and keeps samples apart
                            (proven on the model itself, in `mmlm.training.attention`)

A backend is a name that transformers knows; those of our own are in the modules
`attention*` beside this one. This module says what a backend needs; it runs none of them.
"""

from __future__ import annotations

import importlib.util
from typing import ClassVar

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmlm.config import PartConfig
from mmlm.modeling.attention import SEGMENTS
from mmlm.modeling.attention_flex import FLEX
from mmlm.modeling.attention_varlen import VARLEN
from mmlm.registry import Registry

_HALVES = (torch.float16, torch.bfloat16)
_NO_COMPILE = (
    "pip install kernels  (fetches a finished kernel from the Hub; nothing is compiled here)"
)


class AttentionBackend(PartConfig):
    """One way to compute attention; it has no settings."""

    implementation: ClassVar[str]
    """What transformers calls it."""

    about: ClassVar[str]
    """What it is, in a line."""

    speed: ClassVar[int] = 0
    """`auto` tries the larger first; 0 is never chosen by itself."""

    mend: ClassVar[str] = ""
    """How to get it without compiling, where it is missing."""

    @classmethod
    def missing(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot train here, or None if nothing is known against it.

        Args:
            device: Where to compute.
            dtype: In which number format attention is computed.
        """
        del device, dtype
        return None


attention_backends: Registry[AttentionBackend] = Registry("attention backend")
"""Every attention that `run.attention` may name."""


def by_speed() -> list[type[AttentionBackend]]:
    """Return what `auto` may choose, fastest first."""
    chosen = [attention_backends[name] for name in attention_backends]
    return sorted((one for one in chosen if one.speed), key=lambda one: -one.speed)


def is_known(name: str) -> bool:
    """Whether a name is one of transformers' own, or a kernel of the Hub (owner/name)."""
    return "/" in name or name in ALL_ATTENTION_FUNCTIONS.valid_keys()


def _gpu_reason(device: torch.device, dtype: torch.dtype, least: int = 8) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and this is a {device.type}"
    if dtype not in _HALVES:
        return f"it computes in half precision only, and this run in {str(dtype)[6:]}"
    major = torch.cuda.get_device_capability(device)[0]
    if major < least:
        return f"it needs compute capability {least}.0, and this GPU has {major}.x"
    return None


def _is_there(*packages: str) -> bool:
    return any(importlib.util.find_spec(name) is not None for name in packages)


@attention_backends.register("flash_attention_2")
class FlashAttention2(AttentionBackend):
    """FlashAttention-2 (Dao 2023, arXiv 2307.08691): flash-attn, or a kernel of the Hub."""

    implementation: ClassVar[str] = "flash_attention_2"
    about: ClassVar[str] = "FlashAttention-2, of the package flash-attn or of kernels"
    speed: ClassVar[int] = 40
    mend: ClassVar[str] = _NO_COMPILE

    @classmethod
    def missing(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs a GPU, half precision, and either package."""
        reason = _gpu_reason(device, dtype)
        if reason is None and not _is_there("flash_attn", "kernels"):
            return "neither flash-attn nor kernels is installed"
        return reason


@attention_backends.register("flash_attention_3")
class FlashAttention3(AttentionBackend):
    """FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), for Hopper GPUs."""

    implementation: ClassVar[str] = "flash_attention_3"
    about: ClassVar[str] = "FlashAttention-3, for H100 and H200"
    speed: ClassVar[int] = 50
    mend: ClassVar[str] = _NO_COMPILE

    @classmethod
    def missing(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs a Hopper GPU, half precision, and either package."""
        reason = _gpu_reason(device, dtype, least=9)
        if reason is not None:
            return reason
        major = torch.cuda.get_device_capability(device)[0]
        if major != 9:
            return f"it is made for compute capability 9.0, and this GPU has {major}.x"
        if not _is_there("flash_attn_interface", "kernels"):
            return "neither flash-attn 3 nor kernels is installed"
        return None


@attention_backends.register("varlen")
class Varlen(AttentionBackend):
    """PyTorch's own attention over rows of unlike length, `torch.nn.attention.varlen`."""

    implementation: ClassVar[str] = VARLEN
    about: ClassVar[str] = "PyTorch's varlen attention; nothing to install"
    speed: ClassVar[int] = 30
    mend: ClassVar[str] = "pip install 'torch>=2.11'"

    @classmethod
    def missing(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs a GPU and half precision: there is no kernel for a CPU."""
        reason = _gpu_reason(device, dtype)
        if reason is None and not _is_there("torch.nn.attention.varlen"):
            return f"torch {torch.__version__} has no torch.nn.attention.varlen"
        return reason


@attention_backends.register("segments")
class Segments(AttentionBackend):
    """One causal SDPA for each sample of a row; the fastest on a CPU."""

    implementation: ClassVar[str] = SEGMENTS
    about: ClassVar[str] = "one SDPA call for each sample; any device, any precision"
    speed: ClassVar[int] = 10


@attention_backends.register("flex")
class Flex(AttentionBackend):
    """FlexAttention (Dong et al. 2024, arXiv 2412.05496) with a block mask."""

    implementation: ClassVar[str] = FLEX
    about: ClassVar[str] = "FlexAttention with a block mask, compiled on the first step"

    @classmethod
    def missing(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """PyTorch has no backward pass of it for a CPU."""
        del dtype
        if device.type == "cpu":
            return "PyTorch's FlexAttention has no backward pass on a CPU"
        return None


@attention_backends.register("sdpa")
class Sdpa(AttentionBackend):
    """PyTorch's scaled dot product attention over the whole row, with a mask."""

    implementation: ClassVar[str] = "sdpa"
    about: ClassVar[str] = "one SDPA call over the whole row, with a mask"
    speed: ClassVar[int] = 5


@attention_backends.register("eager")
class Eager(AttentionBackend):
    """The formula written out: slow, and it keeps every weight."""

    implementation: ClassVar[str] = "eager"
    about: ClassVar[str] = "the formula written out; a reference"
