"""Does llama.cpp answer from the written files as the model in memory does?

The package `xllamacpp` brings llama.cpp. It is asked about a square picture of the encoder's
own size, so that no resizing is compared; what must agree are the number of prompt tokens and
the likeliest next token.
"""

from __future__ import annotations

import base64
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mmlm.errors import CheckpointError, MissingExtraError
from mmlm.hub.parity import QUESTION, in_float32, probe_picture
from mmlm.messages import user
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.processing import MMLMProcessor

# A token that is less likely by so little may come first with other roundings.
TIE = 0.05


class Proof(NamedTuple):
    """What both sides said of the picture."""

    token: str
    """The likeliest next token of llama.cpp: that of the model, or one that ties with it."""

    is_tie: bool
    """Whether the model in memory puts another token first, by less than `TIE`."""

    apart: float | None
    """How far llama.cpp's log-probability of it is from ours; None for half a letter."""


class Said(NamedTuple):
    """What llama.cpp said."""

    num_tokens: int
    token: int | None
    """The first token of its answer; None if it ended at once."""

    logprob: float | None


def can_prove() -> bool:
    """Whether llama.cpp is here to be asked."""
    return find_spec("xllamacpp") is not None


def prove(
    model: MMLMForConditionalGeneration, processor: MMLMProcessor, text: Path, eye: Path
) -> Proof:
    """Ask llama.cpp and the model in memory the same, and compare.

    Args:
        model: The model in memory.
        processor: Its processor.
        text: The language model's file.
        eye: The encoder's file.

    Raises:
        MissingExtraError: if `xllamacpp` is not installed.
        CheckpointError: if llama.cpp cannot load the files, or says something else.
    """
    if not can_prove():
        raise MissingExtraError("xllamacpp", needed_for="Asking llama.cpp", extra="llamacpp")
    height, width = model.config.facts.side
    picture = probe_picture().resize((width, height))
    ids, logprobs = _ours(model, processor, picture)
    mine = int(logprobs.argmax())
    said = _theirs(text, eye, picture, len(ids))
    if said.num_tokens != len(ids):
        raise CheckpointError(
            f"llama.cpp reads {said.num_tokens} tokens of the probe, and the model {len(ids)}: "
            f"its tokenizer or template works otherwise. Nothing was written; export another form."
        )
    ends = mine in processor.chat.stop_ids
    token = mine if said.token is None and ends else said.token
    behind = float("inf") if token is None else float(logprobs[mine] - logprobs[token])
    if token is None or behind >= TIE:
        heard = "" if token is None else processor.tokenizer.decode([token])
        raise CheckpointError(
            f"llama.cpp's likeliest token is {token} ({heard!r}), that of the model {mine} "
            f"({processor.tokenizer.decode([mine])!r}). Nothing was written; export another form."
        )
    apart = None if said.logprob is None else abs(said.logprob - float(logprobs[token]))
    return Proof(processor.tokenizer.decode([token]), token != mine, apart)


@torch.no_grad()
def _ours(
    model: MMLMForConditionalGeneration, processor: MMLMProcessor, picture: Image.Image
) -> tuple[list[int], torch.Tensor]:
    encoded = processor.encode_chat([user(QUESTION, [picture])], add_generation_prompt=True)
    assert encoded.pixel_values is not None
    with in_float32(model):
        logits = model(
            input_ids=torch.tensor([encoded.ids], device=model.device),
            pixel_values=encoded.pixel_values.to(model.device),
        ).logits[0, -1]
    return encoded.ids, logits.float().cpu().log_softmax(-1)


def _theirs(text: Path, eye: Path, picture: Image.Image, num_tokens: int) -> Said:
    import xllamacpp  # pyright: ignore[reportMissingImports]

    settings: Any = xllamacpp.CommonParams()
    settings.model.path = str(text)
    settings.mmproj.path = str(eye)
    settings.n_ctx = max(512, 2 * num_tokens)
    settings.n_batch = settings.n_ubatch = settings.n_ctx
    settings.n_parallel = 1
    settings.n_gpu_layers = 0
    settings.mmproj_use_gpu = False
    settings.use_jinja = True
    settings.warmup = False
    settings.verbosity = -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        server: Any = xllamacpp.Server(settings)
    except Exception as error:  # the binding raises what the C++ code throws
        raise CheckpointError(
            f"llama.cpp cannot load {text.name} with {eye.name}: {error}. Nothing was written; "
            f"export another form, and please report this composition."
        ) from error
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    asked = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": address}},
                    {"type": "text", "text": QUESTION},
                ],
            }
        ],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
        "verbose": True,
        "return_tokens": True,
    }
    heard: Any = server.handle_chat_completions(asked)
    heard = json.loads(heard) if isinstance(heard, str | bytes) else heard
    if "choices" not in heard:
        raise CheckpointError(f"llama.cpp refused the probe: {json.dumps(heard)[:300]}")
    spoken: list[int] = heard["__verbose"]["tokens"]
    listed: Any = (heard["choices"][0].get("logprobs") or {}).get("content") or []
    # Half a letter is spoken, and has no log-probability there.
    whole = listed and spoken and int(listed[0]["id"]) == spoken[0]
    return Said(
        int(heard["usage"]["prompt_tokens"]),
        spoken[0] if spoken else None,
        float(listed[0]["logprob"]) if whole else None,
    )
