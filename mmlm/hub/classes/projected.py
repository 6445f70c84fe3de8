"""What the classes with one tower, one projector and one language model have in common.

    model.vision_tower ─► model.multi_modal_projector ─► model.language_model ─► lm_head

InternVL, AyaVision, Cohere2Vision, PaliGemma and Gemma 3 are such classes. They take plain
pixels, so that a `LlavaProcessor` serves them all, as it serves FastVLM: the placeholders stand
alone in the text, without the marks that a family's own processor would put around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from mmlm.errors import CheckpointError
from mmlm.hub.classes.llava import llava_processor, read_facts, read_policy
from mmlm.hub.keymaps import KeyMap
from mmlm.hub.stock import HEAD, LANGUAGE, TOWER, StockClass
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor
from mmlm.reducers import PixelShuffleConfig

PROJECTOR = "model.multi_modal_projector."
_PLAIN = (
    "LlavaProcessor",
    "LlavaNextProcessor",
    "LlavaOnevisionProcessor",
    "PerceptionLMProcessor",
    "PixtralProcessor",
    "HyperCLOVAXVisionV2Processor",
)
_OLDER = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", PROJECTOR),
)


class Projected(StockClass):
    """A stock class of one tower, one projector and one language model."""

    def projector_pairs(self, config: MMLMConfig) -> list[tuple[str, str]]:
        """Return the pairs for the connector's layers."""
        raise NotImplementedError

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `LlavaProcessor`, which counts what the reducer leaves."""
        return llava_processor(config, processor, tokenizer, factor=factor_of(config))

    def key_map(self, config: MMLMConfig) -> KeyMap:
        """Return the pairs of our prefixes and those of the class in memory."""
        return KeyMap(
            (
                (LANGUAGE, "model.language_model."),
                (HEAD, "lm_head."),
                (TOWER, "model.vision_tower."),
                *self.projector_pairs(config),
            )
        )

    def to_ours(
        self, state: Mapping[str, Tensor], config: MMLMConfig, *, origin: str
    ) -> dict[str, Tensor]:
        """Return published tensors under our names, whichever layout they have."""
        return super().to_ours(in_memory_names(state), config, origin=origin)

    def compose(
        self,
        stock: PretrainedConfig,
        processor: dict[str, Any],
        *,
        feature: str,
        layer: int | str,
        dropped: int,
        connector: dict[str, Any],
        reducer: dict[str, Any] | None,
        image_token_id: int,
        origin: str,
    ) -> MMLMConfig:
        """Return the composition of a folder with a `LlavaProcessor`.

        Raises:
            CheckpointError: if the folder has another processor.
        """
        need_plain_processor(processor, self.class_name, origin=origin)
        tower = self.our_tower(stock)
        assert tower is not None
        facts = read_facts(
            processor,
            width=tower.hidden_size,
            patch=_side(tower.patch_size),
            dropped=dropped,
            feature=feature,
            factor=1 if reducer is None else reducer["factor"],
            origin=origin,
        )
        return MMLMConfig(
            text_config=stock.text_config,
            vision_config=tower,
            image=read_policy(processor, origin=origin)["image"],
            vision={"use": "hf", "checkpoint": origin, "layer": layer},
            vision_facts=facts.to_dict(),
            reducer=reducer,
            connector=connector,
            image_token_id=image_token_id,
            tie_word_embeddings=bool(stock.tie_word_embeddings),
        )


def need_plain_processor(processor: dict[str, Any], class_name: str, *, origin: str) -> None:
    """Refuse a folder whose processor writes marks around the placeholders.

    Raises:
        CheckpointError: naming the processor.
    """
    name = processor.get("processor_class")
    if name not in _PLAIN:
        raise CheckpointError(
            f"{origin}/processor_config.json: the {class_name} in this folder is read by a "
            f"{name}, which writes its own marks around image tokens; MMLM reads the class with a "
            f"LlavaProcessor, as it writes it. Load the folder with transformers, or name its "
            f"language model and encoder in a recipe."
        )


def in_memory_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names of the class in memory, from older layouts too."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for old, new in _OLDER:
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        deeper = "model.vision_tower.vision_model."
        if key.startswith(deeper):
            key = "model.vision_tower." + key.removeprefix(deeper)
        renamed[key] = value
    return renamed


def factor_of(config: MMLMConfig) -> int:
    """Return by how much the reducer divides rows and columns."""
    return int(getattr(config.reducer_part, "factor", 1))


def square_reasons(config: MMLMConfig, name: str) -> list[str]:
    """Return why a class that takes the root of the number of features would cut them wrongly."""
    facts = config.facts
    reasons: list[str] = []
    if facts.grid[0] != facts.grid[1]:
        reasons.append(
            f"the grid is {facts.grid[0]} x {facts.grid[1]} ({name} takes it to be a square)"
        )
    if facts.kept_prefix:
        reasons.append(
            f"{facts.kept_prefix} prefix tokens are kept, with which {name} has no grid (set "
            f"`vision.prefix: drop`)"
        )
    return reasons


def shuffle_reasons(config: MMLMConfig, name: str) -> list[str]:
    """Return why a class that stacks squares of neighbours cannot hold this reducer."""
    reducer = config.reducer_part
    if not isinstance(reducer, PixelShuffleConfig):
        return [f"there is no `reducer: {{use: pixel_shuffle}}` before the projector of {name}"]
    rows, columns = config.facts.grid
    if rows % reducer.factor or columns % reducer.factor:
        return [
            f"the grid of {rows} x {columns} is filled with zeros until {reducer.factor} divides "
            f"it, which {name} does not do (choose a `vision.side_px` with an even grid)"
        ]
    return []


def last_feature_reasons(config: MMLMConfig, name: str) -> list[str]:
    """Return why a class that reads the tower's output after its last norm cannot hold it."""
    facts = config.facts
    reasons: list[str] = []
    if facts.feature != "last_hidden_state":
        reasons.append(
            f"the feature is {facts.feature}, and {name} takes the output after the last norm "
            f"(set `vision.layer: last`)"
        )
    if facts.kept_prefix != facts.num_prefix:
        reasons.append(f"prefix tokens are dropped, and {name} hands all tokens on")
    return reasons


def _side(patch: Any) -> int | None:
    """Return the side of a patch, which some configs give as a pair."""
    if isinstance(patch, list | tuple) and patch:
        patch = patch[0]
    return patch if isinstance(patch, int) else None
