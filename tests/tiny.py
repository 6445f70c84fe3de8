"""Tiny real models for tests: real classes, random weights, a few kilobytes, made in seconds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma3TextConfig,
    GemmaConfig,
    InternVLVisionConfig,
    LlamaConfig,
    PersimmonConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTH = 32
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}

VISION_KINDS = ("clip", "siglip", "dinov2", "dinov2_with_registers")
TEXT_KINDS = ("llama", "qwen2", "smollm")


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a ChatML template; every text survives it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def _with_pad_first(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose token 0 is the unknown one, as in Fuyu's."""
    letters = ["<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = (
        tokenizer.backend_tokenizer.pre_tokenizer,
        decoders.ByteLevel(),
    )
    names = {"eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def save_language(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """Write a tiny random language model with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if kind == "persimmon":
        tokenizer = _with_pad_first(tokenizer)
    settings: dict[str, Any] = {**TEXT, **ids, "vocab_size": len(tokenizer)}
    configs = {
        "llama": lambda: LlamaConfig(**settings, tie_word_embeddings=False),
        "smollm": lambda: LlamaConfig(**settings, tie_word_embeddings=True),
        "qwen2": lambda: Qwen2Config(**settings, tie_word_embeddings=True),
        "persimmon": lambda: PersimmonConfig(**settings),
        "gemma": lambda: GemmaConfig(**settings, head_dim=8),
        "gemma3": lambda: Gemma3TextConfig(**settings, head_dim=8, query_pre_attn_scalar=8),
    }
    model = AutoModelForCausalLM.from_config(configs[kind]())
    # Larger random weights make answers differ from one another and from near ties.
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_vision(folder: Path, kind: str = "clip", seed: int = 0) -> Path:
    """Write a tiny random vision tower."""
    torch.manual_seed(seed + 1)
    configs = {
        "clip": lambda: CLIPVisionConfig(**VISION),
        "siglip": lambda: SiglipVisionConfig(**VISION),
        "dinov2": lambda: Dinov2Config(**VISION),
        "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**VISION, num_register_tokens=3),
        "internvl": lambda: InternVLVisionConfig(**VISION),
    }
    AutoModel.from_config(configs[kind]()).save_pretrained(folder)
    return folder


def picture(seed: int = 0, height: int = 40, width: int = 56) -> Image.Image:
    """Return a picture of coloured noise."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def compose_tiny(
    folder: Path, vision: str = "clip", language: str = "llama", *, seed: int = 0, **parts: Any
) -> Any:
    """Return an `Assistant` of tiny parts, which are written into `folder`."""
    from mmlm.assistant import compose

    if vision == "patches":
        eye: dict[str, Any] = {"use": "patches", "patch_px": 8, "side_px": 32}
    else:
        eye = {"use": "hf", "checkpoint": str(save_vision(folder / vision, vision)), "layer": -2}
    written = save_language(folder / language, language, seed)
    words = {"use": "causal_lm", "checkpoint": str(written)}
    words |= parts.pop("talk", {})
    torch.manual_seed(2)
    return compose(vision=parts.pop("eye", eye), language=words, **parts)
