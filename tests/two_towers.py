"""Tiny encoders of texts, alone and beside one of pictures, with a tokenizer that ends a text."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from tests.tiny import VISION, tiny_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


def save_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer that puts its end behind each text; return how many it knows."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def clip(seed: int = 0, width: int = 16) -> CLIPModel:
    """Return a CLIP whose texts and pictures differ from one another."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**SMALL, "vocab_size": len(tokenizer), **ids, "bos_token_id": None}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=width))
    for parameter in model.parameters():
        parameter.data.mul_(4.0) if parameter.dim() > 1 else None
    return model


def save_clip(folder: Path, model: CLIPModel) -> Path:
    """Write a CLIP with its tokenizer."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def turned(model: CLIPModel, width: int, seed: int = 5) -> CLIPModel:
    """Return the same CLIP with its space turned into one of more dimensions."""
    torch.manual_seed(seed)
    old = model.config.projection_dim
    turn = torch.linalg.qr(torch.randn(width, old))[0]
    new = clip(width=width)
    state = model.state_dict()
    for name in ("visual_projection.weight", "text_projection.weight"):
        state[name] = turn @ state[name]
    new.load_state_dict(state)
    return new


def save_bert(folder: Path, seed: int = 3) -> Path:
    """Write an encoder of texts that knows no pictures."""
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**SMALL, vocab_size=save_tokenizer(folder)))
    for parameter in model.parameters():
        parameter.data.mul_(4.0) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    return folder
