"""The encoder `florence2`: one generative encoder, read under several prompts (Florence-VL).

    pixels ─► DaViT ─► projection ─┬────────────────────────────► depth   ─┐
                                   ├─► text encoder, "describe"  ─► breadth ├─► channels
                                   └─► text encoder, "what text" ─► breadth ┘

Florence-2 reads a picture and a task prompt together in the encoder of its BART; what stands at
the places of the picture afterwards depends on the task. Florence-VL (arXiv 2412.04424) joins the
features under three prompts (breadth) with what enters the text encoder (depth) channel by
channel; an `mlp` of depth 3 brings them to the language model. Its code asks Florence-2 to
*generate* under `no_grad`, which reads the picture three times and never gives the encoder a
gradient. Here the picture is read once, only the text encoder runs once for each prompt, and
everything can learn. BART's decoder is not loaded.

The paper's lower map is as wide as the text encoder; that is the projected map (`entry`). Stages of
DaViT may stand beside it. Dropout and stochastic depth are off: features do not depend on chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from mmlm.errors import ConfigError
from mmlm.features import Size, VisionFeatures
from mmlm.storage.parts import locate
from mmlm.vision import hf_facts
from mmlm.vision.base import VisionConfig, VisionEncoder, VisionFacts, encoders, pack_tokens

MODEL_TYPE = "florence2"
SIDE_PX = 768
"""Side of the pictures that Florence-2 was trained with."""

PROMPTS = (
    "Describe in detail what is shown in the image.",
    "What is the text in the image?",
    "Locate the objects in the image, with their descriptions.",
)
"""Florence-2's own words for detailed captions, reading, and regions with descriptions."""

_NO_CHANCE = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop")


@encoders.register(MODEL_TYPE)
class FlorenceVisionConfig(VisionConfig):
    """Florence-2 under several task prompts, beside what enters its text encoder (Florence-VL)."""

    checkpoint: str | None = None
    """Hub id or folder of a Florence-2 that transformers reads, such as
    florence-community/Florence-2-large. None makes an untrained one of `config`."""

    revision: str | None = None
    """Branch, tag or commit on the Hub."""

    config: dict[str, Any] | None = None
    """The config of an untrained Florence-2, with `model_type: florence2`."""

    prompts: tuple[str, ...] = Field(default=PROMPTS, min_length=1)
    """The tasks under which a picture is read: each adds the text encoder's width in channels."""

    prompt_ids: tuple[tuple[int, ...], ...] = ()
    """The tokens of the prompts, for an untrained one without tokenizer; instead of `prompts`."""

    depths: tuple[int | Literal["entry"], ...] = ("entry",)
    """What is joined beside them: `entry`, the map that enters the text encoder, or stages of
    DaViT by number, averaged to the grid of the last."""

    side_px: int | None = Field(default=None, ge=1)
    """Side of the pictures in pixels; by default that of the checkpoint."""

    @model_validator(mode="after")
    def _one_source(self) -> FlorenceVisionConfig:
        if (self.checkpoint is None) == (self.config is None):
            raise ValueError("either `checkpoint` or the `config` of an untrained one is needed")
        if self.config is not None and not (self.prompt_ids and all(self.prompt_ids)):
            raise ValueError("an untrained one needs `prompt_ids`, one token or more in each")
        return self

    def load(self, *, dtype: torch.dtype | None = None) -> FlorenceEncoder:
        """Load the picture's side of Florence-2, and the words of the prompts."""
        if self.config is not None:
            whole = self._untrained(self.config).to(dtype or torch.float32)
            ids = self.prompt_ids
        else:
            checkpoint = locate(str(self.checkpoint), origin="vision.checkpoint")
            whole = _load_whole(checkpoint, self.revision, dtype or torch.float32)
            ids = self.prompt_ids or _read(checkpoint, self.revision, self.prompts)
        config: Any = whole.config
        vocabulary = config.text_config.vocab_size
        if any(token >= vocabulary for prompt in ids for token in prompt):
            raise ConfigError(f"vision.prompt_ids names a token beyond the {vocabulary} there are.")
        encoder = FlorenceEncoder(_calm(config), self._facts(config, ids), self.depths)
        encoder.take(whole)
        return encoder.to(dtype or torch.float32).eval()

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> FlorenceEncoder:
        """Build the same parts without reading weights."""
        if tower_config is None:
            raise ConfigError("florence2 needs its `vision_config`. Save the model again.")
        return FlorenceEncoder(_config_of(tower_config), facts, self.depths).eval()

    def _untrained(self, words: dict[str, Any]) -> Any:
        from transformers import Florence2Model

        try:
            return Florence2Model(_calm(_config_of({"model_type": MODEL_TYPE, **words})))
        except Exception as error:  # each family checks its config in its own way
            raise ConfigError(f"vision.config cannot be used: {error}") from None

    def _facts(self, config: Any, ids: Sequence[Sequence[int]]) -> VisionFacts:
        """Work out the grid, and refuse a side that the tables of positions do not hold."""
        tower, text = config.vision_config, config.text_config
        checkpoint = None if self.checkpoint is None else locate(self.checkpoint)
        pixels = hf_facts.pixel_facts(checkpoint, self.revision, MODEL_TYPE)
        side = self.side_px or _side_of(checkpoint, self.revision) or SIDE_PX
        rows, stages = side, len(tower.embed_dim)
        for kernel, stride, padding in zip(
            tower.patch_size, tower.patch_stride, tower.patch_padding, strict=True
        ):
            rows = (rows + 2 * padding - kernel) // stride + 1
        longest = 1 + rows * rows + max(len(prompt) for prompt in ids)
        most = tower.max_position_embeddings
        if not 0 < rows <= most or longest > text.max_position_embeddings:
            raise ConfigError(
                f"vision.side_px {side} gives {rows} x {rows} features, {longest} tokens with the "
                f"longest prompt. This Florence-2 has positions for {most} x {most} features and "
                f"{text.max_position_embeddings} tokens. Choose a smaller side."
            )
        for depth in self.depths:
            if depth != "entry" and not -stages <= depth < stages:
                raise ConfigError(
                    f"vision.depths {depth} is beyond this DaViT, which has {stages} stages: "
                    f"from {-stages} to {stages - 1}, or 'entry'."
                )
        widths = [
            tower.projection_dim if depth == "entry" else tower.embed_dim[depth]
            for depth in self.depths
        ]
        named = ", ".join([*map(str, self.depths), f"{len(ids)} prompts"])
        return VisionFacts(
            width=sum(widths) + len(ids) * text.d_model,
            side=(side, side),
            grid=(rows, rows),
            stride=max(1, side // rows),
            channels=tower.in_channels,
            mean=pixels.mean,
            std=pixels.std,
            resample=pixels.resample,
            feature=f"florence2({named})",
            prompts=tuple(tuple(prompt) for prompt in ids),
        )


class FlorenceEncoder(VisionEncoder):
    """Reads a picture once, and its projection under each prompt.

    Args:
        config: A `Florence2Config`.
        facts: What is known about it, with the tokens of the prompts.
        depths: What is joined beside the prompted features.

    Shapes:
        pixels:  ``(tiles, channels, side, side)``, normalised
        returns: values ``(tiles · rows · columns, Σ widths of depths + prompts · d_model)``
    """

    def __init__(
        self, config: PretrainedConfig, facts: VisionFacts, depths: Sequence[int | str]
    ) -> None:
        from transformers.models.bart.modeling_bart import BartEncoder
        from transformers.models.florence2 import modeling_florence2 as florence

        super().__init__(facts)
        values: Any = config
        self._config, self._depths = config, tuple(depths)
        self._known = sorted({token for prompt in facts.prompts for token in prompt})
        self.backbone: Any = florence.Florence2VisionBackbone(values.vision_config)
        self.projector: Any = florence.Florence2MultiModalProjector(values)
        text: Any = AutoConfig.for_model(**values.text_config.to_dict())
        text.vocab_size, text.pad_token_id = 1, None  # its words stand in `words`
        self.text: Any = BartEncoder(text)
        self.text.embed_tokens = nn.Identity()
        self.words = nn.Embedding(len(self._known), values.text_config.d_model)

    @property
    def tower_config(self) -> dict[str, Any]:
        """The config of Florence-2 as transformers writes it."""
        return self._config.to_dict()

    @torch.no_grad()
    def take(self, whole: Any) -> None:
        """Take the weights of a whole `Florence2Model`: its decoder and other words stay there."""
        state = whole.state_dict()
        own = {"backbone": "vision_tower", "projector": "multi_modal_projector"}
        own["text"] = "language_model.encoder"
        for name, prefix in own.items():
            part = {
                key.removeprefix(f"{prefix}."): value
                for key, value in state.items()
                if key.startswith(f"{prefix}.") and "embed_tokens" not in key
            }
            getattr(self, name).load_state_dict(part)
        table = whole.get_input_embeddings()  # BART's may scale its words
        known = torch.tensor(self._known, device=table.weight.device)
        self.words.weight.copy_(table(known))

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode tiles."""
        size = Size(*pixels.shape[-2:])
        grid = self.facts.out_grid(size)  # refuses other sizes
        stages: list[Tensor] = []
        hidden = pixels.to(self.words.weight.dtype)
        for stem, blocks in zip(self.backbone.convs, self.backbone.blocks, strict=True):
            hidden = stem(hidden)
            for block in blocks:
                hidden = block(hidden)
            stages.append(hidden)
        entry = self.projector(hidden)  # the mean of the picture first, then its places
        features: list[Tensor] = []
        for depth in self._depths:
            if isinstance(depth, str):
                features.append(entry[:, 1:])
                continue
            found = functional.adaptive_avg_pool2d(stages[depth], (grid.rows, grid.columns))
            features.append(found.flatten(2).transpose(1, 2))
        features += [self._under(entry, prompt) for prompt in self.facts.prompts]
        return pack_tokens(torch.cat(features, dim=-1), self.facts, size)

    def _under(self, entry: Tensor, prompt: Sequence[int]) -> Tensor:
        """Return the picture's places after the text encoder: ``(tiles, places, d_model)``."""
        places = [self._known.index(token) for token in prompt]
        words = self.words(torch.tensor(places, device=entry.device)).to(entry.dtype)
        together = torch.cat([entry, words.expand(len(entry), -1, -1)], dim=1)
        read = self.text(inputs_embeds=together).last_hidden_state
        return read[:, 1 : entry.shape[1]]


def _config_of(words: dict[str, Any]) -> PretrainedConfig:
    """Return the config that words describe.

    Raises:
        ConfigError: if it is another model's.
    """
    settings = dict(words)
    model_type = settings.pop("model_type", None)
    if model_type != MODEL_TYPE:
        raise ConfigError(f"vision.config is a {model_type!r}, and florence2 reads Florence-2.")
    return AutoConfig.for_model(model_type, **settings)


def _calm(config: Any) -> Any:
    """Turn dropout and stochastic depth off."""
    for name in _NO_CHANCE:
        setattr(config.text_config, name, 0.0)
    config.vision_config.drop_path_rate = 0.0
    return config


def _load_whole(checkpoint: str, revision: str | None, dtype: torch.dtype) -> Any:
    """Load Florence-2 with all of its weights.

    Raises:
        ConfigError: if there is none, or weights are missing.
    """
    from transformers import Florence2Model

    try:
        config = AutoConfig.from_pretrained(checkpoint, revision=revision)
        if config.model_type != MODEL_TYPE:
            raise ConfigError(
                f"vision.checkpoint {checkpoint} is a {config.model_type}, and florence2 reads "
                f"Florence-2, such as florence-community/Florence-2-base."
            )
        stock: Any = Florence2Model
        whole, report = stock.from_pretrained(
            checkpoint, revision=revision, config=_calm(config), dtype=dtype,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ConfigError(f"vision.checkpoint {checkpoint!r} cannot be read: {error}") from None
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise ConfigError(
            f"{checkpoint} lacks {len(missing)} weights of Florence-2 ({', '.join(missing[:3])} …),"
            f" which would stay random. Name a checkpoint in the form of transformers, such as "
            f"florence-community/Florence-2-base."
        )
    return whole


def _read(
    checkpoint: str, revision: str | None, prompts: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of the prompts, between BART's marks of begin and end."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"vision.checkpoint {checkpoint} has no tokenizer: {error}") from None
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    return tuple((begin, *ids, end) for ids in plain)


def _side_of(checkpoint: str | None, revision: str | None) -> int | None:
    """Return the side that the checkpoint's image processor makes pictures of, if it says so."""
    if checkpoint is None:
        return None
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint, revision=revision)
    except OSError:
        return None
    size = values.get("size") or {}
    return size.get("height") or size.get("shortest_edge")
