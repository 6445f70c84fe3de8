"""A tiny stock folder and the settings with which vLLM runs it on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny

HEADS = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
"""vLLM's attention on a CPU knows heads of 32 numbers and more."""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
"""Environment variables: a gibibyte for keys and values, no core of its own, no network."""


def save_stock(place: Path) -> Path:
    """Write a tiny LLaVA folder whose heads are wide enough; return it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in HEADS.items():
            patch.setitem(tiny.TEXT, key, value)
        tiny.compose_tiny(place / "parts").save(place / "model")
    return place / "model"
