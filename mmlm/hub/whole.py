"""Folders of stock classes that MMLM does not read as compositions: read and written whole.

What is read is compared with what the config promises: a missing or left-over tensor is an
error. Whether the tokens and pixels that MMLM prepares are those of the stock processor, and
whether a written folder answers like the model, is proven on a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmlm.errors import CheckpointError, MMLMError
from mmlm.hub.aside import written_aside
from mmlm.hub.stock import stock_classes
from mmlm.hub.weights import read_json
from mmlm.messages import user
from mmlm.whole import WholeModel, WholeProcessor

_RECIPE = "recipe.resolved.yaml"
# Saving rounds nothing; a forgotten tensor moves logits by more than a tenth.
_LARGEST_DIFFERENCE = 1e-4


def is_whole_class(folder: Path) -> bool:
    """Whether transformers has a class for a folder's `model_type` that takes images and text."""
    try:
        model_type = read_json(folder / "config.json").get("model_type")
    except MMLMError:
        return False
    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def is_only_whole(folder: Path) -> bool:
    """Whether a folder is of a class that MMLM reads whole and in no other way."""
    if (folder / "delta.json").is_file() or not is_whole_class(folder):
        return False
    model_type = str(read_json(folder / "config.json").get("model_type"))
    known = {stock_classes[name].model_type: stock_classes[name] for name in stock_classes}
    if model_type not in known:
        return True
    try:
        return not known[model_type]().reads(folder)
    except MMLMError:
        return False  # damaged: who reads it next says where


def load_whole(
    folder: Path, *, dtype: torch.dtype | None = None
) -> tuple[WholeModel, WholeProcessor]:
    """Read a stock folder as the class that it is.

    Raises:
        CheckpointError: if weights are missing or left over, or the processor writes other
            tokens than MMLM plans with.
        ConfigError: if the class does not say where its parts are.
    """
    try:
        stock_processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot load {folder}: {str(error).strip().splitlines()[0][:300]} "
            f"Download the folder again."
        ) from error
    stock, loading = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if faults := loading.get(kind):
            raise CheckpointError(
                f"{folder}: transformers reads the weights with {kind.replace('_', ' ')} "
                f"{sorted(map(str, faults))[:4]}. Download the folder again."
            )
    takes = _takes(stock)
    processor = WholeProcessor(
        stock_processor, takes=takes, image_token_id=getattr(stock.config, "image_token_id", None)
    )
    model = WholeModel(stock.eval(), processor)
    prove_tokens(processor, model)
    return model.eval(), processor


def _takes(stock: Any) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(stock.forward).parameters)


def probe_picture(seed: int = 0, height: int = 45, width: int = 60) -> Image.Image:
    """Return a picture of coloured noise, the same each time."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def prove_tokens(processor: WholeProcessor, model: WholeModel) -> None:
    """Compare what MMLM prepares with what one call of the stock processor gives.

    Raises:
        CheckpointError: naming the first thing that differs.
    """
    turns = [user("What is it?", [probe_picture()])]
    encoded = processor.encode_chat(turns, add_generation_prompt=True)
    ours = processor.batch([encoded], model)
    theirs = stock_inputs(processor, turns)
    for name in theirs:
        known = ours.get(name)
        if known is None and name not in model.takes:
            continue
        if known is None or not _same(known.cpu(), theirs[name]):
            raise CheckpointError(
                f"{type(processor.stock).__name__} gives other {name} for a question about a "
                f"picture than MMLM prepares from it, so what is learnt would not be what the "
                f"model is asked. Tune this model with the tools of its own authors."
            )


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool(torch.allclose(ours.float(), theirs.float()))


def stock_inputs(processor: WholeProcessor, turns: list[Any]) -> dict[str, Tensor]:
    """Return what one call of the stock processor makes of a conversation."""
    pictures = [picture for turn in turns for picture in turn.images]
    text = processor.chat.render(turns, add_generation_prompt=True)
    begins = processor.tokenizer.bos_token
    values: Any = processor.stock(
        images=[pictures], text=[text], return_tensors="pt",
        add_special_tokens=not (begins and text.startswith(begins)),
    )  # fmt: skip
    return {name: torch.as_tensor(value) for name, value in values.items()}


def save_whole(
    model: WholeModel,
    processor: WholeProcessor,
    folder: Path,
    *,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Write the stock class and its processor, and prove that the folder answers the same.

    Raises:
        CheckpointError: if the folder cannot be written, or does not answer like the model.
    """
    stock: Any = model.stock
    with written_aside(folder) as aside:
        stock.config.architectures = [type(stock).__name__]
        stock.save_pretrained(aside)
        processor.stock.chat_template = processor.chat.template
        processor.stock.save_pretrained(aside)
        if recipe is not None:
            text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
            (aside / _RECIPE).write_text(text, encoding="utf-8")
        _assert_answers_alike(model, processor, aside)


@torch.no_grad()
def _assert_answers_alike(model: WholeModel, processor: WholeProcessor, folder: Path) -> None:
    turns = [user("What is it?", [probe_picture()])]
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=model.dtype, local_files_only=True
    )
    inputs = {
        name: value.to(model.device)
        for name, value in stock_inputs(processor, turns).items()
        if name in model.takes
    }
    was_training = model.training
    model.eval()
    stock: Any = model.stock
    before = stock(**inputs).logits.float()
    after = loaded.to(model.device).eval()(**inputs).logits.float()
    model.train(was_training)
    difference = float((before - after).abs().max() / before.abs().max().clamp_min(1e-9))
    if not difference <= _LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"The written folder answers differently from the model: logits differ by "
            f"{difference:.1e} of their size (allowed {_LARGEST_DIFFERENCE:.0e}). It was not kept."
        )
