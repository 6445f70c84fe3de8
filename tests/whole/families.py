"""Tiny random members of families that transformers has as one class; folders, made in seconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
)

from tests.tiny import TEXT, VISION, tiny_tokenizer

PARTS_TEMPLATE = (
    "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'text' %}}"
    "{{{{ part['text'] }}}}{{% else %}}{{{{ '{image}' }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
    "{{{{ '<|im_end|>' + '\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)


def tokenizer_with(*tokens: str, **named: str) -> Any:
    """Return the tiny tokenizer with more special tokens, some of them known by name."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    words = list(dict.fromkeys([*tokens, *named.values()]))
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    if named:
        tokenizer._set_model_specific_special_tokens(named)
    return tokenizer


def text_of(tokenizer: Any) -> dict[str, Any]:
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    return {**TEXT, **ids, "vocab_size": len(tokenizer)}


def llava() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(image_token="<image>")
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION).to_dict(),
        text_config=LlamaConfig(**text_of(tokenizer)).to_dict(),
        image_token_index=image_id, vision_feature_layer=-2,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=PARTS_TEMPLATE.format(image="<image>\\n"),
    )  # fmt: skip
    return config, processor


def llava_onevision() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    pinpoints = [[32, 32], [32, 64], [64, 32]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        text_config=Qwen2Config(**text_of(tokenizer)).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints, vision_feature_layer=-1,
    )  # fmt: skip
    images = LlavaOnevisionImageProcessor(
        size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaOnevisionProcessor(
        images, tokenizer, LlavaOnevisionVideoProcessor(), num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=PARTS_TEMPLATE.format(image="<image>\\n"),
    )  # fmt: skip
    return config, processor


def idefics3() -> tuple[Any, Any]:
    marks = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = tokenizer_with(*marks, *grid, image_token="<image>")
    config = Idefics3Config(
        vision_config={**VISION, "model_type": "idefics3_vision"},
        text_config=LlamaConfig(**text_of(tokenizer)).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    images = Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=PARTS_TEMPLATE.format(image="<image>")
    )
    return config, processor


def qwen2_vl() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(
        "<|vision_start|>", "<|vision_end|>",
        image_token="<|image_pad|>", video_token="<|video_pad|>",
    )  # fmt: skip
    numbers = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2,
                       "mlp_ratio": 2, "patch_size": 8, "spatial_merge_size": 2},
        text_config={**text_of(tokenizer),
                     "rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}},
        image_token_id=numbers("<|image_pad|>"), video_token_id=numbers("<|video_pad|>"),
        vision_start_token_id=numbers("<|vision_start|>"),
        vision_end_token_id=numbers("<|vision_end|>"),
    )  # fmt: skip
    images = Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = Qwen2VLProcessor(
        images,
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=PARTS_TEMPLATE.format(image=image),
    )
    return config, processor


def internvl() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **{**VISION, "image_size": [32, 32], "patch_size": [8, 8]}
        ).to_dict(),
        text_config=Qwen2Config(**text_of(tokenizer)).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), downsample_ratio=0.5,
        vision_feature_layer=-1,
    )  # fmt: skip
    images = GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    processor = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(), image_seq_length=4,
        chat_template=PARTS_TEMPLATE.format(image="<IMG_CONTEXT>\\n"),
    )  # fmt: skip
    return config, processor


def gemma3() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    numbers = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        text_config=Gemma3TextConfig(
            **text_of(tokenizer), head_dim=8, sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
        ).to_dict(),
        image_token_index=numbers("<image_soft_token>"), mm_tokens_per_image=4,
        boi_token_index=numbers("<start_of_image>"), eoi_token_index=numbers("<end_of_image>"),
    )  # fmt: skip
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = Gemma3Processor(
        images, tokenizer, image_seq_length=4,
        chat_template=PARTS_TEMPLATE.format(image="<start_of_image>"),
    )  # fmt: skip
    return config, processor


FAMILIES = {
    "llava": llava, "llava_onevision": llava_onevision, "idefics3": idefics3,
    "qwen2_vl": qwen2_vl, "internvl": internvl, "gemma3": gemma3,
}  # fmt: skip


def save_family(folder: Path, name: str) -> Path:
    """Write a tiny random member of a family with its processor."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    config, processor = FAMILIES[name]()
    model = AutoModelForImageTextToText.from_config(config)
    # Larger random weights make answers differ from one another and from near ties.
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
