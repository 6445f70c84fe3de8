"""InternVL: InternViT, neighbours stacked, a layer norm and two layers.

The tower must be InternViT: the class builds nothing else when it is loaded, and would fill
another tower with random numbers behind a mere warning.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from mmlm.connectors import NormMLPConnectorConfig
from mmlm.hub.classes.llava import layer_of, strategy_of, tower_reasons
from mmlm.hub.classes.projected import (
    PROJECTOR,
    Projected,
    factor_of,
    shuffle_reasons,
    square_reasons,
)
from mmlm.hub.stock import (
    CONNECTOR,
    common_reasons,
    grid_reasons,
    image_reasons,
    stock_classes,
    text_of,
    tower_of,
)
from mmlm.modeling import MMLMConfig


@stock_classes.register("internvl")
class InternVL(Projected):
    """`InternVLForConditionalGeneration`."""

    class_name = "InternVLForConditionalGeneration"
    model_type = "internvl"
    parts = "InternViT; pixel_shuffle; norm_mlp of depth 2"
    rank = 30

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + image_reasons(config) + grid_reasons(config)
        tower = config.vision_config
        if tower is None or tower.model_type != "internvl_vision":
            reasons.append("the encoder is not InternViT, and InternVL loads no other")
        elif _layer(config) is None:
            reasons.append(
                f"the feature is {config.facts.feature}, which InternVL cannot name (set "
                f"`vision.layer: last`)"
            )
        else:
            reasons += [r for r in tower_reasons(config, "InternVL") if "the feature" not in r]
        reasons += shuffle_reasons(config, "InternVL") + square_reasons(config, "InternVL")
        connector = config.connector_part
        wanted = NormMLPConnectorConfig(activation=getattr(connector, "activation", "gelu"))
        same = isinstance(connector, NormMLPConnectorConfig) and (
            connector.model_copy(update={"depth": None}) == wanted and connector.num_layers == 2
        )
        if not same:
            reasons.append("the connector is not norm_mlp with its defaults")
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return an `InternVLConfig`."""
        from transformers import InternVLConfig

        layer = _layer(config)
        assert layer is not None  # `why_not` has seen to it
        return InternVLConfig(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_id=config.image_token_id,
            image_seq_length=config.counter().tokens_per_tile,
            downsample_ratio=1 / factor_of(config),
            projector_hidden_act=config.connector["activation"],
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy_of(config.facts),
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def projector_pairs(self, config: MMLMConfig) -> list[tuple[str, str]]:
        """Return the pairs for norm and layers."""
        return [
            (f"{CONNECTOR}layers.0.", f"{PROJECTOR}layer_norm."),
            (f"{CONNECTOR}layers.1.", f"{PROJECTOR}linear_1."),
            (f"{CONNECTOR}layers.3.", f"{PROJECTOR}linear_2."),
        ]

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that an InternVL folder describes."""
        layer = stock.vision_feature_layer
        return self.compose(
            stock,
            processor,
            feature="last_hidden_state" if layer == -1 else f"hidden_states[{layer}]",
            layer="last" if layer == -1 else layer,
            dropped=1 if stock.vision_feature_select_strategy == "default" else 0,
            reducer={"use": "pixel_shuffle", "factor": round(1 / stock.downsample_ratio)},
            connector={"use": "norm_mlp", "activation": stock.projector_hidden_act},
            image_token_id=stock.image_token_id,
            origin=origin,
        )


def _layer(config: MMLMConfig) -> int | None:
    """Return InternVL's word for the feature: -1 is the output after the last norm."""
    if config.facts.feature == "last_hidden_state":
        return -1
    layer = layer_of(config)
    normed = not getattr(config.vision_config, "use_mean_pooling", True)
    return None if layer == -1 and normed else layer
