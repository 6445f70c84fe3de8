"""Loading a language model: a folder, a Hub id, or a GGUF file.

A GGUF file is dequantised once and kept as an ordinary safetensors folder in MMLM's cache,
keyed by the hash of the file; `package:NAME/FILE` names a GGUF file inside an installed
Python package. Nothing is unpickled. Growing the vocabulary is in `mmlm.language.vocabulary`.
"""

from __future__ import annotations

import copy
import struct
import sys
import time
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mmlm.errors import CheckpointError, ConfigError
from mmlm.language.base import LanguageConfig, languages
from mmlm.language.fuyu import speak_as_fuyu
from mmlm.language.template import template_of, wrap_template
from mmlm.storage.atomic import atomic_folder
from mmlm.storage.cache import cache_folder
from mmlm.storage.parts import hash_of, locate

_CONVERSION = 2
"""Part of the cache key: raised when a conversion gives another folder than before."""
_DIGIT_BY_DIGIT = (
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
)
"""GGUF pre-tokenizers that part digits before anything else; transformers leaves that out."""


@languages.register("causal_lm")
class CausalLMConfig(LanguageConfig):
    """Any causal language model of transformers, by folder, Hub id or GGUF file."""

    checkpoint: str
    """Folder, Hub id, path of a GGUF file, or `package:NAME/FILE` for a file in a package."""

    revision: str | None = None
    """Branch, tag or commit on the Hub."""

    template: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Values of the chat template's own variables, such as `{enable_thinking: false}`."""

    system: str | None = None
    """What the system turn says in conversations that bring none; by default what the chat template
    then says by itself. Many templates introduce their model by name, in every prompt."""

    format: Literal["own", "fuyu"] = "own"
    """How a conversation becomes text: `own` by the chat template of the checkpoint; `fuyu` as
    Fuyu's processor writes it, the picture before all words."""

    @model_validator(mode="after")
    def _one_template(self) -> Self:
        if self.format != "own" and (self.template or self.system is not None):
            raise ValueError(
                f"format {self.format!r} replaces the chat template, so that `template` and "
                f"`system` would change nothing; leave them out"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `format` only where it says something."""
        values = super().to_dict()
        if self.format == "own":
            del values["format"]
        return values

    def load(self, *, dtype: Any = None) -> tuple[Any, Any]:
        """Load the model and its tokenizer; see `load_language`."""
        model, tokenizer = load_language(self.checkpoint, revision=self.revision, dtype=dtype)
        if self.format == "fuyu":
            speak_as_fuyu(tokenizer)
        if self.system is not None or (self.template and tokenizer.chat_template):
            tokenizer.chat_template = wrap_template(
                template_of(tokenizer), variables=self.template, system=self.system
            )
        return model, tokenizer


def load_language(
    checkpoint: str, *, revision: str | None = None, dtype: Any = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        checkpoint: A folder, a Hub id, the path of a GGUF file, or ``package:NAME/FILE``.
        revision: Branch, tag or commit on the Hub.
        dtype: The precision of the weights; that of the checkpoint when left out.

    Raises:
        ConfigError: if nothing by that name can be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = locate(checkpoint, origin="model.language.checkpoint")
    if source.endswith(".gguf"):
        source, revision = str(folder_of_gguf(Path(source))), None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=dtype or "auto", use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(_cannot_load(checkpoint, error)) from error
    return model.eval(), tokenizer


def folder_of_gguf(file: Path) -> Path:
    """Return the safetensors folder of a GGUF file, converting it the first time.

    Raises:
        ConfigError: if the file cannot be read as a language model.
    """
    if not file.is_file():
        raise ConfigError(f"model.language.checkpoint: there is no file {file}.")
    folder = cache_folder("gguf") / f"{hash_of(file)[:32]}-{_CONVERSION}"
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    begun = time.monotonic()
    print(
        f"Converting {file.name} to safetensors, once (about 15 s for each 100 MB) …",
        file=sys.stderr,
        flush=True,
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        if _pre_tokenizer_of(file) in _DIGIT_BY_DIGIT:
            _split_digits(tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, **_dequantised()
        )
    except ImportError as error:
        raise _missing_gguf(error) from None
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ConfigError(_cannot_load(str(file), error)) from error
    try:
        with atomic_folder(folder) as unfinished:
            _plain(model).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise CheckpointError(
            f"{file.name} could not be converted into {folder}: {error}. Nothing was kept. Make "
            f"room on that disk, or name another folder in the environment variable "
            f"MMLM_CACHE."
        ) from error
    print(f"Converted in {time.monotonic() - begun:.0f} s; kept in {folder}.", file=sys.stderr)
    return folder


def _pre_tokenizer_of(file: Path) -> str:
    """Read the name of the pre-tokenizer out of a GGUF file, without parsing all of it."""
    key = b"tokenizer.ggml.pre"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<I", 8)  # 8: a string follows
    with file.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
        found = content.find(entry)
        if found < 0:
            return ""
        begin = found + len(entry) + 8
        (length,) = struct.unpack("<Q", content[begin - 8 : begin])
        return content[begin : begin + length].decode("utf-8", errors="replace")


def _split_digits(tokenizer: Any) -> None:
    """Give a tokenizer the step that parts digits, if it has none."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is not None and "Digits" not in str(backend.pre_tokenizer):
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


def _dequantised() -> dict[str, Any]:
    """Ask for ordinary weights, where transformers could also keep them in their blocks."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _plain(model: Any) -> Any:
    """Return the same model without the memory of having been quantised: one that can be saved."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _missing_gguf(error: ImportError) -> Exception:
    from mmlm.errors import MissingExtraError

    if "gguf" in str(error):
        return MissingExtraError("gguf", needed_for="Reading a GGUF file", extra="quickstart")
    return error


def _cannot_load(checkpoint: str, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"model.language.checkpoint: {checkpoint!r} cannot be loaded as a causal language model: "
        f"{lines[0]} Expected a folder with config.json, safetensors and a tokenizer, a Hub id of "
        f"one, or a GGUF file of an architecture that transformers reads."
    )
