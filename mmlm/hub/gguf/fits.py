"""Which compositions llama.cpp computes, and what it does otherwise than the model was trained.

llama.cpp has one graph for LLaVA: CLIP or SigLIP without prefix tokens, two linear layers with
GELU between them, one square picture. The language model must be of a family whose tensors and
tokenizer are known by name there. Reads configs alone.
"""

from __future__ import annotations

from typing import Any

from mmlm.connectors import MLPConnectorConfig
from mmlm.hub.classes.llava import layer_of
from mmlm.hub.gguf.vocabulary import vocabulary_reasons
from mmlm.hub.stock import common_reasons, grid_reasons
from mmlm.images import CropConfig, LetterboxConfig, SquashConfig
from mmlm.modeling import MMLMConfig

TOWERS = ("clip_vision_model", "siglip_vision_model")
LANGUAGES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Families of transformers, and the architecture that they are in llama.cpp."""

_GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_ROPES = ("default", "linear", "llama3")
_CLIP_MEAN = (122, 116, 104)


def why_no_gguf(config: MMLMConfig, tokenizer: Any = None) -> list[str]:
    """Return the conditions that keep a composition from llama.cpp; empty if there are none.

    Args:
        config: The composition.
        tokenizer: Its tokenizer; left out, only the parts are looked at.
    """
    reasons = common_reasons(config) + grid_reasons(config) + _eye_reasons(config)
    connector = config.connector_part
    if config.reducer is not None:
        reasons.append(f"reducer {config.reducer['use']!r} (llama.cpp's LLaVA has none)")
    if not isinstance(connector, MLPConnectorConfig) or connector.depth != 2:
        reasons.append("the connector is not mlp of depth 2")
    elif connector.activation not in _GELUS:
        reasons.append(f"the connector's activation is {connector.activation!r} and not gelu")
    reasons += _language_reasons(config.text_config)
    return reasons + ([] if tokenizer is None else vocabulary_reasons(tokenizer))


def feature_layer(config: MMLMConfig) -> int:
    """Return how many layers of the tower stand before the feature."""
    tower: Any = config.vision_config
    count = int(tower.num_hidden_layers)
    layer = layer_of(config)
    if layer is None:  # SigLIP after its last norm
        return count
    return layer if layer >= 0 else count + 1 + layer


def has_last_norm(config: MMLMConfig) -> bool:
    """Whether the feature is taken behind the tower's last norm."""
    return layer_of(config) is None


def differences(config: MMLMConfig) -> list[str]:
    """Return what llama.cpp does otherwise, in sentences for the reader of the folder."""
    said = ["llama.cpp computes GELU by its tanh form, from a table of half precision."]
    policy, facts = config.image_policy, config.facts
    if facts.num_prefix:
        said.append(
            "llama.cpp (measured with xllamacpp 2026.10) puts CLIP's class token behind the "
            "patches and not before them, so that positions are shifted by one and one patch is "
            "lost: answers are near, not equal. SigLIP has no such token."
        )
    mean = tuple(round(255 * value) for value in facts.mean)
    if not isinstance(policy, LetterboxConfig):
        said.append(
            f"llama.cpp pads a picture to a square; this model was trained with the policy "
            f"{policy.use!r}. Square pictures look the same to both; make others square yourself."
        )
    elif any(abs(one - other) > 1 for one, other in zip(mean, _CLIP_MEAN, strict=True)):
        said.append(
            f"llama.cpp pads with the colour {_CLIP_MEAN}; this model was trained with {mean}."
        )
    if getattr(config.text_config, "sliding_window", None):
        said.append("llama.cpp looks at the whole context; the language model has a window.")
    return said


def _eye_reasons(config: MMLMConfig) -> list[str]:
    tower, facts, policy = config.vision_config, config.facts, config.image_policy
    if tower is None or tower.model_type not in TOWERS:
        kind = "no network of transformers" if tower is None else tower.model_type
        return [f"the encoder is {kind}; llama.cpp's LLaVA takes CLIP and SigLIP"]
    reasons: list[str] = []
    if facts.side != (tower.image_size, tower.image_size):
        reasons.append(
            f"the encoder runs at {facts.side[0]} x {facts.side[1]} pixels and its own config "
            f"says {tower.image_size}"
        )
    if facts.kept_prefix:
        reasons.append("the CLS token is kept (set `vision.prefix: drop`)")
    if layer_of(config) is None and tower.model_type != "siglip_vision_model":
        reasons.append(f"the feature is {facts.feature}, not a hidden state")
    elif feature_layer(config) < 1:
        reasons.append(f"the feature {facts.feature} stands before the first layer")
    if tower.hidden_act not in (*_GELUS, "quick_gelu"):
        reasons.append(f"the encoder's activation is {tower.hidden_act!r}")
    if not isinstance(policy, SquashConfig | LetterboxConfig | CropConfig) or policy.read:
        reasons.append(f"image policy {policy.use!r} (one square picture is what it takes)")
    return reasons


def _language_reasons(text: Any) -> list[str]:
    if text.model_type not in LANGUAGES:
        return [
            f"the language model is a {text.model_type}; this export writes "
            f"{', '.join(sorted(LANGUAGES))}"
        ]
    kind = rope_of(text).get("rope_type", "default")
    return [] if kind in _ROPES else [f"the language model's rotary positions are of type {kind!r}"]


def rope_of(text: Any) -> dict[str, Any]:
    """Return the settings of the rotary positions."""
    return dict(getattr(text, "rope_parameters", None) or {})
