"""Prismatic VLMs with one encoder or a fused pair: a projector and a language model.

    model.projector.projector.0.…      model.llm_backbone.llm.model.…

The encoders are timm's; the same weights in transformers give the same features (the output of
the last block but one). A fused pair (DINOv2 with SigLIP or CLIP) is a mixture here: each sees the
picture under its own normalisation, and their features are joined channel by channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoConfig

from mmlm.errors import CheckpointError
from mmlm.hub.importers.base import VICUNA, Foreign, Layout, layouts
from mmlm.hub.importers.llava import tower_config
from mmlm.hub.keymaps import KeyMap

_ENCODERS = {
    "clip-vit-b": "openai/clip-vit-base-patch16",
    "clip-vit-l": "openai/clip-vit-large-patch14",
    "clip-vit-l-336px": "openai/clip-vit-large-patch14-336",
    "siglip-vit-b16-224px": "google/siglip-base-patch16-224",
    "siglip-vit-b16-256px": "google/siglip-base-patch16-256",
    "siglip-vit-b16-384px": "google/siglip-base-patch16-384",
    "siglip-vit-so400m": "google/siglip-so400m-patch14-224",
    "siglip-vit-so400m-384px": "google/siglip-so400m-patch14-384",
}
_DINO = "facebook/dinov2-with-registers-large"
_PAIRS = {
    "dinosiglip-vit-so-224px": (_DINO, "google/siglip-so400m-patch14-224", 224),
    "dinosiglip-vit-so-384px": (_DINO, "google/siglip-so400m-patch14-384", 384),
    "dinoclip-vit-l-336px": (_DINO, "openai/clip-vit-large-patch14-336", 336),
}
_LANGUAGES = {
    "llama2-7b-pure": "meta-llama/Llama-2-7b-hf",
    "llama2-13b-pure": "meta-llama/Llama-2-13b-hf",
    "vicuna-v15-7b": "lmsys/vicuna-7b-v1.5",
    "vicuna-v15-13b": "lmsys/vicuna-13b-v1.5",
    "mistral-v0.1-7b-pure": "mistralai/Mistral-7B-v0.1",
    "phi-2-3b": "microsoft/phi-2",
}
_CONNECTORS = ("linear", "gelu-mlp", "fused-gelu-mlp")
_PROJECTOR = "projector.projector."
_IMAGES = {"letterbox": "letterbox", "resize-naive": "squash", "resize-crop": "crop"}


@layouts.register("prismatic")
class Prismatic(Layout):
    """A run folder of TRI-ML/prismatic-vlms, with `checkpoints/latest-checkpoint.pt`."""

    about: ClassVar[str] = "TRI-ML/prismatic-vlms with CLIP, SigLIP, or a pair with DINOv2"

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether `config.json` is a Prismatic run's."""
        model = values.get("model")
        return isinstance(model, Mapping) and "vision_backbone_id" in model

    def prepare(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take off the name under which the run keeps its model."""
        return {key.removeprefix("model."): value for key, value in state.items()}

    def describe(self, values: dict[str, Any], keys: set[str], *, origin: str) -> Foreign:
        """Say what the checkpoint is made of."""
        model = values["model"]
        eye, words = str(model["vision_backbone_id"]), str(model["llm_backbone_id"])
        kind = str(model.get("arch_specifier", "gelu-mlp")).removeprefix("no-align+")
        if kind not in _CONNECTORS:
            raise CheckpointError(
                f"{origin}/config.json: the projector is {kind!r}, of which only "
                f"{', '.join(_CONNECTORS)} have a place here. It cannot be imported."
            )
        encoder = _encoder(model, eye)
        language = model.get("llm_checkpoint") or _LANGUAGES.get(words)
        unknown = [name for name, found in ((eye, encoder), (words, language)) if not found]
        if unknown:
            raise CheckpointError(
                f"{origin}/config.json names {', '.join(unknown)}, for which no single part of "
                f"transformers holds the weights. Known: "
                f"{', '.join([*_ENCODERS, *_PAIRS, *_LANGUAGES])}."
            )
        policy = _IMAGES.get(str(model.get("image_resize_strategy", "resize-naive")))
        if policy is None:
            raise CheckpointError(f"{origin}/config.json: unknown image_resize_strategy.")
        linear = kind == "linear"
        held = any(key.startswith("vision_backbone.") for key in keys)
        if held:
            raise CheckpointError(
                f"{origin}: the run trained its encoder, whose tensors (vision_backbone.…) have "
                f"timm's names, which are not mapped to transformers' yet."
            )
        text = AutoConfig.from_pretrained(str(language))
        text.vocab_size = int(model.get("llm_vocab_size") or text.vocab_size)
        return Foreign(
            text=text,
            vision=encoder or {},
            image={"use": policy},
            connector=_connector(kind, encoder or {}, text.hidden_size),
            keys=KeyMap(
                (
                    ("model.connector." + ("linear." if linear else "layers."), _PROJECTOR),
                    ("model.language.", "llm_backbone.llm.model."),
                    ("lm_head.", "llm_backbone.llm.lm_head."),
                )
            ),
            tokenizer=str(language),
            template=VICUNA,
        )


def _encoder(model: Mapping[str, Any], eye: str) -> dict[str, Any] | None:
    """Return the words of the encoder or of the pair, or None for a name that is not known."""
    if eye not in _PAIRS:
        checkpoint = model.get("vision_checkpoint") or _ENCODERS.get(eye)
        return {"use": "hf", "checkpoint": checkpoint, "layer": -2} if checkpoint else None
    first, second, side_px = _PAIRS[eye]
    names: Any = model.get("vision_checkpoints") or (first, second)
    size = model.get("image_size") or side_px
    return {
        "use": "mixture",
        "fuse": "channels",
        "encoders": [
            {"use": "hf", "checkpoint": name, "layer": -2, "side_px": size} for name in names
        ],
    }


def _connector(kind: str, encoder: dict[str, Any], text_width: int) -> dict[str, Any]:
    """Return the words of the projector; the fused one begins four times as wide as the pair."""
    if kind != "fused-gelu-mlp":
        return {"use": "linear"} if kind == "linear" else {"use": "mlp", "depth": 2}
    eyes = encoder.get("encoders", [encoder])
    width = sum(tower_config(eye["checkpoint"], pooled=False).hidden_size for eye in eyes)
    return {"use": "norm_mlp", "norms": 0, "hidden_widths": [4 * width, text_width]}
