"""The original LLaVA (1.5, 1.6, NeXT, OneVision), Bunny and MobileVLM: a projector inside a LLM.

    model.layers.…  lm_head.…                     as in the language model's own class
    model.mm_projector.0.…  .2.…                  the projector
    model.vision_tower.vision_tower.vision_model. the tower, where it was trained
    model.image_newline                           LLaVA-1.6 and later

The tower is often not in the folder, but named by `mm_vision_tower`. Where a SigLIP is, its last
block has been cut off, and what the block before it gives is the feature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from mmlm.errors import CheckpointError
from mmlm.hub.importers.base import (
    VICUNA,
    Foreign,
    Layout,
    layouts,
    projector_pairs,
    projector_words,
    text_config,
)
from mmlm.hub.keymaps import KeyMap

_TEXT = {
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_mixtral": "mixtral",
    "bunny-phi": "phi",
    "bunny-phi3": "phi3",
    "bunny-stablelm": "stablelm",
    "bunny-qwen2": "qwen2",
    "bunny-llama": "llama",
    "bunny-gemma": "gemma",
    "mobilevlm": "llama",
    "tiny_llava_llama": "llama",
    "tiny_llava_phi": "phi",
    "tiny_llava_stablelm": "stablelm",
    "llava": "llama",
}
# The first place of both lists in MobileVLM V1's projector is a layer that does nothing.
_LDP = (
    ("depth", "0.0"),
    ("depth_norm", "0.1"),
    ("squeeze", "1.fc1"),
    ("excite", "1.fc2"),
    ("point", "2.0"),
    ("point_norm", "2.1"),
)
_TOWER = "model.vision_tower.vision_tower."
_BLOCK = re.compile(re.escape(_TOWER) + r"(?:vision_model\.)?encoder\.layers\.(\d+)\.")
_RANGE = re.compile(r"\((\d+)x(\d+)\)")
_POOLING = (f"{_TOWER}head.", f"{_TOWER}vision_model.head.")


@layouts.register("llava_original")
class LlavaFamily(Layout):
    """A causal language model whose config names a tower and a projector (`mm_…`)."""

    about: ClassVar[str] = "LLaVA 1.5 to OneVision as published, Bunny, MobileVLM, TinyLLaVA 1"

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether `config.json` names a tower and a projector as LLaVA does."""
        return "mm_vision_tower" in values and "mm_projector_type" in values

    def describe(self, values: dict[str, Any], keys: set[str], *, origin: str) -> Foreign:
        """Say what the checkpoint is made of."""
        family = str(values.get("model_type"))
        if family not in _TEXT:
            raise CheckpointError(
                f"{origin}/config.json: model_type {family!r} is no relative of LLaVA that MMLM "
                f"knows. It knows: {', '.join(_TEXT)}."
            )
        _refuse_marks(values, origin)
        vision, side = _vision(values, keys)
        image, notes = _image(values, side, origin)
        connector, pairs = _connector(str(values["mm_projector_type"]), origin)
        return Foreign(
            text=text_config(values, _TEXT[family], origin=origin),
            vision=vision,
            image=image,
            connector=connector,
            keys=KeyMap(
                (
                    *pairs,
                    ("model.marks.weight", "model.image_newline"),
                    ("model.vision.tower.", _TOWER),
                    ("model.language.", "model."),
                    ("lm_head.", "lm_head."),
                )
            ),
            template=VICUNA,
            notes=notes,
        )


def _refuse_marks(values: Mapping[str, Any], origin: str) -> None:
    """Refuse what MMLM has no part for."""
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token", "use_s2"):
        if values.get(name):
            raise CheckpointError(
                f"{origin}/config.json: `{name}` is set, for which MMLM has no part. The "
                f"checkpoint cannot be imported exactly."
            )
    if values.get("mm_vision_select_feature", "patch") not in ("patch", "cls_patch"):
        raise CheckpointError(
            f"{origin}/config.json: `mm_vision_select_feature` must be patch or cls_patch "
            f"(got {values['mm_vision_select_feature']!r})."
        )


def _vision(values: Mapping[str, Any], keys: set[str]) -> tuple[dict[str, Any], int | None]:
    """Return the encoder's words, and its side where it is known without its checkpoint."""
    name = str(values["mm_vision_tower"])
    words: dict[str, Any] = {"use": "hf", "layer": int(values.get("mm_vision_select_layer", -2))}
    if values.get("mm_vision_select_feature") == "cls_patch":
        words["prefix"] = "keep_as_tokens"
    held = any(key.startswith(_TOWER) for key in keys)
    if not held:
        return {**words, "checkpoint": name}, None
    config = tower_config(name, pooled=any(key.startswith(_POOLING) for key in keys))
    blocks = {found.group(1) for key in keys if (found := _BLOCK.search(key))}
    if len(blocks) == config.num_hidden_layers - 1:
        config.num_hidden_layers = len(blocks)
        words["layer"] = -1
    return {**words, "config": config.to_dict()}, getattr(config, "image_size", None)


def tower_config(name: str, *, pooled: bool) -> PretrainedConfig:
    """Return the config of a tower whose weights are in the folder.

    Args:
        name: Hub id or folder of the tower, for its config alone.
        pooled: Whether the folder holds SigLIP's pooling head.
    """
    whole = AutoConfig.from_pretrained(name)
    config: PretrainedConfig = getattr(whole, "vision_config", whole)
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = pooled  # type: ignore[attr-defined]
    return config


def _image(
    values: Mapping[str, Any], side: int | None, origin: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the image policy, and what differs."""
    kind = values.get("image_aspect_ratio") or "square"
    siglip = "siglip" in str(values["mm_vision_tower"]).lower()
    if kind == "pad":
        return {"use": "letterbox"}, []
    if kind.startswith("anyres"):
        grids = _grids(values, side or _side_in(str(values["mm_vision_tower"])), origin)
        unpad = "unpad" in str(values.get("mm_patch_merge_type", "flat"))
        layout = "unpad" if unpad else "plain"
        words: dict[str, Any] = {"use": "tiles", "rule": "anyres", "grids": grids, "layout": layout}
        most = kind.removeprefix("anyres_max_")
        if unpad and most.isdigit():
            words["shrink_above"] = int(most)
        return words, []
    return {"use": "squash" if siglip else "crop"}, []


def _grids(values: Mapping[str, Any], step: int | None, origin: str) -> list[list[int]]:
    """Return rows and columns of the canvases: a list of pixels, or a range such as (1x1),…,(6x6).

    Both are written as width and height.
    """
    pins = values.get("image_grid_pinpoints") or []
    if isinstance(pins, str) and len(ends := _RANGE.findall(pins)) > 1:
        (low, lower), (high, higher) = ([int(side) for side in ends[i]] for i in (0, -1))
        wide = [(w, h) for w in range(low, high + 1) for h in range(lower, higher + 1)]
        return [[height, width] for width, height in wide]
    if not step or not isinstance(pins, list) or not pins:
        raise CheckpointError(
            f"{origin}/config.json: `image_grid_pinpoints` and the side of the tower are "
            f"needed for image_aspect_ratio anyres."
        )
    return [[int(height) // step, int(width) // step] for width, height in pins]


def _side_in(name: str) -> int | None:
    """Return the side that a tower's name ends with, as in clip-vit-large-patch14-336."""
    found = re.search(r"-(\d{3,4})$", name)
    return int(found.group(1)) if found else None


def _connector(kind: str, origin: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the connector's words and pairs."""
    projector = "model.mm_projector."
    if kind == "ldpnetv2":
        return {"use": "ldpv2"}, [
            ("model.connector.mlp.", f"{projector}mlp.mlp."),
            ("model.connector.places.", f"{projector}peg.peg.0."),
        ]
    if kind == "ldpnet":
        return {"use": "ldp"}, [
            ("model.connector.mlp.0.", f"{projector}mlp.1."),
            ("model.connector.mlp.2.", f"{projector}mlp.3."),
            *(
                (f"model.connector.{ours}.{mine}.", f"{projector}mb_block.{place}.block.{theirs}.")
                for place, ours in enumerate(("stay", "halve"), 1)
                for mine, theirs in _LDP
            ),
        ]
    words = projector_words(kind, origin=origin)
    return words, projector_pairs(words, projector)
