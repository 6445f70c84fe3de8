"""Which compositions equal a class that transformers already has, and how to write them as it.

    config.json of MMLM ──► why_not ──► [] ──► stock config, processor, key map ──► save
                                       └► the conditions that fail, in the user's words

A stock class is a part like any other: one module in `mmlm.hub.classes` with one config in the
registry `stock_classes`. `why_not` needs no weights, so that `mmlm check` can say before a
training which class will be written after it. What is written here is a promise; that it holds
is asserted on logits by `mmlm.hub.parity` each time a folder is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from mmlm.config import PartConfig
from mmlm.errors import CheckpointError, ConfigError
from mmlm.hub.keymaps import KeyMap
from mmlm.images import CropConfig, LetterboxConfig, SquashConfig
from mmlm.messages import Message, to_openai
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor
from mmlm.registry import Registry

LANGUAGE, HEAD = "model.language.", "lm_head."
COMPOSITION = (
    "image", "video", "vision", "vision_facts", "reducer", "connector", "head", "sources",
)  # fmt: skip
"""What of our config a folder of a stock class keeps beside it."""

TOWER, CONNECTOR = "model.vision.tower.", "model.connector."


class StockClass(PartConfig):
    """One class of transformers that a composition may equal."""

    class_name: ClassVar[str]
    """The class, as `architectures` in config.json names it."""

    model_type: ClassVar[str]
    """The `model_type` of its config."""

    parts: ClassVar[str]
    """The composition that it equals, in a line, for `mmlm check` and the docs."""

    caveat: ClassVar[str] = ""
    """Where the class treats something else than one picture otherwise, in a few words."""

    keeps_template: ClassVar[bool] = True
    """Whether its processor keeps the chat template, so that it is asked with messages."""

    rank: ClassVar[int] = 100
    """Where several classes compute the same, the lowest rank is written: the best known one."""

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet; empty if it equals."""
        raise NotImplementedError

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return the config of the stock class for a composition that equals it."""
        raise NotImplementedError

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return the stock processor that gives the same tokens and pixels."""
        raise NotImplementedError

    def reads(self, folder: Path) -> bool:
        """Whether a folder of this class can be a composition; else it is taken whole."""
        return True

    def finish(self, folder: Path) -> None:
        """Change a written folder where transformers would not read it as it was written."""

    def named_tokens(self, processor: MMLMProcessor) -> dict[str, str]:
        """Return the tokens that the stock processor asks its tokenizer for by name."""
        return {"image_token": processor.image_token}

    def our_tower(self, stock: PretrainedConfig) -> PretrainedConfig | None:
        """Return the config of the tower as MMLM holds it, from the stock class's config."""
        return getattr(stock, "vision_config", None)

    def our_tokenizer(self, tokenizer: Any) -> Any:
        """Return a folder's tokenizer as MMLM holds it."""
        return tokenizer

    def our_template(self, template: str | None) -> str | None:
        """Return a folder's chat template as MMLM holds it."""
        return template

    def asked(self, processor: Any, messages: Sequence[Message]) -> Any:
        """Return what the stock processor makes of a question."""
        return processor.apply_chat_template(
            to_openai(messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def as_ours(self, ids: Tensor, tokenizer: Any) -> Tensor:
        """Return the stock processor's tokens as ours are: the placeholders alone."""
        return ids

    def with_words(
        self, state: Mapping[str, Tensor], config: MMLMConfig, tokenizer: Any
    ) -> Mapping[str, Tensor]:
        """Return our tensors with those that the class keeps as embeddings of words."""
        return state

    def key_map(self, config: MMLMConfig) -> KeyMap:
        """Return the pairs of our prefixes and those of the published layout."""
        raise NotImplementedError

    def to_stock(self, state: Mapping[str, Tensor], config: MMLMConfig) -> dict[str, Tensor]:
        """Return our tensors under the published names."""
        return self.key_map(config).to_theirs(state, origin=self.class_name)

    def to_ours(
        self, state: Mapping[str, Tensor], config: MMLMConfig, *, origin: str
    ) -> dict[str, Tensor]:
        """Return published tensors under our names."""
        return self.key_map(config).to_ours(state, origin=origin)

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a stock folder describes.

        Args:
            stock: The folder's config.
            processor: What the folder's `processor_config.json` holds.
            origin: The folder, for messages.

        Raises:
            CheckpointError: if the folder uses something that MMLM has no part for.
        """
        raise NotImplementedError


stock_classes: Registry[StockClass] = Registry("stock class", plural="stock_classes")


class Match(NamedTuple):
    """What a composition can be written as."""

    target: StockClass | None
    """The class that it equals, or None."""

    reasons: list[str]
    """Why it is not the nearest class; empty if it equals one."""

    nearest: StockClass | None
    """The class with the fewest failing conditions."""


def match(config: MMLMConfig) -> Match:
    """Find the stock class that a composition equals, or the nearest one and what is missing."""
    if config.video is not None:
        reason = "no stock class takes clips as `model.video` says; leave it out"
        return Match(None, [f"not a stock class: {reason}"], None)
    best: Match | None = None
    for target in sorted((stock_classes[name]() for name in stock_classes), key=_rank):
        reasons = target.why_not(config)
        if not reasons:
            return Match(target, [], target)
        if best is None or len(reasons) < len(best.reasons):
            best = Match(None, reasons, target)
    assert best is not None
    name = best.nearest.class_name if best.nearest else "a stock class"
    return best._replace(reasons=[f"not {name}: {reason}" for reason in best.reasons])


def _rank(target: StockClass) -> tuple[int, str]:
    return target.rank, target.use


def stock_class_of(model_type: str, *, origin: str) -> StockClass:
    """Return the stock class whose config has this `model_type`.

    Raises:
        CheckpointError: if MMLM reads no such class.
    """
    for name in stock_classes:
        if stock_classes[name].model_type == model_type:
            return stock_classes[name]()
    known = ", ".join(["mmlm", *(stock_classes[name].model_type for name in stock_classes)])
    raise CheckpointError(
        f"{origin}/config.json says model_type {model_type!r}, which MMLM does not read. It reads: "
        f"{known}. Load the folder with transformers, or name its language model and encoder in a "
        f"recipe."
    )


def common_reasons(config: MMLMConfig) -> list[str]:
    """Return the failing conditions that every stock class shares."""
    reasons: list[str] = []
    if getattr(config.text_config, "model_type", "") not in CONFIG_MAPPING:
        reasons.append(
            f"the language model is of the type {config.text_config.model_type!r}, which "
            f"transformers does not hold itself (its code comes with the checkpoint)"
        )
    if not config.head_rule.is_plain:
        reasons.append(
            "the language model changes its logits after the head (soft cap, scale or bias), "
            "which no stock class repeats"
        )
    tower = config.vision_config
    width = getattr(tower, "hidden_size", None)
    if tower is not None and (type(tower) not in MODEL_MAPPING or not isinstance(width, int)):
        reasons.append(
            f"the tower is of the type {tower.model_type!r}, which stock classes cannot build "
            f"beside a language model"
        )
    if config.image_token_id >= config.text_config.vocab_size:
        reasons.append("the placeholder's id lies outside of the vocabulary")
    return reasons


def image_reasons(config: MMLMConfig) -> list[str]:
    """Return why no image processor of transformers gives the pixels of this policy."""
    policy, facts = config.image_policy, config.facts
    if facts.channels != 3:
        return [f"pictures of {facts.channels} channels, which stock processors do not open"]
    if policy.read:
        return [
            f"image.read sets {', '.join(policy.read)}, which no stock processor can hold: what "
            f"the pictures look like would change when the folder is loaded"
        ]
    if isinstance(policy, SquashConfig):
        return []
    square = facts.side[0] == facts.side[1]
    if isinstance(policy, LetterboxConfig | CropConfig):
        if square:
            return []
        return [
            f"image policy {policy.use!r} on a side of {facts.side[0]} x {facts.side[1]}: the "
            f"stock processor does this for squares alone (use squash, or a square side)"
        ]
    return [f"image policy {policy.use!r} (the stock processor knows squash, letterbox and crop)"]


def grid_reasons(config: MMLMConfig) -> list[str]:
    """Return why the stock processor would count other tokens than the encoder gives."""
    facts = config.facts
    rows, columns = (pixels // facts.stride for pixels in facts.side)
    if (rows, columns) != tuple(facts.grid):
        return [
            f"the encoder gives {facts.grid[0]} x {facts.grid[1]} features at "
            f"{facts.side[0]} x {facts.side[1]} pixels, where the stock processor counts "
            f"{rows} x {columns} (side divided by {facts.stride}); set `vision.side_px` to "
            f"{facts.grid[0] * facts.stride}"
        ]
    return []


def tower_of(config: MMLMConfig) -> dict[str, Any]:
    """Return the vision tower's config as a stock config takes it."""
    assert config.vision_config is not None  # `why_not` has seen to it
    return _anonymous(config.vision_config)


def text_of(config: MMLMConfig) -> dict[str, Any]:
    """Return the language model's config as a stock config takes it."""
    return _anonymous(config.text_config)


def _anonymous(config: PretrainedConfig) -> dict[str, Any]:
    """Return a copy as plain values: stock configs change what they are given, and keep paths."""
    hidden = ("_name_or_path", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in hidden}


RESAMPLE = {"nearest-exact": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def image_processor(config: MMLMConfig) -> Any:
    """Return the image processor of transformers that gives the pixels of this policy."""
    from transformers import CLIPImageProcessor, LlavaImageProcessor

    facts, policy = config.facts, config.image_policy
    height, width = facts.side
    common: dict[str, Any] = {
        "size": {"height": height, "width": width},
        # Processors and servers count tokens from `crop_size`, whether or not there is a crop.
        "crop_size": {"height": height, "width": width},
        "do_center_crop": False,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": RESAMPLE[facts.resample],
        "image_mean": list(facts.mean),
        "image_std": list(facts.std),
    }
    if isinstance(policy, LetterboxConfig):
        return LlavaImageProcessor(**common, do_pad=True)
    if isinstance(policy, CropConfig):
        common |= {"size": {"shortest_edge": round(height * policy.zoom)}, "do_center_crop": True}
    return CLIPImageProcessor(**common)


def read_image_processor(values: dict[str, Any], *, origin: str) -> dict[str, Any]:
    """Return policy, side and normalisation that a stock folder's image processor stands for.

    Args:
        values: The image processor's own dictionary.
        origin: The file, for messages.

    Returns:
        ``image`` (as in a recipe), ``side``, ``mean``, ``std``, ``resample``.

    Raises:
        CheckpointError: naming the setting for which MMLM has no image policy.
    """
    size, crop = values.get("size") or {}, values.get("crop_size") or {}
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if values.get(step) is False:
            raise CheckpointError(
                f"{origin}: `{step}` is false; MMLM always resizes and normalises. Load the folder "
                f"with transformers."
            )
    edge = size.get("shortest_edge")
    sides: Any
    if values.get("vision_input_type") is not None:
        image, sides = {"use": "squash"}, (values.get("tile_size"), values.get("tile_size"))
    elif grids := values.get("image_grid_pinpoints"):
        image, sides = _tiles(grids, crop or size), (crop or size).get("height")
        sides = (sides, sides)
    elif values.get("do_pad"):
        side = (crop or size).get("height", edge)
        image, sides = {"use": "letterbox"}, (side, side)
    elif values.get("do_center_crop"):
        sides = (crop.get("height"), crop.get("width"))
        image = {"use": "crop", "zoom": _zoom(edge or size.get("height"), sides, origin)}
    elif edge is not None:
        raise CheckpointError(
            f"{origin}: `size` gives a shortest edge and there is no centre crop, so that pictures "
            f"keep their proportions; MMLM has no policy for that. Load it with transformers."
        )
    else:
        image, sides = {"use": "squash"}, (size.get("height"), size.get("width"))
    if not all(isinstance(pixels, int) and pixels > 0 for pixels in sides):
        raise CheckpointError(
            f"{origin}: the image processor's size cannot be read (size {size}, crop_size {crop}); "
            f"expected height and width. Mend the file, or download it again."
        )
    return {
        "image": image,
        "side": [int(pixels) for pixels in sides],
        **read_normalisation(values, origin=origin),
    }


def _tiles(grids: Any, side: dict[str, Any]) -> dict[str, Any]:
    """Return the words of LLaVA-NeXT's tiles, whose canvases are given in pixels."""
    step = side.get("height") or 1
    canvases = [[int(pixels) // step for pixels in canvas] for canvas in grids]
    return {"use": "tiles", "rule": "anyres", "grids": canvases}


def read_normalisation(values: dict[str, Any], *, origin: str) -> dict[str, Any]:
    """Return ``mean``, ``std`` and ``resample`` of a stock folder's image processor.

    Raises:
        CheckpointError: if one of them cannot be read.
    """
    names: dict[int, str] = {number: name for name, number in RESAMPLE.items()}
    resample: Any = values.get("resample")
    try:
        return {
            "mean": [float(value) for value in values["image_mean"]],
            "std": [float(value) for value in values["image_std"]],
            "resample": "bicubic" if resample is None else names[resample],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{origin}: the image processor has no readable image_mean, image_std or resample "
            f"({error!r}). Mend the file, or download it again."
        ) from None


def read_count(values: dict[str, Any], key: str, *, origin: str) -> int:
    """Return a whole number of a stock folder's processor.

    Raises:
        CheckpointError: if it is missing or no number.
    """
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(
            f"{origin}/processor_config.json: `{key}` must be a whole number (got {value!r}). Mend "
            f"the file, or download it again."
        )
    return value


def _zoom(edge: Any, sides: tuple[Any, Any], origin: str) -> float:
    """Return how much larger the picture is resized than it is cropped."""
    if not isinstance(edge, int) or not isinstance(sides[0], int) or not sides[0]:
        raise CheckpointError(
            f"{origin}: the sizes of resize ({edge}) and centre crop {sides} cannot be read. "
            f"Mend the file, or download it again."
        )
    return edge / sides[0]


def refuse(reasons: list[str], *, wanted: str) -> ConfigError:
    """Return the error that says why a composition is not the class that was asked for."""
    listed = "\n".join(f"  - {reason}" for reason in reasons)
    return ConfigError(
        f"This composition is not {wanted}:\n{listed}\nSave it without naming a class, which "
        f"writes MMLM's own, or change what is listed."
    )
