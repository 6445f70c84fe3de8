"""LLaVA: any ViT of transformers, one hidden state, a two-layer projector, any language model.

The one class that nearly every tool opens. A linear connector is written as two layers, the
second of which is the identity; raw patches are no part of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmlm.connectors import LinearConnectorConfig, MLPConnectorConfig
from mmlm.errors import CheckpointError
from mmlm.hub.keymaps import KeyMap
from mmlm.hub.stock import (
    CONNECTOR,
    HEAD,
    LANGUAGE,
    TOWER,
    StockClass,
    common_reasons,
    grid_reasons,
    image_processor,
    image_reasons,
    read_count,
    read_image_processor,
    stock_classes,
    text_of,
    tower_of,
)
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor
from mmlm.vision import VisionFacts

# Their last hidden state is hidden_states[-1] (no norm after it), so that LLaVA can name it.
LAST_IS_PLAIN = ("clip_vision_model", "mlcd_vision_model", "pixtral", "internvl_vision", "beit")
# Their published weights stand one module deeper than transformers 5 holds them.
DEEPER = ("clip_vision_model", "siglip_vision_model")
UNFIT = {
    "siglip2_vision_model": "it wants masks and patch sizes that LLaVA does not pass",
    "timm_wrapper": "its hidden states are maps of channels, rows and columns",
}
_LAYER = re.compile(r"hidden_states\[(-?\d+)\]")
PROJECTOR = "multi_modal_projector."


@stock_classes.register("llava")
class Llava(StockClass):
    """`LlavaForConditionalGeneration`."""

    class_name = "LlavaForConditionalGeneration"
    model_type = "llava"
    parts = "a ViT of transformers, one hidden state, without CLS or with all; linear or mlp"
    rank = 0

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + image_reasons(config) + grid_reasons(config)
        if config.reducer is not None:
            reasons.append(f"reducer {config.reducer['use']!r} (LLaVA has none)")
        return reasons + tower_reasons(config) + projector_reasons(config, linear=True)

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `LlavaConfig`."""
        from transformers import LlavaConfig

        layer = layer_of(config)
        assert layer is not None  # `why_not` has seen to it
        return LlavaConfig(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_index=config.image_token_id,
            image_seq_length=config.counter().tokens_per_tile,
            projector_hidden_act=activation_of(config),
            multimodal_projector_bias=bias_of(config),
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy_of(config.facts),
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `LlavaProcessor`."""
        return llava_processor(config, processor, tokenizer)

    def key_map(self, config: MMLMConfig) -> KeyMap:
        """Return the pairs of our prefixes and those of LLaVA's published layout."""
        deeper = tower_of(config)["model_type"] in DEEPER
        return KeyMap(
            (
                (LANGUAGE, "language_model.model."),
                (HEAD, "language_model.lm_head."),
                (TOWER, "vision_tower.vision_model." if deeper else "vision_tower."),
                *projector_pairs(config, PROJECTOR),
            ),
            optional=("vision_model.",),
        )

    def to_stock(self, state: Mapping[str, Tensor], config: MMLMConfig) -> dict[str, Tensor]:
        """Return our tensors under the published names; a linear connector gets an identity."""
        return with_second_layer(super().to_stock(state, config), config, PROJECTOR)

    def to_ours(
        self, state: Mapping[str, Tensor], config: MMLMConfig, *, origin: str
    ) -> dict[str, Tensor]:
        """Return published tensors under our names; two linear layers in a row become one."""
        state = in_published_names(state)
        if activation_of(config) == "linear":
            state = fold_projector(state, PROJECTOR, origin=origin)
        return super().to_ours(state, config, origin=origin)

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a LLaVA folder describes."""
        layer = stock.vision_feature_layer
        tower = stock.vision_config
        if not isinstance(layer, int):
            raise CheckpointError(
                f"{origin}/config.json: `vision_feature_layer` {layer} joins several layers, which "
                f"no MMLM encoder does yet. Load the folder with transformers."
            )
        count = getattr(tower, "num_hidden_layers", None)
        if isinstance(count, int) and not -count - 1 <= layer <= count:
            raise CheckpointError(
                f"{origin}/config.json: `vision_feature_layer` {layer} is beyond the tower, which "
                f"has {count + 1} hidden states. The file is damaged: download the folder again."
            )
        facts = read_facts(
            processor,
            width=tower.hidden_size,
            patch=getattr(tower, "patch_size", None),
            dropped=1 if stock.vision_feature_select_strategy == "default" else 0,
            feature=f"hidden_states[{layer}]",
            origin=origin,
        )
        return MMLMConfig(
            text_config=stock.text_config,
            vision_config=tower,
            image=read_policy(processor, origin=origin)["image"],
            vision={"use": "hf", "checkpoint": origin, "layer": layer},
            vision_facts=facts.to_dict(),
            connector=read_projector(stock),
            image_token_id=stock.image_token_index,
            tie_word_embeddings=stock.tie_word_embeddings,
        )


def layer_of(config: MMLMConfig) -> int | None:
    """Return the index into the tower's hidden states that stands for the feature, or None."""
    feature = config.facts.feature
    if found := _LAYER.fullmatch(feature):
        return int(found.group(1))
    tower = getattr(config.vision_config, "model_type", None)
    return -1 if feature == "last_hidden_state" and tower in LAST_IS_PLAIN else None


def strategy_of(facts: VisionFacts) -> Literal["full", "default"]:
    """Return LLaVA's word for which tokens it uses: it can drop the first one or nothing."""
    return "full" if facts.kept_prefix == facts.num_prefix else "default"


def tower_reasons(config: MMLMConfig, name: str = "LLaVA") -> list[str]:
    """Return why LLaVA, or a class that reads its tower as LLaVA does, cannot hold this encoder."""
    facts, tower = config.facts, config.vision_config
    if tower is None:
        return [f"the encoder has no network of transformers in it ({name} needs a ViT)"]
    if tower.model_type in UNFIT:
        return [f"the encoder is a {tower.model_type}: {UNFIT[tower.model_type]}"]
    reasons: list[str] = []
    if layer_of(config) is None:
        reasons.append(
            f"the feature is {facts.feature}, and {name} takes a hidden state before the last norm "
            f"(set `vision.layer`, for example to -2)"
        )
    if facts.num_prefix - facts.kept_prefix > 1:
        reasons.append(
            f"{facts.num_prefix - facts.kept_prefix} prefix tokens (CLS, registers) are dropped, "
            f"and {name} drops the first alone; keep the registers as tokens"
        )
    size = getattr(tower, "image_size", None)
    if isinstance(size, int) and tower.model_type in DEEPER and facts.side != (size, size):
        reasons.append(
            f"the encoder runs at {facts.side[0]} x {facts.side[1]} pixels and its own config says "
            f"{size}; {name} runs it at its own size"
        )
    return reasons


def projector_reasons(config: MMLMConfig, *, linear: bool) -> list[str]:
    """Return why a two-layer projector cannot hold this connector."""
    connector = config.connector_part
    if isinstance(connector, LinearConnectorConfig):
        return [] if linear else ["connector 'linear' (use mlp with depth 2)"]
    if isinstance(connector, MLPConnectorConfig):
        if connector.depth == 2 or (linear and connector.depth == 1):
            return []
        return [f"connector mlp has depth {connector.depth} (the projector has two layers)"]
    return [f"connector {connector.use!r} (the projector is mlp with depth 2)"]


def activation_of(config: MMLMConfig) -> str:
    """Return what stands between the projector's layers; one layer becomes two without any."""
    connector = config.connector_part
    if isinstance(connector, MLPConnectorConfig) and connector.depth == 2:
        return connector.activation
    return "linear"


def bias_of(config: MMLMConfig) -> bool:
    """Return whether the projector's layers have a bias."""
    return bool(getattr(config.connector_part, "bias", True))


def read_projector(stock: PretrainedConfig) -> dict[str, Any]:
    """Return the connector that a stock config's projector stands for."""
    bias = bool(stock.multimodal_projector_bias)
    if stock.projector_hidden_act == "linear":
        return {"use": "linear", "bias": bias}
    return {"use": "mlp", "depth": 2, "activation": stock.projector_hidden_act, "bias": bias}


def with_second_layer(
    published: dict[str, Tensor], config: MMLMConfig, prefix: str
) -> dict[str, Tensor]:
    """Add the identity that makes one linear layer two, where there is only one."""
    if activation_of(config) == "linear":
        weight = published[f"{prefix}linear_1.weight"]
        width = weight.shape[0]
        identity = torch.eye(width, dtype=weight.dtype, device=weight.device)
        published[f"{prefix}linear_2.weight"] = identity
        if f"{prefix}linear_1.bias" in published:
            published[f"{prefix}linear_2.bias"] = torch.zeros_like(weight[:, 0])
    return published


def read_policy(processor: dict[str, Any], *, origin: str) -> dict[str, Any]:
    """Return what the image processor of a stock folder stands for."""
    return read_image_processor(
        processor.get("image_processor") or {}, origin=f"{origin}/processor_config.json"
    )


def read_facts(
    processor: dict[str, Any],
    *,
    width: int,
    patch: int | None,
    dropped: int,
    feature: str,
    origin: str,
    factor: int = 1,
) -> VisionFacts:
    """Return the facts of the encoder that a folder with a `LlavaProcessor` describes."""
    seen = read_policy(processor, origin=origin)
    stride = processor.get("patch_size") or patch
    if factor > 1 and isinstance(stride, int) and not stride % factor:
        stride //= factor  # the processor counts what the reducer leaves
    if not isinstance(stride, int) or stride < 1:
        raise CheckpointError(
            f"{origin}/processor_config.json: `patch_size` must be a number of pixels "
            f"(got {stride!r}). Mend the file, or download it again."
        )
    prefix = 0
    if processor.get("num_additional_image_tokens") is not None:
        prefix = read_count(processor, "num_additional_image_tokens", origin=origin)
    rows, columns = (pixels // stride for pixels in seen["side"])
    return VisionFacts(
        width=width,
        side=(seen["side"][0], seen["side"][1]),
        grid=(rows, columns),
        patch=patch,
        stride=stride,
        num_prefix=prefix,
        kept_prefix=max(0, prefix - dropped),
        mean=tuple(seen["mean"]),
        std=tuple(seen["std"]),
        resample=seen["resample"],
        feature=feature,
    )


def projector_pairs(config: MMLMConfig, theirs: str) -> list[tuple[str, str]]:
    """Return the pairs for the connector's layers."""
    if isinstance(config.connector_part, LinearConnectorConfig):
        return [(f"{CONNECTOR}linear.", f"{theirs}linear_1.")]
    if activation_of(config) == "linear":
        return [(f"{CONNECTOR}layers.0.", f"{theirs}linear_1.")]
    return [
        (f"{CONNECTOR}layers.0.", f"{theirs}linear_1."),
        (f"{CONNECTOR}layers.2.", f"{theirs}linear_2."),
    ]


def llava_processor(
    config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any, *, factor: int = 1
) -> Any:
    """Return the `LlavaProcessor` that gives the same tokens and pixels as ours.

    Args:
        config: The composition.
        processor: Our processor.
        tokenizer: The tokenizer, which knows the placeholder by name.
        factor: How many features in a row become one token.
    """
    from transformers import LlavaProcessor

    facts = config.facts
    return LlavaProcessor(
        image_processor=image_processor(config),
        tokenizer=tokenizer,
        patch_size=facts.stride * factor,
        num_additional_image_tokens=facts.num_prefix,
        vision_feature_select_strategy=strategy_of(facts),
        chat_template=processor.chat.template,
        image_token=processor.image_token,
    )


def in_published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a LLaVA state under its published names, from either layout that is around."""
    if not any(key.startswith("model.") for key in state):
        return dict(state)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("model.language_model."):
            key = "language_model.model." + key.removeprefix("model.language_model.")
        elif key.startswith("lm_head."):
            key = "language_model." + key
        renamed[key.removeprefix("model.")] = value
    return renamed


def fold_projector(state: Mapping[str, Tensor], prefix: str, *, origin: str) -> dict[str, Tensor]:
    """Join two linear layers without an activation into one."""
    folded = dict(state)
    try:
        first = folded[f"{prefix}linear_1.weight"]
        second = folded.pop(f"{prefix}linear_2.weight")
        bias = folded.get(f"{prefix}linear_1.bias")
        shift = folded.pop(f"{prefix}linear_2.bias", None)
        folded[f"{prefix}linear_1.weight"] = (second.float() @ first.float()).to(first.dtype)
        if bias is not None and shift is not None:
            joined = second.float() @ bias.float() + shift.float()
            folded[f"{prefix}linear_1.bias"] = joined.to(bias.dtype)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{origin}: the projector's two layers cannot be joined ({error}). The weights do not "
            f"fit config.json: download the folder again."
        ) from None
    return folded
