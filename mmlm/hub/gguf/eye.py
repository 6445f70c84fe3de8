"""The eye and its projector as a GGUF file, which llama.cpp calls `mmproj`.

Only the layers before the feature are written. The feature's layer is named in the file, so
that llama.cpp takes it and no other, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import CheckpointError
from mmlm.hub.gguf.fits import feature_layer, has_last_norm
from mmlm.hub.gguf.tensors import add_tensor
from mmlm.hub.stock import CONNECTOR, TOWER
from mmlm.modeling import MMLMConfig

_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.": "v.pre_ln.",
    "post_layernorm.": "v.post_ln.",
}
_LAYER = {
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.out_proj.": "attn_out.",
    "layer_norm1.": "ln1.",
    "layer_norm2.": "ln2.",
    "mlp.fc1.": "ffn_up.",
    "mlp.fc2.": "ffn_down.",
}
_PLAIN = ("v.position_embd.weight", "v.patch_embd.weight")


def write_eye(file: Path, config: MMLMConfig, state: Mapping[str, Tensor], *, title: str) -> None:
    """Write encoder and projector.

    Raises:
        CheckpointError: if a tensor has no name in llama.cpp.
    """
    import gguf

    writer: Any = gguf.GGUFWriter(file, "clip")
    writer.add_type("mmproj")
    writer.add_name(title)
    _add_settings(writer, config)
    lost: list[str] = []
    for key, value in state.items():
        if not key.startswith(TOWER):
            continue
        inner = key.removeprefix(TOWER)
        name = _name(inner, config)
        if name is None:
            lost.append(inner)
        elif name:
            add_tensor(writer, name, value, plain=name in _PLAIN)
    if lost:
        raise CheckpointError(
            f"llama.cpp has no place for {len(lost)} tensors of the encoder, such as {lost[0]}. "
            f"Nothing was written; export another form."
        )
    for ours, theirs in (("layers.0.", "mm.0."), ("layers.2.", "mm.2.")):
        weight = state[f"{CONNECTOR}{ours}weight"]
        # Without a bias there is one of zeros: llama.cpp adds it always.
        bias = state.get(f"{CONNECTOR}{ours}bias", torch.zeros_like(weight[:, 0]))
        add_tensor(writer, f"{theirs}weight", weight)
        add_tensor(writer, f"{theirs}bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_settings(writer: Any, config: MMLMConfig) -> None:
    tower: Any = config.vision_config
    layer = feature_layer(config)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_vision_image_size(int(tower.image_size))
    writer.add_vision_patch_size(int(tower.patch_size))
    writer.add_vision_embedding_length(int(tower.hidden_size))
    writer.add_vision_feed_forward_length(int(tower.intermediate_size))
    writer.add_vision_head_count(int(tower.num_attention_heads))
    writer.add_vision_attention_layernorm_eps(float(tower.layer_norm_eps))
    writer.add_vision_block_count(layer)
    writer.add_vision_projection_dim(int(config.text_config.hidden_size))
    writer.add_vision_image_mean([float(value) for value in config.facts.mean])
    writer.add_vision_image_std([float(value) for value in config.facts.std])
    writer.add_vision_use_gelu(tower.hidden_act != "quick_gelu")
    writer.add_array("clip.vision.feature_layer", [layer])


def _name(inner: str, config: MMLMConfig) -> str | None:
    """Return llama.cpp's name; empty for what stands behind the feature; None if it has none."""
    for ours, theirs in _NAMES.items():
        if inner == ours or (ours.endswith(".") and inner.startswith(ours)):
            if ours == "post_layernorm." and not has_last_norm(config):
                return ""
            return theirs + inner.removeprefix(ours)
    if inner.startswith("head."):  # SigLIP's pooling, which no composition uses
        return ""
    if not inner.startswith("encoder.layers."):
        return None
    number, _, rest = inner.removeprefix("encoder.layers.").partition(".")
    if int(number) >= feature_layer(config):
        return ""
    for ours, theirs in _LAYER.items():
        if rest.startswith(ours):
            return f"v.blk.{number}.{theirs}{rest.removeprefix(ours)}"
    return None
