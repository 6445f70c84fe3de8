"""DeepSeek-VL: any ViT of transformers, its last hidden state after the norm, a GELU projector.

The home of compositions that read the tower's final output (`layer: last`), which LLaVA cannot
name for SigLIP and DINOv2. All tokens are kept, CLS included.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from mmlm.connectors import MLPConnectorConfig
from mmlm.hub.classes.llava import DEEPER, UNFIT, read_facts, read_policy
from mmlm.hub.keymaps import KeyMap
from mmlm.hub.stock import (
    CONNECTOR,
    HEAD,
    LANGUAGE,
    TOWER,
    StockClass,
    common_reasons,
    image_processor,
    image_reasons,
    read_count,
    stock_classes,
    text_of,
    tower_of,
)
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor


@stock_classes.register("deepseek_vl")
class DeepseekVL(StockClass):
    """`DeepseekVLForConditionalGeneration`."""

    class_name = "DeepseekVLForConditionalGeneration"
    model_type = "deepseek_vl"
    parts = "a ViT of transformers with `layer: last`, all tokens kept; mlp of depth 2 with GELU"
    rank = 20

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        facts, tower, connector = config.facts, config.vision_config, config.connector_part
        reasons = common_reasons(config) + image_reasons(config)
        if config.reducer is not None:
            reasons.append(f"reducer {config.reducer['use']!r} (DeepSeek-VL has none)")
        if tower is None or tower.model_type in UNFIT:
            reasons.append("the encoder is no ViT of transformers")
        elif facts.feature != "last_hidden_state":
            reasons.append(f"the feature is {facts.feature} (set `vision.layer: last`)")
        if facts.kept_prefix != facts.num_prefix:
            reasons.append("prefix tokens are dropped (set `vision.prefix: keep_as_tokens`)")
        plain = isinstance(connector, MLPConnectorConfig) and connector == MLPConnectorConfig()
        if not plain:
            reasons.append("the connector is not mlp with depth 2, gelu and bias")
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `DeepseekVLConfig`."""
        from transformers import DeepseekVLConfig

        return DeepseekVLConfig(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_id=config.image_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `DeepseekVLProcessor`."""
        from transformers import DeepseekVLProcessor

        return DeepseekVLProcessor(
            image_processor=image_processor(config),
            tokenizer=tokenizer,
            chat_template=processor.chat.template,
            num_image_tokens=config.counter().tokens_per_tile,
        )

    def key_map(self, config: MMLMConfig) -> KeyMap:
        """Return the pairs of our prefixes and those of the published layout."""
        deeper = tower_of(config)["model_type"] in DEEPER
        return KeyMap(
            (
                (LANGUAGE, "model.language_model."),
                (HEAD, "lm_head."),
                (TOWER, "model.vision_model." + ("vision_model." if deeper else "")),
                (f"{CONNECTOR}layers.0.", "model.aligner.linear1."),
                (f"{CONNECTOR}layers.2.", "model.aligner.linear2."),
            ),
            optional=("vision_model.",) if deeper else (),
        )

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a DeepSeek-VL folder describes."""
        tower = stock.vision_config
        tokens = read_count(processor, "num_image_tokens", origin=origin)
        side = read_policy(processor, origin=origin)["side"]
        patches = (side[0] // tower.patch_size) * (side[1] // tower.patch_size)
        facts = read_facts(
            {**processor, "num_additional_image_tokens": max(0, tokens - patches)},
            width=tower.hidden_size,
            patch=tower.patch_size,
            dropped=0,
            feature="last_hidden_state",
            origin=origin,
        )
        return MMLMConfig(
            text_config=stock.text_config,
            vision_config=tower,
            image=read_policy(processor, origin=origin)["image"],
            vision={"use": "hf", "checkpoint": origin, "layer": "last"},
            vision_facts=facts.to_dict(),
            connector={"use": "mlp", "depth": 2},
            image_token_id=stock.image_token_id,
            tie_word_embeddings=stock.tie_word_embeddings,
        )
