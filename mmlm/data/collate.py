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
from torch import Tensor

from mmlm.data.planning import NOT_LEARNT, Planned
from mmlm.data.schema import Sample
from mmlm.errors import DataError
from mmlm.features import Size
from mmlm.messages import ImagePart, Message, Text, from_openai
from mmlm.processing import MMLMProcessor


def collate_packed(samples: Sequence[Planned]) -> dict[str, Tensor]:
    """Put samples one after another into a single row.

    Shapes:
        input_ids, labels, position_ids: ``(1, tokens)``
        cu_seq_lens_q: ``(samples + 1,)``, the borders
    """
    lengths = [sample.num_tokens for sample in samples]
    return {
        "input_ids": _row([sample.ids for sample in samples]),
        "labels": _row([sample.labels for sample in samples]),
        "position_ids": _row([np.arange(length) for length in lengths]),
        "cu_seq_lens_q": torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
    }


def collate_padded(samples: Sequence[Planned], *, pad_id: int) -> dict[str, Tensor]:
    """Put samples under one another, padded on the right.

    Shapes:
        input_ids, labels, attention_mask: ``(samples, longest)``
    """
    longest = max(sample.num_tokens for sample in samples)
    ids = torch.full((len(samples), longest), pad_id, dtype=torch.long)
    labels = torch.full_like(ids, NOT_LEARNT)
    mask = torch.zeros_like(ids)
    for index, sample in enumerate(samples):
        ids[index, : sample.num_tokens] = torch.from_numpy(sample.ids)
        labels[index, : sample.num_tokens] = torch.from_numpy(sample.labels)
        mask[index, : sample.num_tokens] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


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
        sizes: list[Size] = []
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
