"""LLaVA-OneVision: LLaVA-NeXT, whose map of tiles is shrunk where it holds too many features.

The stock class cuts a picture into tiles only where it is the one picture of a conversation. Of
several, each becomes a single tile there and is cut here; the card says so. Its videos are no part
of a composition.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from mmlm.errors import CheckpointError
from mmlm.hub.classes.llava import (
    activation_of,
    bias_of,
    layer_of,
    read_projector,
    strategy_of,
)
from mmlm.hub.classes.llava_next import LlavaNext, pinpoints
from mmlm.hub.classes.perception_lm import named_tokens
from mmlm.hub.stock import RESAMPLE, read_count, stock_classes, text_of, tower_of
from mmlm.images import TilesConfig
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor

_RULE = "anyres_max_"


@stock_classes.register("llava_onevision")
class LlavaOneVision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`."""

    class_name = "LlavaOnevisionForConditionalGeneration"
    model_type = "llava_onevision"
    parts = "LLaVA with image tiles under the rule anyres, and shrink_above (9 in the paper)"
    rank = 6
    caveat = "of several pictures in one conversation, the stock class shows each as a single tile"

    def _shrink_reasons(self, config: MMLMConfig) -> list[str]:
        policy, facts = config.image_policy, config.facts
        reasons: list[str] = []
        if not isinstance(policy, TilesConfig) or policy.shrink_above is None:
            reasons.append("image.shrink_above is not set (LLaVA-OneVision shrinks large maps)")
        if facts.grid[0] != facts.grid[1]:
            reasons.append(f"the grid of {facts.grid[0]} x {facts.grid[1]} is no square")
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `LlavaOnevisionConfig`."""
        from transformers import LlavaOnevisionConfig

        layer = layer_of(config)
        assert layer is not None  # `why_not` has seen to it
        return LlavaOnevisionConfig(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_index=config.image_token_id,
            video_token_index=config.text_config.pad_token_id,
            image_grid_pinpoints=pinpoints(config),
            vision_aspect_ratio=_rule(config),
            projector_hidden_act=activation_of(config),
            multimodal_projector_bias=bias_of(config),
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy_of(config.facts),
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def named_tokens(self, processor: MMLMProcessor) -> dict[str, str]:
        """Return the tokens that the processor asks for by name."""
        return named_tokens(processor)

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `LlavaOnevisionProcessor`."""
        from transformers import (
            LlavaOnevisionImageProcessor,
            LlavaOnevisionProcessor,
            LlavaOnevisionVideoProcessor,
        )

        facts = config.facts
        pixels: dict[str, Any] = {
            "size": {"height": facts.side[0], "width": facts.side[0]},
            "resample": RESAMPLE[facts.resample],
            "image_mean": list(facts.mean),
            "image_std": list(facts.std),
        }
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(
                **pixels, image_grid_pinpoints=pinpoints(config)
            ),
            tokenizer=tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(**pixels),
            num_image_tokens=facts.grid[0] * facts.grid[1] + facts.num_prefix,
            vision_feature_select_strategy=strategy_of(facts),
            chat_template=processor.chat.template,
            image_token=processor.image_token,
            vision_aspect_ratio=_rule(config),
        )

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a LLaVA-OneVision folder describes."""
        layer, tower = stock.vision_feature_layer, stock.vision_config
        most = str(stock.vision_aspect_ratio).removeprefix(_RULE)
        if not most.isdigit() or not int(most):
            raise CheckpointError(
                f"{origin}/config.json: `vision_aspect_ratio` {stock.vision_aspect_ratio!r} should "
                f"be {_RULE} and a number of tiles, such as {_RULE}9. Mend the file, or download "
                f"it again."
            )
        rows = tower.image_size // tower.patch_size
        prefix = max(0, read_count(processor, "num_image_tokens", origin=origin) - rows * rows)
        config = self.compose(
            stock,
            {**processor, "num_additional_image_tokens": prefix},
            feature=f"hidden_states[{layer}]",
            layer=layer,
            dropped=1 if stock.vision_feature_select_strategy == "default" else 0,
            reducer=None,
            connector=read_projector(stock),
            image_token_id=stock.image_token_index,
            origin=origin,
        )
        config.image = {**config.image, "shrink_above": int(most)}
        return config


def _rule(config: MMLMConfig) -> str:
    """Return the rule of shrinking in the words of the class."""
    policy = config.image_policy
    assert isinstance(policy, TilesConfig)  # `why_not` has seen to it
    return f"{_RULE}{policy.shrink_above}"
