"""Reading a model: MMLM's folders, stock folders, deltas, from disk or from the Hub.

    folder or id ──► find ──► config.json ──► mmlm ─────► parts
                                          ├─► llava … ──► composition, renamed tensors ──► parts
                          ├─► another project's ──► mmlm.hub.importers ──► parts
                              delta.json ─┴─► base parts and what was learnt ────────────► parts

What a folder holds is compared with what its config promises before a model is built: a
missing, left-over or misshapen tensor is an error that names file, key and mend. Nothing is
unpickled, and no code from a folder is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig

from mmlm.errors import CheckpointError, ConfigError, MMLMError
from mmlm.hub.adapter import base_of, is_adapter, put_adapter
from mmlm.hub.importers import import_folder, layout_of
from mmlm.hub.keymaps import compare_keys
from mmlm.hub.stock import COMPOSITION, StockClass, stock_class_of
from mmlm.hub.weights import (
    MANIFEST,
    PICKLED,
    check_weights,
    read_json,
    read_state,
    weight_files,
)
from mmlm.language import IMAGE_TOKEN
from mmlm.messages import user
from mmlm.modeling import MMLMConfig, MMLMForConditionalGeneration
from mmlm.processing import MMLMImageProcessor, MMLMProcessor
from mmlm.storage.atomic import recover

DELTA = "delta.json"

Parts = tuple[MMLMForConditionalGeneration, MMLMProcessor]


def load_parts(source: str | Path, *, dtype: torch.dtype | None = None) -> Parts:
    """Read model and processor from a folder or from the Hub.

    Args:
        source: A folder, or a Hub id (``me/my-vlm``, ``me/my-vlm@revision``).
        dtype: The precision of the weights; what the folder says when left out.

    Raises:
        CheckpointError: if it is no model that MMLM reads, or is damaged; the message names
            file, key and mend.
    """
    folder = find(source)
    try:
        if (folder / DELTA).is_file():
            from mmlm.hub.delta import load_delta

            return load_delta(folder, dtype=dtype)
        if is_adapter(folder):
            parts = load_parts(base_of(folder), dtype=dtype)
            put_adapter(parts[0], folder)
            return parts
        return _load_folder(folder, dtype)
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{folder} describes a model that cannot be: {error}") from error
    except MMLMError:
        raise
    except Exception as error:
        # Whatever a damaged file makes transformers raise, the reader gets one kind of error.
        raise CheckpointError(
            f"{folder} cannot be loaded: {type(error).__name__}: {_first_line(error)}. Its "
            f"files do not fit one another: save, copy or download the folder again."
        ) from error


def find(source: str | Path) -> Path:
    """Return the local folder of a source; a Hub id is downloaded first.

    Raises:
        CheckpointError: if there is no such folder, and no such repository in reach.
    """
    path = Path(source)
    recover(path)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{source} is a file. Name the folder that holds config.json.")
    name = str(source)
    if (
        isinstance(source, Path)
        or path.is_absolute()
        or name.startswith(".")
        or name.count("/") != 1
    ):
        raise CheckpointError(
            f"There is no folder {name!r}, and it is no Hub id (owner/name). Name a model folder."
        )
    return _download(name)


def model_of_run(source: str | Path) -> str | Path:
    """Return the model folder inside the folder of a training run, or what was given."""
    inner = Path(source) / "model"
    whole = any((inner / name).is_file() for name in ("config.json", DELTA))
    return inner if whole else source


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                ignore_patterns=[f"*{suffix}" for suffix in PICKLED] + ["*.gguf", "*.py", "*.onnx"],
            )
        )
    except Exception as error:  # the client raises errors of many libraries
        raise CheckpointError(
            f"{name!r} is no folder here, and the Hub does not give it: {_first_line(error)}. "
            f"Check the name and the network; log in where the repository is private."
        ) from None


def _load_folder(folder: Path, dtype: torch.dtype | None) -> Parts:
    values = read_json(folder / "config.json")
    model_type = values.get("model_type")
    if (layout := layout_of(values)) is not None:
        return import_folder(folder, layout, dtype=dtype)
    manifest = _manifest(folder)
    if manifest is not None:
        check_weights(folder, manifest.get("weights") or {})
    weight_files(folder)
    target: StockClass | None = None
    if model_type == MMLMConfig.model_type:
        config = MMLMConfig.from_dict(values)
        state = read_state(folder)
    else:
        target = stock_class_of(str(model_type), origin=str(folder))
        named = (values.get("architectures") or [target.class_name])[0]
        if named != target.class_name:
            raise CheckpointError(
                f"{folder}/config.json: `architectures` names {named}, and model_type "
                f"{model_type!r} is read as {target.class_name}. Load the folder with transformers."
            )
        config = composition_of(folder, target, values, manifest)
        state = target.to_ours(read_state(folder), config, origin=str(folder))
    model = build(config, state, dtype=dtype or _dtype(values), origin=str(folder))
    processor = read_processor(folder, config, target)
    model.generation_config = _generation_config(folder, processor)
    return model.eval(), processor


def composition_of(
    folder: Path, target: StockClass, values: dict[str, Any], manifest: dict[str, Any] | None
) -> MMLMConfig:
    """Return the composition of a stock folder: the noted one if it still holds, else as read."""
    origin = str(folder)
    stock = AutoConfig.for_model(
        values["model_type"], **{k: v for k, v in values.items() if k != "model_type"}
    )
    noted = _noted(stock, manifest, target)
    if noted is not None:
        return noted
    return target.read(stock, processor_values(folder), origin=origin)


def _noted(
    stock: PretrainedConfig, manifest: dict[str, Any] | None, target: StockClass
) -> MMLMConfig | None:
    """Return the composition that the saver noted, if the folder is still what it was."""
    composition = (manifest or {}).get("composition")
    if not isinstance(composition, dict):
        return None
    try:
        config = MMLMConfig(
            text_config=stock.text_config,
            vision_config=target.our_tower(stock),
            image_token_id=stock.image_token_id,
            tie_word_embeddings=stock.tie_word_embeddings,
            **{key: composition.get(key) for key in COMPOSITION},
        )
        if target.why_not(config):
            return None
        again = target.stock_config(config)
    except (MMLMError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return config if _same_config(again, stock) else None


def _same_config(one: PretrainedConfig, other: PretrainedConfig) -> bool:
    ignored = ("architectures", "dtype", "transformers_version", "_name_or_path")

    def plain(values: Any) -> Any:
        if isinstance(values, dict):
            return {key: plain(value) for key, value in values.items() if key not in ignored}
        return list(values) if isinstance(values, tuple) else values

    return plain(one.to_dict()) == plain(other.to_dict())


def _manifest(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def processor_values(folder: Path) -> dict[str, Any]:
    """Return what a stock folder says about its processor, in today's layout.

    Raises:
        CheckpointError: if neither file is there or readable.
    """
    path, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    values = read_json(path) if path.is_file() or not older.is_file() else {}
    if "image_processor" not in values:
        values["image_processor"] = read_json(older)
    return values


def build(
    config: MMLMConfig, state: dict[str, Tensor], *, dtype: torch.dtype | None, origin: str
) -> MMLMForConditionalGeneration:
    """Build the model that a config describes around tensors that were read.

    Raises:
        CheckpointError: if the tensors do not fit, naming keys or shapes.
    """
    config.counter()  # reads every part, so that an unknown word is an error now
    with torch.device("meta"):
        skeleton = MMLMForConditionalGeneration(config)
    wanted = skeleton.state_dict()
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    compare_keys(state, wanted, origin=origin, may_lack=tied)
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            raise CheckpointError(
                f"{origin}: {key} has the shape {tuple(value.shape)}, and config.json asks for "
                f"{tuple(wanted[key].shape)}. Either is from another model: download it again."
            )
    del skeleton
    loaded: Any = MMLMForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype or torch.float32,
        output_loading_info=True,
    )
    model, loading = loaded
    left = sorted(set(loading["missing_keys"]) - set(tied)) + sorted(loading["unexpected_keys"])
    if left or loading["mismatched_keys"]:
        raise CheckpointError(
            f"{origin}: transformers could not place the tensors {left[:4]}. Save or download the "
            f"folder again."
        )
    return model


def read_processor(
    folder: Path, config: MMLMConfig, target: StockClass | None = None
) -> MMLMProcessor:
    """Read tokenizer and template of a folder, and join them with the config's image processor.

    Raises:
        CheckpointError: if the tokenizer does not fit the embedding.
    """
    if (
        not (folder / "tokenizer_config.json").is_file()
        and not (folder / "tokenizer.json").is_file()
    ):
        raise CheckpointError(
            f"{folder} holds no tokenizer (tokenizer.json, tokenizer_config.json). Save or "
            f"download the folder again."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if target is not None:
        tokenizer = target.our_tokenizer(tokenizer)
    known = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if known != config.image_token_id:
        raise CheckpointError(
            f"{folder}: the tokenizer gives {IMAGE_TOKEN!r} the id {known}, and config.json says "
            f"{config.image_token_id}. Tokenizer and weights are of different models: save or "
            f"download the folder again."
        )
    if len(tokenizer) > config.text_config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens, and the embedding has "
            f"{config.text_config.vocab_size} rows. Tokenizer and weights are of different models: "
            f"save or download the folder again."
        )
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    if target is not None:
        text = target.our_template(text)
    processor = MMLMProcessor(MMLMImageProcessor.from_config(config), tokenizer, chat_template=text)
    try:
        processor.chat.render([user("A question", [None])], add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        raise CheckpointError(
            f"{template} cannot be used: {_first_line(error)} Mend the template, or download the "
            f"folder again."
        ) from error
    return processor


def _generation_config(folder: Path, processor: MMLMProcessor) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
    return GenerationConfig(eos_token_id=list(processor.chat.stop_ids), do_sample=False)


def _dtype(values: dict[str, Any]) -> torch.dtype | None:
    name = values.get("dtype") or values.get("torch_dtype")
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().replace(os.linesep, "\n")
    return text.splitlines()[0][:300] if text else "no message"
