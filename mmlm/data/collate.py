"""From planned samples to the tensors of one forward pass, packed or padded.

Packed is one row in which position ids restart at every sample and the borders are given;
padded is the classic batch with an attention mask, for models that cannot be packed and
for HF Trainer and TRL (`MMLMCollator`). The loss of both is the same. Nothing is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmlm.data.planning import NOT_LEARNT, Planned
from mmlm.data.schema import Sample
from mmlm.errors import DataError
from mmlm.features import ClipSize, Size
from mmlm.messages import ImagePart, Message, Text, from_openai
from mmlm.processing import MMLMProcessor


def collate_packed(samples: Sequence[Planned]) -> dict[str, Tensor]:
    """Put samples one after another into a single row.

    Shapes:
        input_ids, labels, position_ids: ``(1, tokens)``
        cu_seq_lens_q: ``(pieces + 1,)``, the borders; most samples are one piece
        seen_before: ``(pieces, 2)``, only where samples share pictures: beginning and length of
            an earlier stretch that a piece sees too
    """
    lengths: list[int] = []
    positions: list[NDArray[np.int64]] = []
    seen: list[tuple[int, int]] = []
    start = 0
    for sample in samples:
        head = sample.pieces[0] if sample.shares else 0
        for number, length in enumerate(sample.pieces or (sample.num_tokens,)):
            before = head if number else 0
            lengths.append(length)
            positions.append(np.arange(before, before + length))
            seen.append((start, before))
        start += sample.num_tokens
    row = {
        "input_ids": _row([sample.ids for sample in samples]),
        "labels": _row([sample.labels for sample in samples]),
        "position_ids": _row(positions),
        "cu_seq_lens_q": torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
    }
    if any(sample.shares for sample in samples):
        row["seen_before"] = torch.tensor(seen, dtype=torch.int32)
    return row


def collate_padded(samples: Sequence[Planned], *, pad_id: int) -> dict[str, Tensor]:
    """Put samples under one another, padded on the right; questions apart have lines of their own.

    Shapes:
        input_ids, labels, attention_mask: ``(pieces, longest)``; most samples are one piece

    Raises:
        DataError: if a sample shares a picture among questions, which only packed rows can.
    """
    lines = [line for sample in samples for line in _lines(sample)]
    longest = max(len(line) for line, _ in lines)
    ids = torch.full((len(lines), longest), pad_id, dtype=torch.long)
    labels = torch.full_like(ids, NOT_LEARNT)
    mask = torch.zeros_like(ids)
    for index, (line, learnt) in enumerate(lines):
        ids[index, : len(line)] = torch.from_numpy(line)
        labels[index, : len(line)] = torch.from_numpy(learnt)
        mask[index, : len(line)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def by_piece(samples: Sequence[Planned], values: Sequence[Tensor]) -> list[Tensor]:
    """Cut what there is for each sample into what there is for each of its pieces."""
    found: list[Tensor] = []
    for sample, value in zip(samples, values, strict=True):
        found += value.split(list(sample.pieces)) if sample.pieces else [value]
    return found


def _lines(sample: Planned) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return ids and labels of every piece of a sample."""
    if sample.shares:
        raise DataError(
            f"Sample {sample.id} of {sample.source} shares a picture among its questions, and a "
            f"padded batch cannot. Plan it with share=False."
        )
    borders = np.cumsum(sample.pieces)[:-1]
    return list(zip(np.split(sample.ids, borders), np.split(sample.labels, borders), strict=True))


def _row(pieces: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64)).unsqueeze(0)


class MMLMCollator:
    """Turns conversations into a padded batch with labels, for HF Trainer and TRL.

    An example is a `Sample`, or a mapping with `messages` in the OpenAI shape and, beside
    them, `images` for the image parts that hold none.

    Args:
        processor: The processor of the model.
        max_tokens: Longer samples are an error, never cut; None sets no limit.
    """

    def __init__(self, processor: MMLMProcessor, *, max_tokens: int | None = None) -> None:
        self.processor = processor
        self.max_tokens = max_tokens

    def __call__(self, examples: Sequence[Sample | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Encode and pad a batch.

        Raises:
            DataError: if an example is too long or has no conversation.
        """
        planned: list[Planned] = []
        pixels: list[Tensor] = []
        sizes: list[Size | ClipSize] = []
        for index, example in enumerate(examples):
            encoded = self.processor.encode_chat(_messages_of(example), with_labels=True)
            if self.max_tokens is not None and len(encoded.ids) > self.max_tokens:
                raise DataError(
                    f"Example {index} of the batch has {len(encoded.ids)} tokens, more than "
                    f"max_tokens ({self.max_tokens}). Samples are never cut: leave it out, or "
                    f"raise max_tokens."
                )
            if encoded.pixel_values is not None:
                pixels.append(encoded.pixel_values)
                sizes += encoded.image_sizes
            ids = np.array(encoded.ids, dtype=np.int64)
            labels = np.array(encoded.labels, dtype=np.int64)
            planned.append(Planned(index, "", index, str(index), ids, labels, (), 0))
        tokenizer = self.processor.tokenizer
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        batch = collate_padded(planned, pad_id=pad_id)
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
            batch |= self.processor.image_processor.sizes(sizes)
        return batch


def _messages_of(example: Sample | Mapping[str, Any]) -> list[Message]:
    if isinstance(example, Sample):
        return list(example.messages)
    if "messages" not in example and "prompt" not in example:
        raise DataError(
            f"An example needs `messages`, or `prompt` and `completion` (got the keys "
            f"{', '.join(map(str, example)) or 'none'})."
        )
    rows = example.get("messages") or [*example["prompt"], *example.get("completion", [])]
    messages = from_openai(rows)
    images = example.get("images") or ([example["image"]] if example.get("image") else [])
    waiting = list(images)
    filled: list[Message] = []
    for message in messages:
        parts = [
            ImagePart(waiting.pop(0))
            if isinstance(part, ImagePart) and part.image is None and waiting
            else part
            for part in message.content
        ]
        filled.append(Message(message.role, tuple(parts), message.learn))
    if waiting and len(waiting) == len(images):
        first = next(i for i, message in enumerate(filled) if message.role == "user")
        head = tuple(ImagePart(image) for image in waiting)
        filled[first] = Message("user", (*head, *filled[first].content), filled[first].learn)
    elif waiting:
        raise DataError(
            f"An example has {len(images)} images and {len(images) - len(waiting)} places for "
            f"them. Write one image part for each image."
        )
    return [
        Message(m.role, tuple(p for p in m.content if not isinstance(p, Text) or p.text), m.learn)
        for m in filled
    ]
