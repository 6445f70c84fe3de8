"""One model in memory, spoken to under several names: `mmlm serve BASE --adapter NAME=FOLDER`.

    BASE and small folders ──► Voices ──► an engine for each name, sharing the weights
                               you are here

A voice is what differs from the base: thin matrices (LoRA and its kin, through PEFT) and plain
tensors, such as a connector that learnt too. `model` in a request chooses it. The engines take
turns at the model, a step at a time; their caches are apart, because the same words give other
keys and values under another voice.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import CheckpointError, MissingExtraError, UsageError
from mmlm.generation.session import BUDGET_BYTES, Sessions
from mmlm.language.routing import IMAGES, TEXT, is_routed, route_by_token
from mmlm.serving.about import read_about
from mmlm.serving.engine import Engine


@dataclass
class _Voice:
    """What differs from the base."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    adapters: list[str] = field(default_factory=list)


class Voices:
    """A model and what may be put on it, one at a time.

    Args:
        model: The base.
    """

    def __init__(self, model: Any) -> None:
        if getattr(model, "peft_config", None):
            raise UsageError(
                "The base has adapters itself. Serve the folder with the merged weights as the "
                "base, and name the adapters with --adapter."
            )
        self.model = model
        self._guard = threading.RLock()
        self._own: dict[str, Tensor] = {}
        self._voices: dict[str, _Voice] = {}
        self._now: str | None = ""
        self._voices[""] = _Voice()

    @contextmanager
    def using(self, name: str) -> Generator[None]:
        """Hold the model, with one voice on; nobody else uses it meanwhile."""
        with self._guard:
            if self._now != name:
                self._put_on(name)
            yield

    def add(self, name: str, folder: str | Path) -> None:
        """Read a voice from a PEFT folder, a delta of MMLM, or another model of the same parts.

        Raises:
            UsageError: if the name is taken.
            CheckpointError: if the folder does not fit the base.
        """
        if name in self._voices or not name:
            raise UsageError(f"Two adapters are named {name!r}. Give each a name of its own.")
        if not Path(folder).is_dir():
            raise UsageError(f"There is no folder {folder} for the adapter {name!r}.")
        with self._guard:
            self._put_on("")
            self._now = None  # adding turns adapters on
            label = f"voice{len(self._voices)}"
            if (Path(folder) / "adapter_config.json").is_file():
                self._voices[name] = self._from_peft(Path(folder), label)
            else:
                self._voices[name] = self._from_model(Path(folder), label)
            for key in self._voices[name].tensors:
                if key not in self._own:
                    self._own[key] = self._place(key).data
            self._put_on("")

    def _put_on(self, name: str) -> None:
        """Exchange the tensors that differ, and switch the thin matrices."""
        self._now = None
        voice = self._voices[name]
        for key, own in self._own.items():
            self._place(key).data = voice.tensors.get(key, own)
        if getattr(self.model, "peft_config", None):
            if voice.adapters:
                self.model.enable_adapters()
                self.model.set_adapter(voice.adapters)
            else:
                self.model.disable_adapters()
        self._now = name

    def _place(self, key: str) -> Any:
        """Return the parameter of a name, also where thin matrices wrap its layer."""
        owner, _, leaf = key.rpartition(".")
        module = self.model.get_submodule(owner)
        return getattr(getattr(module, "base_layer", module), leaf)

    def _from_peft(self, folder: Path, label: str) -> _Voice:
        """Read a folder that PEFT wrote."""
        try:
            self.model.load_adapter(str(folder), adapter_name=label)
        except ImportError:
            raise MissingExtraError("peft", needed_for="An adapter", extra="train") from None
        except (OSError, ValueError, RuntimeError, KeyError) as fault:
            raise CheckpointError(
                f"{folder} is no adapter for this model: {type(fault).__name__}: "
                f"{str(fault).splitlines()[0][:300]}"
            ) from fault
        return _Voice(adapters=[label])

    def _from_model(self, folder: Path, label: str) -> _Voice:
        """Read a folder of MMLM and keep what differs from the base."""
        from mmlm.assistant import load

        dtype = next(self.model.parameters()).dtype
        other: Any = load(folder, dtype=dtype, device=str(self.model.device)).model
        configs = dict(getattr(other, "peft_config", None) or {})
        theirs = {k.replace(".base_layer.", "."): v for k, v in other.state_dict().items()}
        ours = {k.replace(".base_layer.", "."): v for k, v in self.model.state_dict().items()}
        plain = {key: value for key, value in theirs.items() if "lora_" not in key}
        base = {key: value for key, value in ours.items() if "lora_" not in key}
        odd = sorted(
            key for key in plain.keys() | base.keys()
            if key not in plain or key not in base or plain[key].shape != base[key].shape
        )  # fmt: skip
        if odd:
            raise CheckpointError(
                f"{folder} is made of other parts than the base: they differ in {odd[0]}. An "
                f"adapter must have learnt on the model that is served."
            )
        voice = _Voice({k: v for k, v in plain.items() if not torch.equal(v, base[k])})
        for number, (name, config) in enumerate(configs.items()):
            inner = f"{label}_{number}"
            self.model.add_adapter(replace(config, inference_mode=True), adapter_name=inner)
            self._fill(theirs, name, inner, folder)
            voice.adapters.append(inner)
        if is_routed(other):
            text, images = (voice.adapters[list(configs).index(kind)] for kind in (TEXT, IMAGES))
            route_by_token(self.model, text=text, images=images)
        return voice

    def _fill(self, theirs: Mapping[str, Tensor], name: str, inner: str, folder: Path) -> None:
        """Copy the thin matrices of one adapter."""
        state = self.model.state_dict()
        wanted = [key for key in state if "lora_" in key and f".{inner}" in key]
        for key in wanted:
            value = theirs.get(key.replace(".base_layer.", ".").replace(f".{inner}", f".{name}"))
            if value is None:
                raise CheckpointError(f"{folder} lacks a part of its adapter: {key}.")
            state[key].copy_(value)


def load_voices(
    source: str | Path, adapters: Sequence[tuple[str, str]], *, budget_bytes: int = BUDGET_BYTES,
    bits: int | None = None,
) -> list[Engine]:  # fmt: skip
    """Load a base and its adapters; returns an engine for each name, the base first.

    Args:
        source: The base.
        adapters: Names and folders.
        budget_bytes: Memory for the caches of conversations, shared out evenly.
        bits: Hold the base in 4 or 8 bits; then adapters must be thin matrices alone.

    Raises:
        UsageError: if two have one name.
        CheckpointError: if one does not fit the base.
    """
    base = Engine.load(source, bits=bits)
    names = [base.name, *(name for name, _ in adapters)]
    voices = Voices(base.sessions.model)
    engines: list[Engine] = []
    for name, folder in adapters:
        if name == base.name:
            raise UsageError(f"The adapter {name!r} is named like the base. Give it another name.")
        voices.add(name, folder)
    for name in names:
        sessions = Sessions(
            base.sessions.model, base.sessions.processor, budget_bytes=budget_bytes // len(names)
        )
        sessions.using = partial(voices.using, "" if name == base.name else name)
        folder = dict(adapters).get(name, source)
        told = base.about if name == base.name else read_about(folder)
        about = told.model_copy(update={"title": name})
        engines.append(Engine(sessions, name=name, about=about))
    return engines
