"""AyaVision and Cohere2Vision: any ViT, neighbours stacked, a gated MLP of two layers.

Both keep the two branches of the gate in one matrix, the value first. AyaVision reads a hidden
state and has a layer norm before the gate, Cohere2Vision reads the tower's output and has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmlm.connectors import GatedMLPConnectorConfig
from mmlm.hub.classes.llava import UNFIT, layer_of, strategy_of, tower_reasons
from mmlm.hub.classes.projected import (
    PROJECTOR,
    Projected,
    factor_of,
    last_feature_reasons,
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

_OURS = f"{CONNECTOR}mlp."
_KINDS = ("weight", "bias")


class Gated(Projected):
    """What both have in common: how the gate is stored."""

    def projector_pairs(self, config: MMLMConfig) -> list[tuple[str, str]]:
        """Return the pairs for the joined gate, the last layer, and the norm."""
        return [
            (f"{_OURS}joined.", f"{PROJECTOR}linear_1."),
            (f"{_OURS}down.", f"{PROJECTOR}linear_2."),
            (f"{CONNECTOR}norm.", f"{PROJECTOR}layernorm."),
        ]

    def to_stock(self, state: Mapping[str, Tensor], config: MMLMConfig) -> dict[str, Tensor]:
        """Return our tensors under the published names, the gate's branches as one."""
        joined = dict(state)
        for kind in _KINDS:
            branches = [joined.pop(f"{_OURS}{branch}.{kind}") for branch in ("up", "gate")]
            joined[f"{_OURS}joined.{kind}"] = torch.cat(branches)
        return super().to_stock(joined, config)

    def to_ours(
        self, state: Mapping[str, Tensor], config: MMLMConfig, *, origin: str
    ) -> dict[str, Tensor]:
        """Return published tensors under our names, the gate's branches apart."""
        apart = super().to_ours(state, config, origin=origin)
        for kind in _KINDS:
            if (whole := apart.pop(f"{_OURS}joined.{kind}", None)) is not None:
                up, gate = whole.chunk(2)
                apart |= {f"{_OURS}up.{kind}": up.clone(), f"{_OURS}gate.{kind}": gate.clone()}
        return apart


def _gate_reasons(config: MMLMConfig, *, norm: bool) -> list[str]:
    """Return why the gated projector cannot hold this connector."""
    connector = config.connector_part
    words = "gated_mlp with bias: true and " + ("norm: true" if norm else "norm: false")
    if not isinstance(connector, GatedMLPConnectorConfig):
        return [f"connector {connector.use!r} (the projector is {words})"]
    fits = connector.bias and connector.norm == norm and connector.activation == "silu"
    return [] if fits else [f"the gated projector is {words}, activation: silu"]


def _hidden_width(config: MMLMConfig) -> int:
    connector = config.connector_part
    assert isinstance(connector, GatedMLPConnectorConfig)
    return connector.hidden_width or 4 * config.text_config.hidden_size


@stock_classes.register("aya_vision")
class AyaVision(Gated):
    """`AyaVisionForConditionalGeneration`."""

    class_name = "AyaVisionForConditionalGeneration"
    model_type = "aya_vision"
    parts = "a ViT of transformers, one hidden state; pixel_shuffle; gated_mlp with bias and norm"
    rank = 40

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        return (
            common_reasons(config)
            + image_reasons(config)
            + grid_reasons(config)
            + tower_reasons(config, "AyaVision")
            + shuffle_reasons(config, "AyaVision")
            + square_reasons(config, "AyaVision")
            + _gate_reasons(config, norm=True)
        )

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return an `AyaVisionConfig`."""
        from transformers import AyaVisionConfig

        layer = layer_of(config)
        assert layer is not None  # `why_not` has seen to it
        # The class takes more words than it declares.
        width: dict[str, Any] = {"alignment_intermediate_size": 2 * _hidden_width(config)}
        return AyaVisionConfig(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_index=config.image_token_id,
            downsample_factor=factor_of(config),
            **width,
            adapter_layer_norm_eps=getattr(config.connector_part, "eps", 1e-6),
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy_of(config.facts),
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that an AyaVision folder describes."""
        layer = stock.vision_feature_layer
        hidden = getattr(stock, "alignment_intermediate_size", stock.text_config.hidden_size)
        return self.compose(
            stock,
            processor,
            feature=f"hidden_states[{layer}]",
            layer=layer,
            dropped=1 if stock.vision_feature_select_strategy == "default" else 0,
            reducer={"use": "pixel_shuffle", "factor": stock.downsample_factor},
            connector=_gate(hidden, norm=True, eps=stock.adapter_layer_norm_eps),
            image_token_id=stock.image_token_index,
            origin=origin,
        )


@stock_classes.register("cohere2_vision")
class Cohere2Vision(Gated):
    """`Cohere2VisionForConditionalGeneration`."""

    class_name = "Cohere2VisionForConditionalGeneration"
    model_type = "cohere2_vision"
    parts = "a ViT without CLS, `layer: last`; pixel_shuffle; gated_mlp with bias"
    rank = 45

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + image_reasons(config) + grid_reasons(config)
        tower = config.vision_config
        if tower is None or tower.model_type in UNFIT:
            reasons.append("the encoder is no ViT of transformers")
        return (
            reasons
            + last_feature_reasons(config, "Cohere2Vision")
            + shuffle_reasons(config, "Cohere2Vision")
            + square_reasons(config, "Cohere2Vision")
            + _gate_reasons(config, norm=False)
        )

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `Cohere2VisionConfig`."""
        from transformers import Cohere2VisionConfig

        return Cohere2VisionConfig(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_id=config.image_token_id,
            downsample_factor=factor_of(config),
            alignment_intermediate_size=2 * _hidden_width(config),
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a Cohere2Vision folder describes."""
        return self.compose(
            stock,
            processor,
            feature="last_hidden_state",
            layer="last",
            dropped=0,
            reducer={"use": "pixel_shuffle", "factor": stock.downsample_factor},
            connector=_gate(stock.alignment_intermediate_size, norm=False),
            image_token_id=stock.image_token_id,
            origin=origin,
        )


def _gate(both: int, *, norm: bool, eps: float = 1e-6) -> dict[str, Any]:
    """Return the words of the gate whose branches are `both` wide together."""
    words = {"use": "gated_mlp", "hidden_width": both // 2, "bias": True}
    return words | ({"norm": True, "eps": eps} if norm else {})
