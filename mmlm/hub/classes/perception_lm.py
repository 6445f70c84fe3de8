"""PerceptionLM: a ViT of timm and a two-layer projector. Its processor gives one tile a row.

`PerceptionLMProcessor` in its single-tile mode squashes a picture to a square, and hands pixels
on as pictures × tiles, which Idefics3 wants too.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from mmlm.connectors import MLPConnectorConfig
from mmlm.errors import CheckpointError
from mmlm.hub.classes.llava import read_facts, read_policy
from mmlm.hub.classes.projected import PROJECTOR, Projected, need_plain_processor
from mmlm.hub.stock import (
    CONNECTOR,
    RESAMPLE,
    common_reasons,
    grid_reasons,
    image_reasons,
    stock_classes,
    text_of,
    tower_of,
)
from mmlm.images import SquashConfig
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor


@stock_classes.register("perception_lm")
class PerceptionLM(Projected):
    """`PerceptionLMForConditionalGeneration`."""

    class_name = "PerceptionLMForConditionalGeneration"
    model_type = "perception_lm"
    parts = "a ViT of timm with `feature: final`, squashed squares; mlp of depth 2 with GELU"
    rank = 15

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + grid_reasons(config)
        reasons += tile_reasons(config, "PerceptionLM")
        facts, tower = config.facts, config.vision_config
        if tower is None or tower.model_type != "timm_wrapper":
            reasons.append("the encoder is not of timm (`vision: {use: timm, feature: final}`)")
        elif facts.feature != "final":
            reasons.append(f"the feature is {facts.feature} (PerceptionLM takes `feature: final`)")
        elif not facts.patch:
            reasons.append("the encoder is no ViT: its output is a map and no tokens")
        if facts.num_prefix - facts.kept_prefix > 1:
            reasons.append("several prefix tokens are dropped, and PerceptionLM drops one")
        if config.reducer is not None:
            reasons.append(f"reducer {config.reducer['use']!r} (it pools behind the projector)")
        if config.connector_part != MLPConnectorConfig():
            reasons.append("the connector is not mlp with depth 2, gelu and bias")
        if facts.kept_prefix:
            reasons.append("prefix tokens are kept (its processor counts patches alone)")
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `PerceptionLMConfig`."""
        from transformers import PerceptionLMConfig

        tower = tower_of(config)
        tower["model_args"] = {**(tower.get("model_args") or {}), "embed_dim": config.facts.width}
        return PerceptionLMConfig(
            vision_config=tower,
            text_config=text_of(config),
            vision_use_cls_token=bool(config.facts.num_prefix),
            projector_pooling_ratio=1,
            image_token_id=config.image_token_id,
            video_token_id=config.text_config.pad_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def named_tokens(self, processor: MMLMProcessor) -> dict[str, str]:
        """Return the tokens that the processor asks for by name."""
        return named_tokens(processor)

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `PerceptionLMProcessor` in its single-tile mode."""
        return tile_processor(config, processor, tokenizer)

    def projector_pairs(self, config: MMLMConfig) -> list[tuple[str, str]]:
        """Return the pairs for the two layers."""
        return [
            (f"{CONNECTOR}layers.0.", f"{PROJECTOR}linear_1."),
            (f"{CONNECTOR}layers.2.", f"{PROJECTOR}linear_2."),
        ]

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a PerceptionLM folder describes."""
        if stock.projector_pooling_ratio != 1:
            raise CheckpointError(
                f"{origin}/config.json: `projector_pooling_ratio` {stock.projector_pooling_ratio} "
                f"pools behind the projector, for which MMLM has no part. Load the folder with "
                f"transformers."
            )
        tower = stock.vision_config
        facts = read_tile_facts(
            processor,
            width=tower.model_args["embed_dim"],
            num_prefix=int(stock.vision_use_cls_token),
            feature="final",
            origin=origin,
        )
        return MMLMConfig(
            text_config=stock.text_config,
            vision_config=tower,
            image=read_policy(processor, origin=origin)["image"],
            vision={"use": "timm", "checkpoint": tower.architecture, "feature": "final"},
            vision_facts=facts.to_dict(),
            connector={"use": "mlp"},
            image_token_id=stock.image_token_id,
            tie_word_embeddings=stock.tie_word_embeddings,
        )


def tile_reasons(config: MMLMConfig, name: str) -> list[str]:
    """Return why the single-tile processor does not give the pixels of this composition."""
    facts = config.facts
    reasons = image_reasons(config)
    if not reasons and not isinstance(config.image_policy, SquashConfig):
        reasons.append(f"image policy {config.image_policy.use!r} ({name} squashes pictures)")
    if facts.side[0] != facts.side[1]:
        reasons.append(f"the side of {facts.side[0]} x {facts.side[1]} is no square")
    return reasons


def named_tokens(processor: MMLMProcessor) -> dict[str, str]:
    """Name the placeholder, and a token for videos that no prompt holds: padding."""
    return {"image_token": processor.image_token, "video_token": processor.tokenizer.pad_token}


def tile_processor(
    config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any, *, factor: int = 1
) -> Any:
    """Return the `PerceptionLMProcessor` that gives the same tokens and pixels as ours."""
    from transformers import (
        PerceptionLMImageProcessor,
        PerceptionLMProcessor,
        PerceptionLMVideoProcessor,
    )

    facts = config.facts
    side = facts.side[0]
    pixels: dict[str, Any] = {
        "size": {"height": side, "width": side},
        "resample": RESAMPLE[facts.resample],
        "image_mean": list(facts.mean),
        "image_std": list(facts.std),
    }
    return PerceptionLMProcessor(
        image_processor=PerceptionLMImageProcessor(
            **pixels, vision_input_type="vanilla", tile_size=side, max_num_tiles=1
        ),
        video_processor=PerceptionLMVideoProcessor(**pixels),
        tokenizer=tokenizer,
        patch_size=facts.stride,
        pooling_ratio=factor,
        chat_template=processor.chat.template,
    )


def read_tile_facts(
    processor: dict[str, Any], *, width: int, num_prefix: int, feature: str, origin: str
) -> Any:
    """Return the facts of the encoder that a folder with that processor describes."""
    need_plain_processor(processor, "model", origin=origin)
    values = {**processor, "num_additional_image_tokens": num_prefix}
    facts = read_facts(
        values, width=width, patch=None, dropped=num_prefix, feature=feature, origin=origin
    )
    return facts.model_copy(update={"patch": facts.stride})
