"""What a training recipe says: a model, stages, and how to run them.

A stage reads as a sentence: learn … from data … until …. This module checks words and
changes single lines of a recipe; it loads no model and opens no data. The words under
`model:` belong to the parts and are checked by their own configs when the model is composed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mmlm.config import Config, parse_yaml, read_yaml
from mmlm.errors import ConfigError
from mmlm.language.adapters import AdapterConfig, adapters
from mmlm.recipes import find_recipe

Sharding = Literal["auto", "none", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
"""How weights, gradients and moments are spread over devices; see `mmlm.training.parallel`."""

MODEL_KEYS = ("image", "video", "vision", "reducer", "connector", "language", "from", "whole")


class Until(Config):
    """When a stage ends. Exactly one of the four is given."""

    epochs: float | None = Field(default=None, gt=0)
    """So many times through the data."""

    samples: int | None = Field(default=None, ge=1)
    """After so many samples."""

    steps: int | None = Field(default=None, ge=1)
    """After so many optimiser steps."""

    tokens: int | None = Field(default=None, ge=1)
    """After so many tokens, image tokens included."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of epochs, samples, steps and tokens, "
                f"such as {{epochs: 1}}; {len(given)} were given"
            )
        return self


class StageConfig(Config):
    """One stage: what learns, from which data, until when, and how fast."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The name of the stage, also of its folder of checkpoints."""

    learn: list[str] | dict[str, float]
    """Patterns over the parts vision, connector, language, head and adapters, such as connector.*
    or vision.*[12:], the layers from 12 on; with a peak rate each, if it is a mapping."""

    data: Any
    """A data recipe, a data file, a source, or a list of sources."""

    until: Until
    """When the stage ends."""

    peak_lr: float = Field(default=1e-3, gt=0)
    """The highest learning rate."""

    step_tokens: int = Field(default=32_768, ge=16)
    """Tokens of one optimiser step over all devices, image tokens included, padding not."""

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """How the rate goes after the warm-up; wsd stays high and falls in the last `decay`."""

    warmup: float = Field(default=0.03, ge=0)
    """Share of the stage (below 1) or number of steps (1 and more) in which the rate rises."""

    decay: float = Field(default=0.2, gt=0, le=1)
    """Share of the stage in which the rate falls, for schedule wsd."""

    final_lr: float = Field(default=0.0, ge=0, le=1)
    """The rate at the end, as a share of the peak."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps the moments in 8 bits, by bitsandbytes: 2 bytes a weight for 8."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay of matrices; biases and norms have none."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging."""

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Longer gradients are shortened to this; null never shortens."""

    loss_weight: Literal["token", "sample", "sqrt"] = "token"
    """What counts the same: each learnt token, each sample, or each 1/sqrt of a sample's tokens."""

    objective: dict[str, Any] = Field(default_factory=lambda: {"use": "next_token"})
    """What is learnt."""

    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Each layer of the encoder and the language model has so many times the rate of the one above
    it; null gives all the same."""

    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of the tiles for which the encoder's last layer is left out while it learns; it grows
    from nothing at the first layer."""

    feature_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Largest share of the channels of the encoder's features that are left out while the stage
    learns; that of each picture is drawn between nothing and this."""

    adapters: dict[str, Any] | None = None
    """Low-rank adapters that learn in place of the language model's own weights, such as
    {use: lora, rank: 16}; a later stage with the same words goes on with them."""

    shuffle: bool = True
    """False takes the rows as they are written."""

    @field_validator("learn")
    @classmethod
    def _learns_something(cls, value: list[str] | dict[str, float]) -> list[str] | dict[str, float]:
        if not value:
            raise ValueError("names nothing; write e.g. [connector.*]")
        return value

    @property
    def patterns(self) -> dict[str, float]:
        """Each pattern with its peak rate."""
        if isinstance(self.learn, dict):
            return dict(self.learn)
        return dict.fromkeys(self.learn, self.peak_lr)

    def adapter_config(self) -> AdapterConfig | None:
        """Return the adapters of the stage, or None.

        Raises:
            ConfigError: if no kind of adapters, or no setting of it, has such a name.
        """
        if self.adapters is None:
            return None
        return adapters.read(self.adapters, origin=f"stages.{self.name}.adapters")


class AskConfig(Config):
    """The same few pictures, asked again and again while the model learns."""

    every_steps: int = Field(default=20, ge=1)
    """Steps between two rounds of questions."""

    rounds: int | None = Field(default=None, ge=1)
    """Instead of `every_steps`: how many rounds a stage has, one at its end and the others evenly
    before it. Stages of very different lengths are then seen to grow alike."""

    num: int = Field(default=5, ge=1)
    """How many pictures."""

    data: Any = None
    """Where they come from; by default the data of the last stage."""

    max_new_tokens: int = Field(default=24, ge=1)
    """Longest answer."""


class ValidationConfig(Config):
    """Rows that are never learnt: their loss shows when a stage has learnt enough."""

    data: Any
    """Where they come from, as in a stage; `mmlm data new` writes such rows."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between two rounds; one more stands before the first step and after the last."""

    samples: int = Field(default=500, ge=1)
    """Most rows that a round measures, spread evenly over the data."""

    answers: int = Field(default=5, ge=0)
    """How many of the pictures are asked in each round, for growth.jsonl and the report, unless
    `run.ask` says which are."""

    max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer."""

    keep: Literal["best", "last"] = "best"
    """Whether a stage ends with the weights of its lowest validation loss, or with its last."""

    patience: int | None = Field(default=None, ge=1)
    """A stage ends early after so many rounds without a lower loss; null never does."""


class RunConfig(Config):
    """How the stages are run. Nothing here changes what is learnt, but for precision and rows."""

    precision: Literal["auto", "fp32", "bf16", "bf16_autocast", "bf16_pure", "fp16"] = "auto"
    """bf16 computes in bfloat16 and keeps what learns in float32 beside it; bf16_autocast keeps
    all weights in float32; bf16_pure keeps no float32 copy; fp16 is for GPUs without bf16; auto is
    bf16 where it is fast."""

    compile: bool = False
    """Compile the layers of the encoder and the language model with torch.compile: slow first steps
    and faster ones after; alone and under ddp."""

    attention: str = "auto"
    """The attention backend; auto takes the fastest that this machine has, and says why."""

    sharding: Sharding = "auto"
    """How weights, gradients and optimiser are spread over devices; auto takes the fastest one
    that the memory plan fits."""

    offload: bool = False
    """Keep float32 copies and moments in the memory of the machine, under zero2 and zero3."""

    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own settings, put over those of `train/deepspeed`: {zero_optimization: {…}}."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    seed: int = 0
    """Begins the order of the data and the initialisation of new parts."""

    packing: Literal["auto", "packed", "padded"] = "auto"
    """Whether samples share rows without padding; auto asks the language model."""

    row_tokens: int | None = Field(default=None, ge=16)
    """Longest row, and so the longest sample; by default 4096, and never above a step."""

    pool_samples: int = Field(default=128, ge=1)
    """Samples that wait for the row that they fill best; more waste less space."""

    row_tiles: int = Field(default=256, ge=1)
    """Most image tiles of a row, as large as the encoder's side; bounds the encoder's memory."""

    row_patches: int | None = Field(default=None, ge=1)
    """Most patches that the encoder sees in a row; for pictures at their own size."""

    drop_budget: float = Field(default=0.05, ge=0, le=1)
    """Largest share of samples that may be unusable before the run stops."""

    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints, beside those that `checkpoint_minutes` asks for."""

    checkpoint_minutes: float = Field(default=10.0, gt=0)
    """Most minutes of work that a power cut can cost."""

    keep_checkpoints: int = Field(default=1, ge=1)
    """How many checkpoints of the running stage are kept."""

    feature_cache: Literal["auto", "on", "off"] = "auto"
    """Whether a frozen encoder, or the layers of one below those that learn, run only once for
    each picture."""

    feature_cache_gib: float = Field(default=16.0, gt=0)
    """Most space that the cache takes on disk; beyond it, features are computed again."""

    gradient_checkpointing: bool = False
    """Compute activations twice to save memory."""

    threads: int = Field(default=2, ge=1)
    """How many pictures are decoded at once."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or the gradient is not a number: stop with the batch saved, or
    skip the step and count it."""

    log_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Where numbers go beside log.jsonl."""

    ask: AskConfig | None = None
    """Pictures that are asked while the model learns, for growth.jsonl; null asks none."""


class Recipe(Config):
    """A whole training: a model out of parts, stages, and how to run them."""

    model: dict[str, Any]
    """The parts (image, video, vision, reducer, connector, language), or {from: a folder}; with
    {whole: true} a stock class keeps its own processor where MMLM could read its parts."""

    stages: list[StageConfig] = Field(min_length=1)
    """What is learnt, in order; each stage goes on from the one before."""

    validation: ValidationConfig | None = None
    """Rows that are never learnt, measured while a stage learns; null measures none."""

    run: RunConfig = RunConfig()
    """How the stages are run."""

    data: dict[str, Any] = Field(default_factory=dict)
    """Names for data that only this recipe has; a stage's `data:` may use them."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [stage.name for stage in self.stages]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two stages are named {doubled[0]!r}; names tell them apart")
        unknown = sorted(set(self.model) - set(MODEL_KEYS))
        if unknown:
            near = get_close_matches(unknown[0], MODEL_KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"model has no key {unknown[0]!r}{hint} (known: {_words(MODEL_KEYS)})")
        if "whole" in self.model and ("from" not in self.model or self.model["whole"] is not True):
            raise ValueError("model.whole: true goes with model.from; leave it out otherwise")
        if "whole" in self.model and set(self.model) - {"from", "whole"}:
            raise ValueError("a model taken whole has no parts to exchange; leave `whole` out")
        missing = [key for key in ("vision", "language") if key not in self.model]
        if "from" not in self.model and missing:
            raise ValueError(f"model.{missing[0]} is missing")
        for stage in self.stages:
            stage.adapter_config()
        return self

    @property
    def ask(self) -> AskConfig | None:
        """Which pictures are asked while the model learns: those of `run.ask`, or of validation."""
        held = self.validation
        if self.run.ask is not None or held is None or held.answers == 0:
            return self.run.ask
        return AskConfig(
            every_steps=held.every_steps, num=held.answers, data=held.data,
            max_new_tokens=held.max_new_tokens,
        )  # fmt: skip

    def data_of(self, stage: StageConfig) -> Any:
        """Return the words under `data:` of a stage, with this recipe's own names put in."""
        return self.named_data(stage.data)

    def named_data(self, words: Any) -> Any:
        """Return the words for data, where a name of this recipe stands for what it names."""
        return self.data[words] if isinstance(words, str) and words in self.data else words


def _words(names: Sequence[str]) -> str:
    return ", ".join(names)


def read_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> tuple[Recipe, Path, str]:
    """Read a recipe and change single lines of it.

    Args:
        recipe: A name, a path, plain values, or a recipe.
        overrides: ``{"stages.align.peak_lr": 5e-4}`` or ``["stages.align.peak_lr=5e-4"]``.

    Returns:
        The recipe, the folder in which its paths begin, and its name.

    Raises:
        ConfigError: naming every wrong key at once.
    """
    if isinstance(recipe, Recipe):
        values, folder, name, origin = recipe.to_dict(), Path.cwd(), "recipe", "recipe"
    elif isinstance(recipe, Mapping):
        values, folder, name, origin = dict(recipe), Path.cwd(), "recipe", "recipe"
    else:
        path = find_recipe("train", recipe)
        values, folder, name, origin = read_yaml(path), path.parent.absolute(), path.stem, str(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} must hold the keys model, stages and run (got {values!r}).")
    values = copy.deepcopy(values)
    for key, value in _pairs(overrides):
        _override(values, key, value)
    return Recipe.from_dict(values, origin=origin), folder, name


def _pairs(overrides: Mapping[str, Any] | Sequence[str]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    else:
        pairs = []
        for word in overrides:
            key, equals, value = word.partition("=")
            if not equals or not key:
                raise ConfigError(f"{word!r} is not KEY=VALUE, such as stages.align.peak_lr=5e-4.")
            pairs.append((key, value))
    return [
        (key, parse_yaml(value, origin=f"the value of {key}") if isinstance(value, str) else value)
        for key, value in pairs
    ]


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    """Change one line; `key` is a path in which stages are named."""
    *path, last = key.split(".")
    where: Any = values
    walked: list[str] = []
    for word in path:
        walked.append(word)
        if isinstance(where, list):
            where = _named(where, word, ".".join(walked))
        elif isinstance(where, dict):
            if where.get(word) is None:
                where[word] = {}
            where = where[word]
        else:
            raise ConfigError(f"{key}: {'.'.join(walked[:-1])} is {where!r} and has no keys.")
    if isinstance(where, list):
        index = where.index(_named(where, last, key))
        where[index] = value
    elif isinstance(where, dict):
        where[last] = value
    else:
        raise ConfigError(f"{key}: {'.'.join(walked)} is {where!r} and has no keys.")


def _named(entries: list[Any], word: str, key: str) -> Any:
    """Find an entry of a list by its name, or by its number."""
    if word.isdigit() and int(word) < len(entries):
        return entries[int(word)]
    names = [str(e["name"]) for e in entries if isinstance(e, dict) and "name" in e]
    if word in names:
        return next(e for e in entries if isinstance(e, dict) and e.get("name") == word)
    near = get_close_matches(word, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{key}: nothing here is named {word!r}.{hint} Known: {', '.join(names)}.")
