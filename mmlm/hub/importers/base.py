"""What a foreign layout is, and how its tensors are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmlm.config import PartConfig
from mmlm.errors import CheckpointError
from mmlm.hub.keymaps import KeyMap
from mmlm.hub.weights import INDEX, WEIGHTS, read_state
from mmlm.registry import Registry

VICUNA = (
    "{% set intro %}A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions.{% endset %}"
    "{% for message in messages %}"
    "{% if loop.first %}{{ message['content'] if message['role'] == 'system' else intro }} "
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The dialogue of Vicuna, in which LLaVA-1.5 and its relatives were trained."""

# Computed anew by every class; older files hold them.
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids", "rotary_embd.inv_freq")


@dataclass
class Foreign:
    """What a checkpoint of another project is made of, in MMLM's words."""

    text: PretrainedConfig
    """The language model."""

    vision: dict[str, Any]
    """The encoder, as in a recipe; `config` instead of `checkpoint` where its weights are here."""

    image: dict[str, Any]
    connector: dict[str, Any]
    keys: KeyMap
    """Our prefixes and theirs."""

    reducer: dict[str, Any] | None = None
    tokenizer: str | None = None
    """Where the tokenizer stands, if not in the folder."""

    template: str | None = None
    """The chat template where the tokenizer has none."""

    notes: list[str] = field(default_factory=list)
    """What differs from the project's own code, for the card and the terminal."""


class Layout(PartConfig):
    """One project's way of naming its tensors."""

    about: ClassVar[str]
    """Which checkpoints it reads, in a line."""

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is of this layout."""
        raise NotImplementedError

    def prepare(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors whose names alone differ from ours."""
        return dict(state)

    def describe(self, values: dict[str, Any], keys: set[str], *, origin: str) -> Foreign:
        """Say what the checkpoint is made of.

        Args:
            values: Its `config.json`.
            keys: The names of its tensors, after `prepare`.
            origin: The folder, for messages.

        Raises:
            CheckpointError: if it uses something that MMLM has no part for.
        """
        raise NotImplementedError


layouts: Registry[Layout] = Registry("foreign layout")


def layout_of(values: Mapping[str, Any]) -> Layout | None:
    """Return the layout of a `config.json`, or None."""
    return next((one for one in (layouts[name]() for name in layouts) if one.fits(values)), None)


def read_foreign(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder: safetensors, or pickled files that hold nothing but tensors.

    Raises:
        CheckpointError: if a file is damaged, or weights-only loading refuses it.
    """
    if (folder / INDEX).is_file() or (folder / WEIGHTS).is_file():
        state = read_state(folder)
    else:
        files = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("checkpoints/*.pt")]
        if not files:
            raise CheckpointError(
                f"{folder} holds no weights (safetensors, .bin or .pt). Pickled files are not "
                f"taken from the Hub by themselves: download the repository, and name its folder."
            )
        state = {}
        for path in sorted(files):
            state |= _unpickled(path)
    return {key: value for key, value in state.items() if not key.endswith(_COMPUTED)}


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Read a pickled file without running anything in it."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle raises whatever the file makes it raise
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors, or is damaged "
            f"({str(error).splitlines()[0][:200]}). MMLM never runs what is in a file: convert it "
            f"to safetensors with a tool that you trust, in a place that you can lose."
        ) from None
    return dict(_flat(held, path, ""))


def _flat(held: Any, path: Path, prefix: str) -> list[tuple[str, Tensor]]:
    """Return the tensors of nested dictionaries, their keys joined by dots."""
    if isinstance(held, Tensor):
        return [(prefix.removesuffix("."), held)]
    if isinstance(held, Mapping):
        return [
            pair for key, value in held.items() for pair in _flat(value, path, f"{prefix}{key}.")
        ]
    return []  # the number of a step, or a name


def text_config(values: Mapping[str, Any], model_type: str, *, origin: str) -> PretrainedConfig:
    """Return the config of a language model whose fields stand among others.

    Raises:
        CheckpointError: if transformers does not know the family.
    """
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{origin}/config.json: the language model is of the family {model_type!r}, which "
            f"transformers does not hold itself. It cannot be imported."
        )
    other = ("mm_", "image_", "vision_", "tune_", "freeze_", "unfreeze_", "tokenizer_", "s2")
    ignored = ("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype")
    kept = {k: v for k, v in values.items() if not k.startswith(other) and k not in ignored}
    return CONFIG_MAPPING[model_type](**kept)


def projector_words(kind: str, *, origin: str) -> dict[str, Any]:
    """Return the connector that `linear` or `mlp2x_gelu` stands for.

    Raises:
        CheckpointError: for any other name.
    """
    if kind == "linear":
        return {"use": "linear"}
    depth = kind.removeprefix("mlp").removesuffix("x_gelu")
    if kind.startswith("mlp") and kind.endswith("x_gelu") and depth.isdigit() and int(depth) > 0:
        return {"use": "mlp", "depth": int(depth)}
    raise CheckpointError(
        f"{origin}/config.json: the projector is {kind!r}, for which MMLM has no connector. It "
        f"reads linear and mlp2x_gelu (any depth)."
    )


def projector_pairs(words: dict[str, Any], theirs: str) -> list[tuple[str, str]]:
    """Return the pairs for the layers of `projector_words`."""
    if words["use"] == "linear":
        return [("model.connector.linear.", theirs)]
    return [("model.connector.layers.", theirs)]
