"""HyperCLOVA X Vision 2: the encoder of Qwen2.5-VL and one linear layer, with any language model.

The way to give Qwen's encoder to another language model as a stock class: its positions stay those
of text. A picture more than 200 times as long as it is wide is refused by its processor and taken
here. Its videos are no part of a composition.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mmlm.connectors import LinearConnectorConfig
from mmlm.errors import CheckpointError
from mmlm.hub.classes.lfm2_vl import native_reasons
from mmlm.hub.classes.perception_lm import named_tokens
from mmlm.hub.classes.projected import need_plain_processor
from mmlm.hub.keymaps import KeyMap
from mmlm.hub.stock import (
    CONNECTOR,
    HEAD,
    LANGUAGE,
    RESAMPLE,
    TOWER,
    StockClass,
    common_reasons,
    read_normalisation,
    stock_classes,
    text_of,
    tower_of,
)
from mmlm.hub.weights import read_json
from mmlm.images import NativeConfig
from mmlm.language import IMAGE_TOKEN
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor
from mmlm.vision.hf_facts import PixelFacts
from mmlm.vision.qwen_vit import MODEL_TYPES, facts_of

_TOKENIZER = "tokenization_as_written"


@stock_classes.register("hyperclovax_vision")
class HyperCLOVAXVision(StockClass):
    """`HyperCLOVAXVisionV2ForConditionalGeneration`."""

    class_name = "HyperCLOVAXVisionV2ForConditionalGeneration"
    model_type = "hyperclovax_vision_v2"
    parts = "the encoder of Qwen2.5-VL; image native with rule smart; linear with bias"
    rank = 30

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + native_reasons(config, "HyperCLOVA X Vision")
        tower = config.vision_config
        if tower is None or tower.model_type not in MODEL_TYPES:
            reasons.append("the encoder is not that of Qwen2.5-VL")
        if config.reducer is not None:
            reasons.append(f"reducer {config.reducer['use']!r} (the encoder merges by itself)")
        if config.connector_part != LinearConnectorConfig():
            reasons.append("the connector is not linear with bias: true")
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `HyperCLOVAXVisionV2Config`."""
        from transformers import HyperCLOVAXVisionV2Config

        # The class multiplies its logits by what the text's config says, and wants it said.
        return HyperCLOVAXVisionV2Config(
            vision_config=tower_of(config),
            text_config={"logits_scaling": 1.0, **text_of(config)},
            image_token_id=config.image_token_id,
            video_token_id=config.text_config.pad_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def named_tokens(self, processor: MMLMProcessor) -> dict[str, str]:
        """Return the tokens that the processor asks for by name."""
        return named_tokens(processor)

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `HyperCLOVAXVisionV2Processor`."""
        from transformers import (
            HyperCLOVAXVisionV2Processor,
            Qwen2VLImageProcessor,
            Qwen2VLVideoProcessor,
        )

        facts, policy = config.facts, config.image_policy
        tower: Any = config.vision_config
        assert isinstance(policy, NativeConfig)  # `why_not` has seen to it
        area = facts.step**2
        pixels: dict[str, Any] = {
            "size": {
                "shortest_edge": policy.min_tokens * area,
                "longest_edge": policy.max_tokens * area,
            },
            "patch_size": tower.patch_size,
            "merge_size": tower.spatial_merge_size,
            "temporal_patch_size": tower.temporal_patch_size,
            "resample": RESAMPLE[facts.resample],
            "image_mean": list(facts.mean),
            "image_std": list(facts.std),
        }
        return HyperCLOVAXVisionV2Processor(
            image_processor=Qwen2VLImageProcessor(**pixels),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(**pixels),
            chat_template=processor.chat.template,
        )

    def finish(self, folder: Path) -> None:
        """Let transformers read the tokenizer as it is.

        For this class it would take GPT-2's rules, whatever the folder says, unless the folder
        names a tokenizer of its own. It then reads `tokenizer.json` where the code is not trusted,
        and where it is, through one line that names the same class.
        """
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values["auto_map"] = {"AutoTokenizer": [None, f"{_TOKENIZER}.Tokenizer"]}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        line = "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
        (folder / f"{_TOKENIZER}.py").write_text(line, encoding="utf-8")

    def key_map(self, config: MMLMConfig) -> KeyMap:
        """Return the pairs of our prefixes and those of the class in memory."""
        return KeyMap(
            (
                (LANGUAGE, "model.language_model."),
                (HEAD, "lm_head."),
                (TOWER, "model.vision_model."),
                (f"{CONNECTOR}linear.", "model.projector."),
            )
        )

    def reads(self, folder: Path) -> bool:
        """Whether the placeholder is that of MMLM; published folders have marks around theirs."""
        wanted = read_json(folder / "config.json").get("image_token_id")
        tokens = read_json(folder / "tokenizer.json").get("added_tokens") or []
        return any(one["content"] == IMAGE_TOKEN and one["id"] == wanted for one in tokens)

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a HyperCLOVA X Vision folder describes."""
        need_plain_processor(processor, self.class_name, origin=origin)
        scaling = getattr(stock.text_config, "logits_scaling", 1.0)
        if scaling != 1.0:
            raise CheckpointError(
                f"{origin}/config.json: `logits_scaling` {scaling} changes the logits behind the "
                f"head, which MMLM reads with 1.0 alone. Load the folder with transformers."
            )
        values = processor.get("image_processor") or {}
        file = f"{origin}/processor_config.json"
        seen = read_normalisation(values, origin=file)
        pixels = PixelFacts(tuple(seen["mean"]), tuple(seen["std"]), seen["resample"])
        facts = facts_of(stock.vision_config, None, pixels)
        size, area = values.get("size") or {}, facts.step**2
        budget: list[Any] = [size.get(f"{end}_edge") for end in ("shortest", "longest")]
        if not all(isinstance(count, int) and count >= area for count in budget):
            raise CheckpointError(
                f"{file}: `size` must hold `shortest_edge` and `longest_edge`, the least and most "
                f"pixels of a picture, each at least {area} (got {size}). Mend the file, or "
                f"download it again."
            )
        return MMLMConfig(
            text_config=stock.text_config,
            vision_config=stock.vision_config,
            image={
                "use": "native",
                "min_tokens": budget[0] // area,
                "max_tokens": budget[1] // area,
            },
            vision={"use": "hf", "checkpoint": origin, "layer": "last"},
            vision_facts=facts.to_dict(),
            connector={"use": "linear"},
            image_token_id=stock.image_token_id,
            tie_word_embeddings=stock.tie_word_embeddings,
        )
