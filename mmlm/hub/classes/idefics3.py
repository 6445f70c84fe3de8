"""Idefics3 (and SmolVLM, its twin): SigLIP's output, neighbours stacked, one matrix without bias.

The class has its own copy of SigLIP, with the same weights under the same names; its positions
agree on square pictures of the tower's own size. SigLIP's pooling head has no place there: no
composition uses it, and it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmlm.connectors import LinearConnectorConfig
from mmlm.hub.classes.perception_lm import (
    named_tokens,
    read_tile_facts,
    tile_processor,
    tile_reasons,
)
from mmlm.hub.classes.projected import (
    factor_of,
    last_feature_reasons,
    shuffle_reasons,
    square_reasons,
)
from mmlm.hub.keymaps import KeyMap
from mmlm.hub.stock import (
    CONNECTOR,
    HEAD,
    LANGUAGE,
    TOWER,
    StockClass,
    common_reasons,
    grid_reasons,
    stock_classes,
    text_of,
)
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor

_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
POOLING = f"{TOWER}head."


@stock_classes.register("idefics3")
class Idefics3(StockClass):
    """`Idefics3ForConditionalGeneration`."""

    class_name = "Idefics3ForConditionalGeneration"
    model_type = "idefics3"
    parts = "SigLIP with `layer: last`, squashed squares; pixel_shuffle; linear with bias: false"
    rank = 25

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + grid_reasons(config)
        reasons += tile_reasons(config, "Idefics3")
        tower, facts = config.vision_config, config.facts
        if tower is None or tower.model_type != "siglip_vision_model":
            reasons.append("the encoder is not SigLIP, of which Idefics3 has its own copy")
        elif facts.side != (tower.image_size, tower.image_size):
            reasons.append(f"the encoder runs at {facts.side[0]} px and not at its own size")
        reasons += last_feature_reasons(config, "Idefics3") + square_reasons(config, "Idefics3")
        reasons += shuffle_reasons(config, "Idefics3")
        if config.connector_part != LinearConnectorConfig(bias=False):
            reasons.append("the connector is not linear with bias: false")
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return an `Idefics3Config`, or that of its twin."""
        tower = config.vision_config
        padding: dict[str, Any] = {"pad_token_id": config.text_config.pad_token_id}
        stock: Any = CONFIG_MAPPING[self.model_type]
        return stock(
            vision_config={key: getattr(tower, key) for key in _SHARED},
            text_config=text_of(config),
            image_token_id=config.image_token_id,
            scale_factor=factor_of(config),
            **padding,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def our_tower(self, stock: PretrainedConfig) -> PretrainedConfig | None:
        """Return SigLIP's config, without the pooling head."""
        values = {key: getattr(stock.vision_config, key) for key in _SHARED}
        return AutoConfig.for_model("siglip_vision_model", **values, vision_use_head=False)

    def named_tokens(self, processor: MMLMProcessor) -> dict[str, str]:
        """Return the tokens that the processor asks for by name."""
        return named_tokens(processor)

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `PerceptionLMProcessor`, which sets no marks around the placeholders."""
        return tile_processor(config, processor, tokenizer, factor=factor_of(config))

    def key_map(self, config: MMLMConfig) -> KeyMap:
        """Return the pairs of our prefixes and those of the published layout."""
        return KeyMap(
            (
                (LANGUAGE, "model.text_model."),
                (HEAD, "lm_head."),
                (TOWER, "model.vision_model."),
                (f"{CONNECTOR}linear.", "model.connector.modality_projection.proj."),
            )
        )

    def to_stock(self, state: Mapping[str, Tensor], config: MMLMConfig) -> dict[str, Tensor]:
        """Return our tensors under the published names, without the pooling head."""
        used = {key: value for key, value in state.items() if not key.startswith(POOLING)}
        return super().to_stock(used, config)

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that an Idefics3 folder describes."""
        facts = read_tile_facts(
            processor,
            width=stock.vision_config.hidden_size,
            num_prefix=0,
            feature="last_hidden_state",
            origin=origin,
        )
        return MMLMConfig(
            text_config=stock.text_config,
            vision_config=self.our_tower(stock),
            image={"use": "squash"},
            vision={"use": "hf", "checkpoint": origin, "layer": "last"},
            vision_facts=facts.to_dict(),
            reducer={"use": "pixel_shuffle", "factor": stock.scale_factor},
            connector={"use": "linear", "bias": False},
            image_token_id=stock.image_token_id,
            tie_word_embeddings=stock.tie_word_embeddings,
        )


@stock_classes.register("smolvlm")
class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`: the same computation under another name.

    Idefics3 is written where none is named; `mmlm export --to smolvlm` writes this one.
    """

    class_name = "SmolVLMForConditionalGeneration"
    model_type = "smolvlm"
    rank = 26
