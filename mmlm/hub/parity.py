"""Does a written folder answer as the model in memory does? Asserted each time one is saved.

The folder is loaded as a stranger would load it, through the Auto classes, without anything of
MMLM in the way, and is shown the same picture. Tokens must be equal, pixels and logits equal up
to the rounding of float32, and the greedy answer the same. A class that computes almost the
same is a wrong class.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmlm.errors import CheckpointError
from mmlm.hub.stock import StockClass
from mmlm.messages import Message, user
from mmlm.processing import MMLMProcessor

# Both sides do the same operations on the same numbers; only the order of some additions may
# differ (packed features against a padded batch). A wrong layer or token moves logits by 1e-2
# and more. Relative to the largest logit, because float32 rounds relative to it.
TOLERANCE = 1e-5
NEW_TOKENS = 8
QUESTION = "What is in the picture?"
_PIXELS = ("pixel_values", "image_patches")


class Heard(NamedTuple):
    """What one side made of the probe.

    Shapes:
        ids: ``(tokens,)``
        pixels: ``(tiles, channels, height, width)``, or the stock class's own shape
        logits: ``(tokens, vocabulary)``
        answer: ``(NEW_TOKENS,)`` or fewer
    """

    ids: Tensor
    pixels: Tensor
    logits: Tensor
    answer: Tensor


def probe_picture() -> Image.Image:
    """Return a picture with edges and smooth parts, wider than high, the same every time."""
    rows, columns = np.mgrid[0:90, 0:140]
    red = 255 * columns / 139
    green = 127 + 127 * np.sin(rows / 7.0) * np.cos(columns / 11.0)
    blue = np.where((rows - 45) ** 2 + (columns - 60) ** 2 < 900, 230, 40)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def probe_messages() -> list[Message]:
    """Return the conversation that both sides are asked."""
    return [user(QUESTION, [probe_picture()])]


@torch.no_grad()
def listen(model: Any, processor: MMLMProcessor) -> Heard:
    """Ask the model in memory; its weights are lifted to float32 for the time being."""
    encoded = processor.encode_chat(probe_messages(), add_generation_prompt=True)
    assert encoded.pixel_values is not None
    ids = torch.tensor([encoded.ids], device=model.device)
    pixels = encoded.pixel_values.to(model.device)
    sizes = processor.image_processor.sizes(encoded.image_sizes)
    with in_float32(model):
        inputs = {"input_ids": ids, "pixel_values": pixels, **sizes}
        mask = torch.ones_like(ids)
        logits = model(**inputs, attention_mask=mask).logits[0]
        answer = model.generate(**inputs, attention_mask=mask, **_greedy(processor))
    return Heard(ids[0].cpu(), pixels.cpu(), logits.float().cpu(), answer[0, ids.shape[1] :].cpu())


@torch.no_grad()
def listen_to_folder(
    folder: Path,
    processor: MMLMProcessor,
    device: torch.device,
    *,
    target: StockClass | None = None,
    trust: bool = False,
) -> Heard:
    """Load the folder through the Auto classes and ask it the same.

    Args:
        folder: The folder.
        processor: Ours, for what it stops at.
        device: Where to.
        target: The stock class that it is, if it is one.
        trust: Whether to run the code in the folder, which was written just now.

    Raises:
        CheckpointError: if a tensor is missing, left over or of another shape.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    words: dict[str, Any] = {"local_files_only": True}
    if trust:
        words["trust_remote_code"] = True
    theirs = AutoProcessor.from_pretrained(folder, **words)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **words
    )
    model, loading = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if faults := loading.get(kind):
            raise CheckpointError(
                f"transformers reads the written folder with {kind.replace('_', ' ')}: "
                f"{sorted(map(str, faults))[:4]}. The folder was not kept; please report this "
                f"composition. `model.save_pretrained` writes MMLM's own class meanwhile."
            )
    model = model.to(device).eval()
    target = target or StockClass()
    inputs = target.asked(theirs, probe_messages()).to(device)
    logits = model(**inputs).logits[0]
    answer = model.generate(**inputs, **_greedy(processor))
    ids = target.as_ours(inputs["input_ids"][0], processor.tokenizer)
    pixels = inputs[next(key for key in _PIXELS if key in inputs)].cpu()
    if pixels.ndim == 5:  # pictures × tiles
        pixels = pixels.flatten(0, 1)
    return Heard(ids.cpu(), pixels, logits.float().cpu(), answer[0, len(ids) :].cpu())


def _greedy(processor: MMLMProcessor) -> dict[str, Any]:
    stops = list(processor.chat.stop_ids)
    return {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "eos_token_id": stops,
        "pad_token_id": stops[0],
    }


def rounded_tables(model: nn.Module) -> str:
    """Return the hint that belongs to a model whose computed tables were rounded, or nothing."""
    stored = set(model.state_dict())
    half = (torch.bfloat16, torch.float16)
    rounded = [n for n, b in model.named_buffers() if n not in stored and b.dtype in half]
    if not rounded:
        return ""
    return (
        f" Its computed tables were rounded ({rounded[0]}), as `to(dtype)` and `half()` do; "
        f"`model.cast(dtype)` leaves them exact."
    )


def assert_same(ours: Heard, theirs: Heard, *, class_name: str, hint: str = "") -> float:
    """Compare what both sides made of the probe.

    Args:
        ours: What the model in memory made of it.
        theirs: What the folder made of it.
        class_name: The stock class, for the message.
        hint: What is known about the model that may explain a difference in logits.

    Returns:
        The largest difference between logits, relative to the largest logit.

    Raises:
        CheckpointError: naming the first thing that differs.
    """
    if ours.ids.tolist() != theirs.ids.tolist():
        raise _differs(
            class_name,
            f"the tokens of the probe differ (ours {_few(ours.ids)}, the folder's "
            f"{_few(theirs.ids)})",
        )
    if ours.pixels.shape == theirs.pixels.shape:
        apart = float((ours.pixels - theirs.pixels).abs().max())
        if apart > TOLERANCE:
            raise _differs(class_name, f"the pixels of the probe differ by {apart:.1e}")
    scale = max(1.0, float(ours.logits.abs().max()))
    apart = float((ours.logits - theirs.logits).abs().max()) / scale
    if not apart <= TOLERANCE:
        raise _differs(
            class_name,
            f"the logits differ by {apart:.1e} of the largest, more than {TOLERANCE:g}.{hint}",
        )
    if ours.answer.tolist() != theirs.answer.tolist():
        raise _differs(
            class_name,
            f"the greedy answers differ (ours {_few(ours.answer)}, the folder's "
            f"{_few(theirs.answer)})",
        )
    return apart


def _few(ids: Tensor) -> str:
    numbers = ids.tolist()
    return f"{len(numbers)} tokens: {numbers[:12]}{' …' if len(numbers) > 12 else ''}"


def _differs(class_name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"The folder written as {class_name} does not answer as the model in memory: {what}. It "
        f"was not kept, and an earlier folder stands as it was. `model.save_pretrained` writes "
        f"MMLM's own class, which needs no such equality; please report this composition."
    )


@contextmanager
def in_float32(model: nn.Module) -> Generator[None]:
    """Lift all weights to float32, in evaluation mode; afterwards the very same tensors return."""
    was_training = {name: module.training for name, module in model.named_modules()}
    held = [
        (tensor, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    try:
        for tensor, _ in held:
            tensor.data = tensor.data.float()
        model.eval()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data
        for name, module in model.named_modules():
            module.training = was_training[name]
