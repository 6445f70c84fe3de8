"""PaliGemma and Gemma 3: SigLIP's output and one matrix, for language models of Google's family.

PaliGemma is a linear map with bias, Gemma 3 pools neighbours, norms and projects without one.
Both let the tokens of a picture see one another where their own processors say so
(`token_type_ids`); a `LlavaProcessor` does not, and the attention stays causal, as MMLM trains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from mmlm.connectors import LinearConnectorConfig, NormMLPConnectorConfig
from mmlm.hub.classes.projected import (
    PROJECTOR,
    Projected,
    factor_of,
    last_feature_reasons,
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
from mmlm.reducers import AveragePoolConfig

_WEIGHT, _NORM = f"{CONNECTOR}layers.1.weight", f"{CONNECTOR}layers.0.weight"
_THEIR_NORM = f"{PROJECTOR}mm_soft_emb_norm.weight"
_THEIR_WEIGHT = f"{PROJECTOR}mm_input_projection_weight"


def _family_reasons(config: MMLMConfig, name: str, text: tuple[str, ...]) -> list[str]:
    """Return why a class of this family cannot hold these models."""
    reasons = common_reasons(config) + image_reasons(config) + grid_reasons(config)
    if config.text_config.model_type not in text:
        reasons.append(f"the language model is no {' or '.join(text)}, which {name} needs")
    if getattr(config.vision_config, "model_type", None) != "siglip_vision_model":
        reasons.append(f"the encoder is not SigLIP, which {name} needs")
    return reasons + last_feature_reasons(config, name) + square_reasons(config, name)


@stock_classes.register("paligemma")
class PaliGemma(Projected):
    """`PaliGemmaForConditionalGeneration`."""

    class_name = "PaliGemmaForConditionalGeneration"
    model_type = "paligemma"
    parts = "SigLIP with `layer: last`; linear; a Gemma language model"
    rank = 50

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = _family_reasons(config, "PaliGemma", ("gemma", "gemma2"))
        if config.reducer is not None:
            reasons.append(f"reducer {config.reducer['use']!r} (PaliGemma has none)")
        if config.connector_part != LinearConnectorConfig():
            reasons.append("the connector is not linear with bias")
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `PaliGemmaConfig`."""
        from transformers import PaliGemmaConfig

        width = config.text_config.hidden_size
        # Left unset, the class would let the tokens of a prompt see one another.
        text = text_of(config) | {"use_bidirectional_attention": False}
        return PaliGemmaConfig(
            vision_config=tower_of(config) | {"projection_dim": width},
            text_config=text,
            image_token_index=config.image_token_id,
            vocab_size=config.text_config.vocab_size,
            projection_dim=width,
            hidden_size=width,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def projector_pairs(self, config: MMLMConfig) -> list[tuple[str, str]]:
        """Return the pair for the one layer."""
        return [(f"{CONNECTOR}linear.", f"{PROJECTOR}linear.")]

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a PaliGemma folder describes."""
        return self.compose(
            stock,
            processor,
            feature="last_hidden_state",
            layer="last",
            dropped=0,
            reducer=None,
            connector={"use": "linear"},
            image_token_id=stock.image_token_index,
            origin=origin,
        )


@stock_classes.register("gemma3")
class Gemma3(Projected):
    """`Gemma3ForConditionalGeneration`."""

    class_name = "Gemma3ForConditionalGeneration"
    model_type = "gemma3"
    parts = "SigLIP with `layer: last`; average_pool; norm_mlp of depth 1 with norm: rms; Gemma 3"
    rank = 55

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = _family_reasons(config, "Gemma 3", ("gemma3_text",))
        reducer, facts = config.reducer_part, config.facts
        if reducer is not None and not isinstance(reducer, AveragePoolConfig):
            reasons.append(f"reducer {reducer.use!r} (Gemma 3 averages neighbours)")
        elif facts.grid[0] % factor_of(config):
            reasons.append(f"the grid of {facts.grid[0]} does not divide by the pool's factor")
        eps = getattr(config.vision_config, "layer_norm_eps", 1e-6)
        wanted = NormMLPConnectorConfig(depth=1, norm="rms", bias=False, eps=eps)
        if config.connector_part != wanted:
            reasons.append(
                f"the connector is not norm_mlp with depth: 1, norm: rms, bias: false, eps: {eps}"
            )
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `Gemma3Config`."""
        from transformers import Gemma3Config

        return Gemma3Config(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_index=config.image_token_id,
            mm_tokens_per_image=config.counter().tokens_per_tile,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def projector_pairs(self, config: MMLMConfig) -> list[tuple[str, str]]:
        """Return the pairs for norm and matrix."""
        return [(_NORM, _THEIR_NORM), (_WEIGHT, _THEIR_WEIGHT)]

    def to_stock(self, state: Mapping[str, Tensor], config: MMLMConfig) -> dict[str, Tensor]:
        """Return our tensors under the published names: Gemma's norms count from one."""
        changed = dict(state)
        changed[_NORM] = changed[_NORM] - 1
        changed[_WEIGHT] = changed[_WEIGHT].T.contiguous()
        return super().to_stock(changed, config)

    def to_ours(
        self, state: Mapping[str, Tensor], config: MMLMConfig, *, origin: str
    ) -> dict[str, Tensor]:
        """Return published tensors under our names."""
        changed = super().to_ours(state, config, origin=origin)
        if _NORM in changed and _WEIGHT in changed:
            changed[_NORM] = changed[_NORM] + 1
            changed[_WEIGHT] = changed[_WEIGHT].T.contiguous()
        return changed

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a Gemma 3 folder describes."""
        tower = stock.vision_config
        side = tower.image_size // tower.patch_size
        factor = side // round(stock.mm_tokens_per_image**0.5)
        rms = {"use": "norm_mlp", "depth": 1, "norm": "rms", "bias": False}
        return self.compose(
            stock,
            processor,
            feature="last_hidden_state",
            layer="last",
            dropped=0,
            reducer={"use": "average_pool", "factor": factor},
            connector=rms | {"eps": tower.layer_norm_eps},
            image_token_id=stock.image_token_index,
            origin=origin,
        )
