"""Tiny random causal language models of many families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 80
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WITH_HEAD_DIM = {**_LLAMA_LIKE, "head_dim": 8}


def _config(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**settings)

    return make


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _config("LlamaConfig", **_LLAMA_LIKE),
    "qwen2": _config("Qwen2Config", **_LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": _config("Qwen3Config", **_WITH_HEAD_DIM),
    "gemma2": _config(
        "Gemma2Config", **_WITH_HEAD_DIM, final_logit_softcapping=0.3, sliding_window=6
    ),
    "gemma3_text": _config("Gemma3TextConfig", **_WITH_HEAD_DIM, sliding_window=6),
    "mistral": _config("MistralConfig", **_WITH_HEAD_DIM, sliding_window=6),
    "phi3": _config("Phi3Config", **_LLAMA_LIKE),
    "olmo2": _config("Olmo2Config", **_LLAMA_LIKE),
    "gpt2": _config(
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "cohere": _config("CohereConfig", **_LLAMA_LIKE, logit_scale=0.25),
    "granite": _config(
        "GraniteConfig", **_LLAMA_LIKE, logits_scaling=3.0, embedding_multiplier=5.0
    ),
    "phi": _config("PhiConfig", **_LLAMA_LIKE),
    "bloom": _config("BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mamba": _config(
        "MambaConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
}


def tiny(family: str, seed: int = 0) -> Any:
    """Return a random model whose weights are large enough for every path to matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model
