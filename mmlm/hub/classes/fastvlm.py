"""FastVLM: a convolutional or hybrid network of timm, its last map, a two-layer projector.

The map of channels, rows and columns that timm's `forward_features` ends in becomes one token
for each place. The folder carries a `LlavaProcessor`, as the published FastVLM folders do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from mmlm.hub.classes.llava import (
    activation_of,
    bias_of,
    fold_projector,
    llava_processor,
    projector_pairs,
    projector_reasons,
    read_facts,
    read_policy,
    read_projector,
    with_second_layer,
)
from mmlm.hub.keymaps import KeyMap
from mmlm.hub.stock import (
    HEAD,
    LANGUAGE,
    TOWER,
    StockClass,
    common_reasons,
    grid_reasons,
    image_reasons,
    stock_classes,
    text_of,
    tower_of,
)
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor

PROJECTOR = "model.multi_modal_projector."


@stock_classes.register("fast_vlm")
class FastVLM(StockClass):
    """`FastVlmForConditionalGeneration`."""

    class_name = "FastVlmForConditionalGeneration"
    model_type = "fast_vlm"
    parts = "a CNN or hybrid of timm with `feature: final`; mlp of depth 2"
    rank = 10

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + image_reasons(config) + grid_reasons(config)
        if config.reducer is not None:
            reasons.append(f"reducer {config.reducer['use']!r} (FastVLM has none)")
        return reasons + _tower_reasons(config) + projector_reasons(config, linear=True)

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `FastVlmConfig`."""
        from transformers import FastVlmConfig

        return FastVlmConfig(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_index=config.image_token_id,
            image_seq_length=config.counter().tokens_per_tile,
            projector_hidden_act=activation_of(config),
            multimodal_projector_bias=bias_of(config),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `LlavaProcessor`."""
        return llava_processor(config, processor, tokenizer)

    def key_map(self, config: MMLMConfig) -> KeyMap:
        """Return the pairs of our prefixes and those of FastVLM's published layout."""
        return KeyMap(
            (
                (LANGUAGE, "model.language_model."),
                (HEAD, "lm_head."),
                (TOWER, "model.vision_tower."),
                *projector_pairs(config, PROJECTOR),
            )
        )

    def to_stock(self, state: Mapping[str, Tensor], config: MMLMConfig) -> dict[str, Tensor]:
        """Return our tensors under the published names; a linear connector gets an identity."""
        return with_second_layer(super().to_stock(state, config), config, PROJECTOR)

    def to_ours(
        self, state: Mapping[str, Tensor], config: MMLMConfig, *, origin: str
    ) -> dict[str, Tensor]:
        """Return published tensors under our names."""
        if activation_of(config) == "linear":
            state = fold_projector(state, PROJECTOR, origin=origin)
        return super().to_ours(state, config, origin=origin)

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a FastVLM folder describes."""
        tower = stock.vision_config
        facts = read_facts(
            processor,
            width=tower.hidden_size,
            patch=None,
            dropped=0,
            feature="final",
            origin=origin,
        )
        return MMLMConfig(
            text_config=stock.text_config,
            vision_config=tower,
            image=read_policy(processor, origin=origin)["image"],
            vision={"use": "timm", "checkpoint": tower.architecture, "feature": "final"},
            vision_facts=facts.to_dict(),
            connector=read_projector(stock),
            image_token_id=stock.image_token_index,
            tie_word_embeddings=stock.tie_word_embeddings,
        )


def _tower_reasons(config: MMLMConfig) -> list[str]:
    """Return why FastVLM cannot hold this encoder."""
    facts, tower = config.facts, config.vision_config
    if tower is None or tower.model_type != "timm_wrapper":
        return ["the encoder is not of timm (`vision: {use: timm, feature: final}`)"]
    if facts.feature != "final":
        return [f"the feature is {facts.feature} (FastVLM takes `feature: final`)"]
    if facts.num_prefix or facts.patch:
        return ["the encoder is a ViT, whose features are tokens and no map"]
    if _channels_last(tower.architecture):
        return [f"{tower.architecture} gives maps with channels last, which FastVLM misreads"]
    return []


@lru_cache(maxsize=32)
def _channels_last(architecture: str) -> bool:
    """Say whether a network of timm ends in a map with channels last."""
    import timm
    import torch

    with torch.device("meta"):
        network = timm.create_model(architecture, num_classes=0)
    return getattr(network, "output_fmt", "NCHW") == "NHWC"
