"""nanoVLM: SigLIP and Llama in names of their own, joined by a pixel shuffle and one matrix.

    vision_encoder.blocks.0.attn.qkv_proj.…    queries, keys and values in one
    MP.proj.weight                             behind the shuffle, without bias
    decoder.blocks.0.attn.q_proj.…             Llama

Pixels go in from 0 to 1, as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import LlamaConfig

from mmlm.hub.importers.base import Foreign, Layout, layouts
from mmlm.hub.keymaps import KeyMap

_POSITIONS = "vision_encoder.patch_embedding.position_embedding"
_RENAMED = (
    ("vision_encoder.patch_embedding.conv.", "tower.embeddings.patch_embedding."),
    (_POSITIONS, "tower.embeddings.position_embedding.weight"),
    ("vision_encoder.layer_norm.", "tower.post_layernorm."),
    ("vision_encoder.blocks.", "tower.encoder.layers."),
    ("decoder.token_embedding.", "text.embed_tokens."),
    ("decoder.head.", "head."),
    ("decoder.norm.", "text.norm."),
    ("decoder.blocks.", "text.layers."),
)  # fmt: skip
_INSIDE = {
    "tower.": ((".ln1.", ".layer_norm1."), (".ln2.", ".layer_norm2."), (".attn.", ".self_attn.")),
    "text.": (
        (".norm1.", ".input_layernorm."),
        (".norm2.", ".post_attention_layernorm."),
        (".attn.out_proj.", ".self_attn.o_proj."),
        (".attn.", ".self_attn."),
    ),
}


@layouts.register("nanovlm")
class NanoVLM(Layout):
    """The whole model of huggingface/nanoVLM."""

    about: ClassVar[str] = "lusxvr/nanoVLM-… of huggingface/nanoVLM"

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether `config.json` is nanoVLM's."""
        return {"vit_hidden_dim", "lm_hidden_dim", "mp_pixel_shuffle_factor"} <= set(values)

    def prepare(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Split queries, keys and values, and give blocks the names of SigLIP and Llama."""
        renamed: dict[str, Tensor] = {}
        for key, value in state.items():
            for old, new in _RENAMED:
                if key.startswith(old):
                    key = new + key.removeprefix(old)
                    break
            for prefix, pairs in _INSIDE.items():
                for old, new in pairs if key.startswith(prefix) else ():
                    key = key.replace(old, new)
            if ".qkv_proj." in key:
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    renamed[key.replace("qkv_proj", f"{letter}_proj")] = part.clone()
            elif key.endswith("position_embedding.weight") and value.ndim == 3:
                renamed[key] = value[0]
            else:
                renamed[key] = value
        return renamed

    def describe(self, values: dict[str, Any], keys: set[str], *, origin: str) -> Foreign:
        """Say what the checkpoint is made of."""
        tower = {
            "model_type": "siglip_vision_model",
            "hidden_size": values["vit_hidden_dim"],
            "intermediate_size": values["vit_inter_dim"],
            "patch_size": values["vit_patch_size"],
            "image_size": values["vit_img_size"],
            "num_attention_heads": values["vit_n_heads"],
            "num_hidden_layers": values["vit_n_blocks"],
            "layer_norm_eps": values["vit_ln_eps"],
            "vision_use_head": False,
        }
        raw = {"use": "hf", "layer": "last", "mean": [0.0] * 3, "std": [1.0] * 3}
        notes: list[str] = []
        if values.get("vlm_extra_tokens"):
            notes.append(
                "nanoVLM cuts large pictures into tiles and writes their rows and columns as "
                "words; here the whole picture is shown as one tile, so that answers differ on "
                "large ones"
            )
        return Foreign(
            text=LlamaConfig(
                hidden_size=values["lm_hidden_dim"],
                intermediate_size=values["lm_inter_dim"],
                rms_norm_eps=values["lm_rms_eps"],
                rope_parameters={"rope_type": "default", "rope_theta": float(values["lm_re_base"])},
                max_position_embeddings=values["lm_max_position_embeddings"],
                vocab_size=values["lm_vocab_size"],
                num_attention_heads=values["lm_n_heads"],
                num_key_value_heads=values["lm_n_kv_heads"],
                num_hidden_layers=values["lm_n_blocks"],
                tie_word_embeddings=bool(values.get("lm_tie_weights", True)),
            ),
            vision=raw | {"config": tower},
            image={"use": "squash"},
            reducer={"use": "pixel_shuffle", "factor": values["mp_pixel_shuffle_factor"]},
            connector={"use": "linear", "bias": False},
            keys=KeyMap(
                (
                    ("model.connector.linear.", "MP.proj."),
                    ("model.vision.tower.", "tower."),
                    ("model.language.", "text."),
                    ("lm_head.", "head."),
                )
            ),
            tokenizer=values.get("lm_tokenizer"),
            template=values.get("lm_chat_template"),
            notes=notes,
        )
