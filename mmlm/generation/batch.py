"""Answering many requests at once, with the same text as one by one.

Rows are padded on the left, so that every answer begins right behind its prompt. In float32
the answers equal those of single requests token for token; in bfloat16 the order of additions
may differ with the batch, so near ties may fall either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mmlm.connectors import ConnectorConfig, check_visual_tokens, visual_tokens
from mmlm.generation.settings import GenerationSettings, Request
from mmlm.modeling import MMLMConfig, MMLMForConditionalGeneration
from mmlm.processing import Encoded, MMLMProcessor
from mmlm.whole import WholeProcessor


class Answer(NamedTuple):
    """An answer and how it came about."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: str
    """``"stop"`` if the model ended its turn, ``"length"`` if `max_new_tokens` cut it."""


def answer_batch(
    model: MMLMForConditionalGeneration,
    processor: MMLMProcessor,
    requests: Sequence[Request],
    settings: GenerationSettings | None = None,
) -> list[Answer]:
    """Answer all requests in one batch, in their order."""
    if not requests:
        return []
    settings = settings or GenerationSettings()
    check_visual_tokens(settings.visual_tokens, connector_of(model))
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    with torch.inference_mode(), visual_tokens(settings.visual_tokens):
        prompts = [
            processor.encode_chat(request.conversation(), add_generation_prompt=True)
            for request in requests
        ]
        inputs = model_inputs(prompts, processor, model)
        generator: Any = model
        output = generator.generate(**inputs, **generate_options(processor, settings))
    start = inputs["input_ids"].shape[1]
    rows = output[:, start:].tolist()
    return [
        finish(row, prompt, processor, settings) for row, prompt in zip(rows, prompts, strict=True)
    ]


def model_inputs(
    prompts: Sequence[Encoded], processor: MMLMProcessor, model: MMLMForConditionalGeneration
) -> dict[str, Any]:
    """Pad prompts on the left and put them on the model's device."""
    if isinstance(processor, WholeProcessor):
        return dict(processor.batch(prompts, model))
    width = max(len(prompt.ids) for prompt in prompts)
    padding = pad_id(processor)
    ids = [[padding] * (width - len(p.ids)) + p.ids for p in prompts]
    mask = [[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts]
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels).to(model.device)
    sizes = [size for prompt in prompts for size in prompt.image_sizes]
    inputs |= processor.image_processor.sizes(sizes)
    return inputs


def connector_of(model: Any) -> ConnectorConfig | None:
    """Return the connector's config, or None for a stock class taken whole."""
    config = getattr(model, "config", None)
    return config.connector_part if isinstance(config, MMLMConfig) else None


def pad_id(processor: MMLMProcessor) -> int:
    """Return an id for padding, which is masked and never the image placeholder."""
    padding = processor.tokenizer.pad_token_id
    return processor.chat.stop_ids[0] if padding is None else padding


def generate_options(processor: MMLMProcessor, settings: GenerationSettings) -> dict[str, Any]:
    """Return everything that `generate` needs beside the inputs."""
    options = settings.for_generate()
    options |= {"eos_token_id": list(processor.chat.stop_ids), "pad_token_id": pad_id(processor)}
    if settings.stop:
        options |= {"stop_strings": list(settings.stop), "tokenizer": processor.tokenizer}
    return options


def finish(
    row: list[int], prompt: Encoded, processor: MMLMProcessor, settings: GenerationSettings
) -> Answer:
    """Cut a generated row at its end and turn it into text."""
    stops = set(processor.chat.stop_ids)
    end = next((index for index, token in enumerate(row) if token in stops), None)
    ids = row if end is None else row[:end]
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    reason = "length" if end is None else "stop"
    places = [place for stop in settings.stop if (place := text.find(stop)) >= 0]
    if places:
        text, reason = text[: min(places)], "stop"
    return Answer(text.strip(), len(prompt.ids), len(ids), reason)
