"""LFM2-VL: SigLIP 2 at the picture's own proportions, neighbours stacked, two layers of any width.

The most general stock class: any aspect, any language model. Its processor would set marks
around a picture; they are written as empty, so that the placeholders stand alone. A strip that is
thinner than half of a cell may become a few tokens more or fewer there than here.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from mmlm.connectors import NormMLPConnectorConfig
from mmlm.errors import CheckpointError
from mmlm.hub.classes.projected import (
    PROJECTOR,
    Projected,
    factor_of,
    last_feature_reasons,
)
from mmlm.hub.stock import (
    CONNECTOR,
    RESAMPLE,
    common_reasons,
    read_normalisation,
    stock_classes,
    text_of,
    tower_of,
)
from mmlm.images import NativeConfig
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor
from mmlm.reducers import PixelShuffleConfig
from mmlm.vision import VisionFacts

_EPS = 1e-5


@stock_classes.register("lfm2_vl")
class Lfm2VL(Projected):
    """`Lfm2VlForConditionalGeneration`."""

    class_name = "Lfm2VlForConditionalGeneration"
    model_type = "lfm2_vl"
    parts = (
        "SigLIP 2 NaFlex with `layer: last`; image native with rule smart; pixel_shuffle or none; "
        "norm_mlp of depth 2 with any hidden width, with or without its norm"
    )
    rank = 20

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + native_reasons(config, "LFM2-VL")
        tower = config.vision_config
        if tower is None or tower.model_type != "siglip2_vision_model":
            reasons.append("the encoder is not SigLIP 2 of flexible resolution (NaFlex)")
        reasons += last_feature_reasons(config, "LFM2-VL")
        reducer, connector = config.reducer_part, config.connector_part
        if reducer is not None and not isinstance(reducer, PixelShuffleConfig):
            reasons.append(f"reducer {reducer.use!r} (LFM2-VL stacks neighbours: pixel_shuffle)")
        fits = (
            isinstance(connector, NormMLPConnectorConfig)
            and connector.num_layers == 2
            and connector.norms < 2
            and (connector.norms == 0 or (connector.norm == "layer" and connector.eps == _EPS))
        )
        if not fits:
            reasons.append("the connector is not norm_mlp of depth 2 with at most one layer norm")
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return an `Lfm2VlConfig`."""
        from transformers import Lfm2VlConfig

        connector = _connector(config)
        hidden = connector.hidden_widths or (config.text_config.hidden_size,)
        return Lfm2VlConfig(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_id=config.image_token_id,
            downsample_factor=factor_of(config),
            projector_hidden_act=connector.activation,
            projector_hidden_size=hidden[0],
            projector_bias=connector.bias,
            projector_use_layernorm=connector.norms == 1,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def named_tokens(self, processor: MMLMProcessor) -> dict[str, str]:
        """Return the placeholder, and empty marks around it."""
        return {
            "image_token": processor.image_token,
            "image_start_token": "",
            "image_end_token": "",
        }

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return an `Lfm2VlProcessor` that never splits a picture."""
        from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

        facts, policy, factor = config.facts, config.image_policy, factor_of(config)
        assert isinstance(policy, NativeConfig)  # `why_not` has seen to it
        pixels = Lfm2VlImageProcessor(
            downsample_factor=factor,
            do_image_splitting=False,
            min_tiles=1,
            max_tiles=1,
            use_thumbnail=False,
            min_image_tokens=policy.min_tokens,
            max_image_tokens=policy.max_tokens,
            encoder_patch_size=facts.stride,
            tile_size=facts.stride * factor,
            resample=RESAMPLE[facts.resample],
            image_mean=list(facts.mean),
            image_std=list(facts.std),
        )
        return Lfm2VlProcessor(pixels, tokenizer, chat_template=processor.chat.template)

    def projector_pairs(self, config: MMLMConfig) -> list[tuple[str, str]]:
        """Return the pairs for norm and layers."""
        norms = _connector(config).norms
        layers = [(norms, "linear_1."), (norms + 2, "linear_2.")]
        layers += [(0, "layer_norm.")] if norms else []
        return [(f"{CONNECTOR}layers.{index}.", PROJECTOR + name) for index, name in layers]

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that an LFM2-VL folder describes."""
        values = processor.get("image_processor") or {}
        if values.get("do_image_splitting") is not False:
            raise CheckpointError(
                f"{origin}/processor_config.json: `do_image_splitting` is on, for which MMLM has "
                f"no image policy with LFM2-VL's marks. Load the folder with transformers."
            )
        tower = stock.vision_config
        rows, patch = round(tower.num_patches**0.5), tower.patch_size
        seen = read_normalisation(values, origin=f"{origin}/processor_config.json")
        facts = VisionFacts(
            width=tower.hidden_size,
            side=(rows * patch, rows * patch),
            grid=(rows, rows),
            patch=patch,
            stride=patch,
            mean=tuple(seen["mean"]),
            std=tuple(seen["std"]),
            resample=seen["resample"],
            rule="multiple",
            step=patch,
            feature="last_hidden_state",
        )
        budget = {f"{end}_tokens": values[f"{end}_image_tokens"] for end in ("min", "max")}
        factor = stock.downsample_factor
        return MMLMConfig(
            text_config=stock.text_config,
            vision_config=tower,
            image={"use": "native", "rule": "smart", **budget},
            vision={"use": "hf", "checkpoint": origin, "layer": "last"},
            vision_facts=facts.to_dict(),
            reducer={"use": "pixel_shuffle", "factor": factor} if factor > 1 else None,
            connector={
                "use": "norm_mlp",
                "hidden_widths": [stock.projector_hidden_size],
                "norms": int(stock.projector_use_layernorm),
                "activation": stock.projector_hidden_act,
                "bias": stock.projector_bias,
            },
            image_token_id=stock.image_token_id,
            tie_word_embeddings=stock.tie_word_embeddings,
        )


def native_reasons(config: MMLMConfig, name: str) -> list[str]:
    """Return why a processor that keeps proportions does not give the pixels of this policy."""
    policy = config.image_policy
    if not isinstance(policy, NativeConfig):
        return [
            f"image policy {policy.use!r} ({name} keeps proportions: "
            f"`{{use: native, rule: smart}}`)"
        ]
    reasons: list[str] = []
    if policy.read:
        reasons.append(f"image.read sets {', '.join(policy.read)}, which no stock processor holds")
    if policy.rule != "smart" or policy.layout != "plain":
        reasons.append("image native has another rule than smart, or another layout than plain")
    return reasons


def _connector(config: MMLMConfig) -> NormMLPConnectorConfig:
    connector = config.connector_part
    assert isinstance(connector, NormMLPConnectorConfig)  # `why_not` has seen to it
    return connector
