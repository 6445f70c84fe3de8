"""TinyLLaVA Factory: three parts under their own names, with the configs of two inside.

language_model.…    vision_tower._vision_tower.…    connector._connector.0.…
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoConfig

from mmlm.errors import CheckpointError
from mmlm.hub.importers.base import (
    VICUNA,
    Foreign,
    Layout,
    layouts,
    projector_pairs,
    projector_words,
)
from mmlm.hub.keymaps import KeyMap


@layouts.register("tinyllava")
class TinyLlava(Layout):
    """`TinyLlavaForConditionalGeneration`, as TinyLLaVA Factory saves it."""

    about: ClassVar[str] = "tinyllava/TinyLLaVA-… of TinyLLaVA Factory"

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether `config.json` is TinyLLaVA Factory's."""
        return values.get("model_type") == "tinyllava"

    def describe(self, values: dict[str, Any], keys: set[str], *, origin: str) -> Foreign:
        """Say what the checkpoint is made of."""
        text, tower = values.get("text_config"), values.get("vision_config")
        if not isinstance(text, dict) or not isinstance(tower, dict):
            raise CheckpointError(f"{origin}/config.json must hold text_config and vision_config.")
        if values.get("vision_model_name_or_path2"):
            raise CheckpointError(
                f"{origin}/config.json names a second tower, which is fused in a way that MMLM has "
                f"no part for."
            )
        connector = projector_words(str(values.get("connector_type")), origin=origin)
        tower = {key: value for key, value in tower.items() if not key.startswith("model_name")}
        if tower.get("model_type") == "siglip_vision_model":
            tower["vision_use_head"] = any(
                key.startswith("vision_tower._vision_tower.vision_model.head.") for key in keys
            )
        vision = {"use": "hf", "config": tower, "layer": values.get("vision_feature_layer", -2)}
        if values.get("vision_feature_select_strategy") == "cls_patch":
            vision["prefix"] = "keep_as_tokens"
        siglip = tower.get("model_type") == "siglip_vision_model"
        padded = values.get("image_aspect_ratio") == "pad"
        squared = {"use": "squash" if siglip else "crop"}
        model_type = str(text.get("model_type", "llama"))
        settings = {key: value for key, value in text.items() if key != "model_type"}
        return Foreign(
            text=AutoConfig.for_model(model_type, **settings),
            vision=vision,
            image={"use": "letterbox"} if padded else squared,
            connector=connector,
            keys=KeyMap(
                (
                    *projector_pairs(connector, "connector._connector."),
                    ("model.vision.tower.", "vision_tower._vision_tower."),
                    ("model.language.", "language_model.model."),
                    ("lm_head.", "language_model.lm_head."),
                )
            ),
            tokenizer=None,
            template=VICUNA,
        )
