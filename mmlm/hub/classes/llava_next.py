"""LLaVA-NeXT: LLaVA over tiles, with a thumbnail before them and a newline behind each row.

The image policy is `tiles` with the rule `anyres` in its own layout; the learnt newline is the
one mark between the features. (A picture that is thinner than one feature keeps its middle here,
and nothing there.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from mmlm.hub.classes.llava import (
    activation_of,
    bias_of,
    fold_projector,
    layer_of,
    projector_pairs,
    projector_reasons,
    read_projector,
    strategy_of,
    tower_reasons,
    with_second_layer,
)
from mmlm.hub.classes.projected import PROJECTOR, Projected
from mmlm.hub.keymaps import KeyMap
from mmlm.hub.stock import (
    RESAMPLE,
    common_reasons,
    grid_reasons,
    stock_classes,
    text_of,
    tower_of,
)
from mmlm.images import TilesConfig
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor

_OURS, _THEIRS = "model.marks.weight", "model.image_newline"


@stock_classes.register("llava_next")
class LlavaNext(Projected):
    """`LlavaNextForConditionalGeneration`."""

    class_name = "LlavaNextForConditionalGeneration"
    model_type = "llava_next"
    parts = "LLaVA with image tiles under the rule anyres, in its own layout"
    rank = 5

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + tile_policy_reasons(config) + grid_reasons(config)
        reasons += self._shrink_reasons(config)
        if config.reducer is not None:
            reasons.append(f"reducer {config.reducer['use']!r} (LLaVA-NeXT has none)")
        if config.facts.kept_prefix:
            reasons.append("prefix tokens are kept, which have no place in a map of tiles")
        reasons += tower_reasons(config, "LLaVA-NeXT")
        size = getattr(config.vision_config, "image_size", None)
        if size is not None and (size, size) != config.facts.side:
            reasons.append(f"the encoder does not run at its own size of {size} px")
        return reasons + projector_reasons(config, linear=True)

    def _shrink_reasons(self, config: MMLMConfig) -> list[str]:
        """Return why the class would leave another map of tiles."""
        if getattr(config.image_policy, "shrink_above", None) is None:
            return []
        return ["image.shrink_above is set (LLaVA-NeXT never shrinks its map of tiles)"]

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `LlavaNextConfig`."""
        from transformers import LlavaNextConfig

        layer = layer_of(config)
        assert layer is not None  # `why_not` has seen to it
        return LlavaNextConfig(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_index=config.image_token_id,
            image_seq_length=config.facts.grid[0] * config.facts.grid[1],
            image_grid_pinpoints=pinpoints(config),
            projector_hidden_act=activation_of(config),
            multimodal_projector_bias=bias_of(config),
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy_of(config.facts),
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `LlavaNextProcessor`."""
        from transformers import LlavaNextImageProcessor, LlavaNextProcessor

        facts = config.facts
        side = facts.side[0]
        pixels = LlavaNextImageProcessor(
            size={"height": side, "width": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=pinpoints(config),
            resample=RESAMPLE[facts.resample],
            image_mean=list(facts.mean),
            image_std=list(facts.std),
        )
        return LlavaNextProcessor(
            image_processor=pixels,
            tokenizer=tokenizer,
            patch_size=facts.stride,
            num_additional_image_tokens=facts.num_prefix,
            vision_feature_select_strategy=strategy_of(facts),
            chat_template=processor.chat.template,
            image_token=processor.image_token,
        )

    def projector_pairs(self, config: MMLMConfig) -> list[tuple[str, str]]:
        """Return the pairs for the two layers."""
        return projector_pairs(config, PROJECTOR)

    def key_map(self, config: MMLMConfig) -> KeyMap:
        """Return the pairs of our prefixes and those of the class in memory."""
        return KeyMap(((_OURS, _THEIRS), *super().key_map(config).pairs))

    def to_stock(self, state: Mapping[str, Tensor], config: MMLMConfig) -> dict[str, Tensor]:
        """Return our tensors under the published names; a linear connector gets an identity."""
        published = super().to_stock(state, config)
        published[_THEIRS] = published[_THEIRS][0]
        return with_second_layer(published, config, PROJECTOR)

    def to_ours(
        self, state: Mapping[str, Tensor], config: MMLMConfig, *, origin: str
    ) -> dict[str, Tensor]:
        """Return published tensors under our names."""
        newline = {"image_newline": _THEIRS}
        state = {newline.get(key, key): value for key, value in state.items()}
        if activation_of(config) == "linear":
            state = fold_projector(state, PROJECTOR, origin=origin)
        ours = super().to_ours(state, config, origin=origin)
        if _OURS in ours and ours[_OURS].ndim == 1:
            ours[_OURS] = ours[_OURS][None]
        return ours

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a LLaVA-NeXT folder describes."""
        layer = stock.vision_feature_layer
        return self.compose(
            stock,
            processor,
            feature=f"hidden_states[{layer}]",
            layer=layer,
            dropped=1 if stock.vision_feature_select_strategy == "default" else 0,
            reducer=None,
            connector=read_projector(stock),
            image_token_id=stock.image_token_index,
            origin=origin,
        )


def tile_policy_reasons(config: MMLMConfig) -> list[str]:
    """Return why LLaVA-NeXT's processor does not give the pixels of this policy."""
    policy, facts = config.image_policy, config.facts
    if not isinstance(policy, TilesConfig) or policy.rule != "anyres":
        return [f"image policy {policy.use!r} (LLaVA-NeXT has tiles with the rule anyres)"]
    reasons: list[str] = []
    if policy.read:
        reasons.append(f"image.read sets {', '.join(policy.read)}, which no stock processor holds")
    if policy.layout not in (None, "unpad") or policy.thumbnail not in (None, "first"):
        reasons.append("image tiles has another layout than unpad, or its thumbnail is not first")
    if facts.side[0] != facts.side[1]:
        reasons.append(f"the side of {facts.side[0]} x {facts.side[1]} is no square")
    return reasons


def pinpoints(config: MMLMConfig) -> list[list[int]]:
    """Return the sizes of the canvases, in pixels."""
    policy, side = config.image_policy, config.facts.side[0]
    assert isinstance(policy, TilesConfig)  # `why_not` has seen to it
    return [[rows * side, columns * side] for rows, columns in policy.grids]
