"""Mistral 3: Pixtral at the picture's own proportions, normed patches merged, an MLP.

Its processor would write a token behind each row and one behind the picture; they are written as
empty, so that the placeholders stand alone. The matrix that merges has the channel before the
place in its rows, where ours has the place first. A strip that is thinner than one pixel after
shrinking has no tokens there and one row of them here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from mmlm.connectors import PatchMergerConnectorConfig
from mmlm.errors import CheckpointError
from mmlm.hub.classes.llava import layer_of
from mmlm.hub.classes.projected import PROJECTOR, Projected, need_plain_processor
from mmlm.hub.stock import (
    CONNECTOR,
    RESAMPLE,
    common_reasons,
    read_normalisation,
    stock_classes,
    text_of,
    tower_of,
)
from mmlm.hub.weights import read_json
from mmlm.images import NativeConfig
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor
from mmlm.vision import VisionFacts

_MERGE = f"{CONNECTOR}merge.weight"


@stock_classes.register("mistral3")
class Mistral3(Projected):
    """`Mistral3ForConditionalGeneration`."""

    class_name = "Mistral3ForConditionalGeneration"
    model_type = "mistral3"
    parts = (
        "Pixtral with `layer: last`; image native with rule long_side; patch_merger with the eps "
        "of the language model's norms"
    )
    rank = 30

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + _image_reasons(config)
        tower = config.vision_config
        if tower is None or tower.model_type != "pixtral":
            reasons.append("the encoder is not Pixtral")
        elif layer_of(config) is None:
            reasons.append(f"the feature is {config.facts.feature}, which is no hidden state")
        if config.reducer is not None:
            reasons.append(f"reducer {config.reducer['use']!r} (Mistral 3 merges in its projector)")
        connector = config.connector_part
        eps = getattr(config.text_config, "rms_norm_eps", None)
        if not isinstance(connector, PatchMergerConnectorConfig):
            reasons.append(f"connector {connector.use!r} (the projector is patch_merger)")
        elif connector.eps != eps:
            reasons.append(
                f"connector.eps is {connector.eps}, and the projector takes the language model's "
                f"rms_norm_eps, {eps}"
            )
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `Mistral3Config`."""
        from transformers import Mistral3Config

        connector, layer = _connector(config), layer_of(config)
        assert layer is not None  # `why_not` has seen to it
        return Mistral3Config(
            vision_config=tower_of(config),
            text_config=text_of(config),
            image_token_index=config.image_token_id,
            projector_hidden_act=connector.activation,
            multimodal_projector_bias=connector.bias,
            spatial_merge_size=connector.factor,
            vision_feature_layer=layer,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `PixtralProcessor` that writes no marks."""
        from transformers import PixtralImageProcessor, PixtralProcessor

        facts, policy = config.facts, config.image_policy
        assert isinstance(policy, NativeConfig)  # `why_not` has seen to it
        patch: dict[str, Any] = {"patch_size": {"height": facts.stride, "width": facts.stride}}
        pixels = PixtralImageProcessor(
            size={"longest_edge": policy.long_side_px},
            resample=RESAMPLE[facts.resample],
            image_mean=list(facts.mean),
            image_std=list(facts.std),
            **patch,
        )
        return PixtralProcessor(
            image_processor=pixels,
            tokenizer=tokenizer,
            patch_size=facts.stride,
            spatial_merge_size=_connector(config).factor,
            chat_template=processor.chat.template,
            image_token=processor.image_token,
            image_break_token="",
            image_end_token="",
        )

    def projector_pairs(self, config: MMLMConfig) -> list[tuple[str, str]]:
        """Return the pairs for norm, merging matrix and layers."""
        return [
            (f"{CONNECTOR}norm.", f"{PROJECTOR}norm."),
            (f"{CONNECTOR}merge.", f"{PROJECTOR}patch_merger.merging_layer."),
            (f"{CONNECTOR}layers.0.", f"{PROJECTOR}linear_1."),
            (f"{CONNECTOR}layers.2.", f"{PROJECTOR}linear_2."),
        ]

    def to_stock(self, state: Mapping[str, Tensor], config: MMLMConfig) -> dict[str, Tensor]:
        """Return our tensors under the published names, the channel before the place."""
        weight, area = state[_MERGE], _connector(config).factor ** 2
        turned = weight.unflatten(1, (area, -1)).transpose(1, 2).flatten(1)
        return super().to_stock({**state, _MERGE: turned.contiguous()}, config)

    def to_ours(
        self, state: Mapping[str, Tensor], config: MMLMConfig, *, origin: str
    ) -> dict[str, Tensor]:
        """Return published tensors under our names, the place before the channel."""
        ours = super().to_ours(state, config, origin=origin)
        weight, area = ours.get(_MERGE), _connector(config).factor ** 2
        if weight is not None and weight.ndim == 2 and weight.shape[1] % area == 0:
            ours[_MERGE] = weight.unflatten(1, (-1, area)).transpose(1, 2).flatten(1).contiguous()
        return ours

    def reads(self, folder: Path) -> bool:
        """Whether no tokens stand behind rows and pictures, as in published folders they do."""
        values = read_json(folder / "processor_config.json")
        marks = [values.get(f"image_{end}_token", "there by default") for end in ("break", "end")]
        return marks == ["", ""]

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a Mistral 3 folder describes."""
        need_plain_processor(processor, self.class_name, origin=origin)
        file, values = f"{origin}/processor_config.json", processor.get("image_processor") or {}
        if processor.get("image_break_token") or processor.get("image_end_token"):
            raise CheckpointError(
                f"{file}: this Mistral 3 writes tokens behind rows and pictures, for which MMLM "
                f"has no image policy. Take it whole (`whole: true`), or name its language model "
                f"and encoder in a recipe."
            )
        longest = (values.get("size") or {}).get("longest_edge")
        tower, layer = stock.vision_config, stock.vision_feature_layer
        if not isinstance(longest, int) or not isinstance(layer, int):
            raise CheckpointError(
                f"{file}: `size` must hold a `longest_edge` in pixels (got {values.get('size')}), "
                f"and `vision_feature_layer` of config.json one number (got {layer}). Mend the "
                f"files, or load the folder with transformers."
            )
        patch, factor = tower.patch_size, stock.spatial_merge_size
        side, seen = tower.image_size // patch, read_normalisation(values, origin=file)
        facts = VisionFacts(
            width=tower.hidden_size,
            side=(side * patch, side * patch),
            grid=(side, side),
            patch=patch,
            stride=patch,
            mean=tuple(seen["mean"]),
            std=tuple(seen["std"]),
            resample=seen["resample"],
            rule="multiple",
            step=patch,
            feature=f"hidden_states[{layer}]",
        )
        image = {"use": "native", "rule": "long_side", "long_side_px": longest}
        return MMLMConfig(
            text_config=stock.text_config,
            vision_config=tower,
            image={**image, "max_tokens": math.ceil(longest / (patch * factor)) ** 2},
            vision={"use": "hf", "checkpoint": origin, "layer": layer},
            vision_facts=facts.to_dict(),
            connector={
                "use": "patch_merger",
                "factor": factor,
                "activation": stock.projector_hidden_act,
                "bias": stock.multimodal_projector_bias,
                "eps": stock.text_config.rms_norm_eps,
            },
            image_token_id=stock.image_token_index,
            tie_word_embeddings=stock.tie_word_embeddings,
        )


def _image_reasons(config: MMLMConfig) -> list[str]:
    """Return why Pixtral's processor does not give the pixels of this policy."""
    policy = config.image_policy
    if not isinstance(policy, NativeConfig) or policy.rule != "long_side":
        return [
            f"image policy {policy.use!r} (Mistral 3 keeps proportions: "
            f"`{{use: native, rule: long_side}}`)"
        ]
    reasons: list[str] = []
    if policy.read:
        reasons.append(f"image.read sets {', '.join(policy.read)}, which no stock processor holds")
    if policy.layout != "plain":
        reasons.append(f"image native has the layout {policy.layout}; the stock class has plain")
    most = math.ceil(policy.long_side_px / config.counter().step) ** 2
    if policy.max_tokens < most:
        reasons.append(
            f"image.max_tokens {policy.max_tokens} cuts below the {most} that `long_side_px` "
            f"{policy.long_side_px} allows, which the stock processor does not do"
        )
    return reasons


def _connector(config: MMLMConfig) -> PatchMergerConnectorConfig:
    connector = config.connector_part
    assert isinstance(connector, PatchMergerConnectorConfig)  # `why_not` has seen to it
    return connector
