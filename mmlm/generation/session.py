"""Conversations whose key-value cache is kept: a follow-up costs its own tokens and no more.

    Sessions.stream(messages) ──► longest kept prefix ──► prefill of the rest ──► piece by piece

`Sessions` holds the caches of the conversations that were answered last, within a memory
budget. A new request takes over the cache that shares the longest prefix with it, images
included, and only what lies behind that prefix is computed: pictures in it are neither
opened nor encoded again. Which conversation a request belongs to need not be said, so a
stateless API profits like a chat page. In float32 the answers are those of `answer_batch`,
token for token.

Batches are not served here (see `mmlm.generation.batch`), and beams neither.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmlm.errors import CheckpointError, ConfigError, ImageError, MMLMError
from mmlm.generation.choosing import Chooser
from mmlm.generation.settings import GenerationSettings
from mmlm.generation.words import Words
from mmlm.messages import ImagePart, Message, images_of
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.processing import Encoded, MMLMProcessor

BUDGET_BYTES = 1 << 30
"""How much memory kept caches may take together, unless said otherwise."""

_ORIENTATION = 0x0112

Key = int | tuple[bytes, int]
"""What makes a position: its token, or which picture and which of its tokens."""


@dataclass
class Usage:
    """What an answer cost, filled in while it is generated."""

    num_prompt_tokens: int = 0
    """Tokens of the conversation, image tokens included."""

    num_image_tokens: int = 0
    """Those that stand for images."""

    num_cached_tokens: int = 0
    """Those that were found in a kept cache and not computed."""

    num_tokens: int = 0
    """Tokens of the answer."""

    first_token_seconds: float = 0.0
    """Time from the request to the first token."""

    seconds: float = 0.0
    """Time from the request to the last token."""

    finish_reason: str = "stopped"
    """``"stop"``: the model ended its turn; ``"length"``: a limit did; ``"stopped"``: somebody."""

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        waited = self.seconds - self.first_token_seconds
        return (self.num_tokens - 1) / waited if waited > 0 and self.num_tokens > 1 else 0.0


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The text may be empty: a token need not complete a letter."""

    text: str
    usage: Usage
    """The same object in every piece of an answer; final after the last one."""

    token_id: int | None = None
    """The token, or None where the piece is what was held back till the end."""

    logprob: float | None = None
    """Its log-probability under the model, before temperature and the like."""

    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this place with their log-probabilities, as many as asked for."""


@dataclass
class _Kept:
    """A cache and what its positions are."""

    cache: Any
    keys: list[Key] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """The memory of the keys and values."""
        held = (value for layer in self.cache.layers for value in vars(layer).values())
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))


class Sessions:
    """Answers conversations one at a time and keeps their caches.

    Args:
        model: The model.
        processor: Its processor.
        budget_bytes: Memory for kept caches; the one used longest ago goes first.
    """

    def __init__(
        self,
        model: MMLMForConditionalGeneration,
        processor: MMLMProcessor,
        *,
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:
        self.model = model
        self.processor = processor
        self.budget_bytes = budget_bytes
        self._kept: list[_Kept] = []
        self._lock = threading.Lock()

    def stream(
        self,
        messages: Sequence[Message],
        settings: GenerationSettings | None = None,
        stop_event: threading.Event | None = None,
        *,
        num_top: int = 0,
    ) -> Generator[Piece]:
        """Give the answer to a conversation in pieces, as they are generated.

        Nothing runs while the caller does not ask for the next piece; closing the generator,
        or setting `stop_event`, ends the answer, and what was computed is kept.

        Args:
            messages: The conversation, which ends with a user turn.
            settings: How to answer.
            stop_event: Set it to end the answer before its next token.
            num_top: How many likeliest tokens each piece carries.

        Raises:
            ConfigError: if beams are asked for.
            MMLMError: if the conversation is longer than the model reads.
            CheckpointError: if the model gives numbers that are not finite.
            ImageError: if a picture cannot be opened.
        """
        began = time.perf_counter()
        settings = settings or GenerationSettings()
        if settings.num_beams > 1:
            raise ConfigError(
                f"num_beams is {settings.num_beams}: a beam search knows its words only at the "
                f"end and cannot be streamed. Set num_beams to 1, or use `answer_all`."
            )
        prompt, keys, pictures = self._encode(messages)
        limit = self._room(len(prompt.ids), settings.max_new_tokens)
        kept, start = self._take(keys, prompt.image_spans)
        usage = Usage(len(prompt.ids), sum(b - a for a, b in prompt.image_spans), start)
        chooser = Chooser(settings, prompt.ids, self.model.device)
        words = Words(self.processor.tokenizer, settings.stop)
        stop_ids = frozenset(self.processor.chat.stop_ids)
        try:
            logits = self._prefill(kept, prompt, keys, pictures, start)
            for _ in range(limit):
                if stop_event is not None and stop_event.is_set():
                    break
                token, logprob, top = chooser.choose(logits, num_top)
                usage.num_tokens += 1
                usage.seconds = time.perf_counter() - began
                usage.first_token_seconds = usage.first_token_seconds or usage.seconds
                if token in stop_ids:
                    usage.finish_reason = "stop"
                    usage.num_tokens -= 1  # the end of the turn is no word
                    break
                text = words.add(token)
                if words.ended:
                    usage.finish_reason = "stop"
                if usage.num_tokens == limit and not words.ended:
                    usage.finish_reason = "length"
                yield Piece(text, usage, token, logprob, top)
                if usage.finish_reason != "stopped":
                    break
                logits = self._step(kept, token)
            yield Piece(words.rest(), usage)
        finally:
            usage.seconds = usage.seconds or time.perf_counter() - began
            self._keep(kept)

    def answer(
        self, messages: Sequence[Message], settings: GenerationSettings | None = None
    ) -> tuple[str, Usage]:
        """Answer a conversation at once; the text is stripped like that of `answer_batch`."""
        pieces = list(self.stream(messages, settings))
        return "".join(piece.text for piece in pieces).strip(), pieces[-1].usage

    def forget(self) -> None:
        """Drop every kept cache."""
        with self._lock:
            self._kept.clear()

    @property
    def num_bytes(self) -> int:
        """The memory of all kept caches."""
        with self._lock:
            return sum(kept.num_bytes for kept in self._kept)

    def _encode(self, messages: Sequence[Message]) -> tuple[Encoded, list[Key], list[Any]]:
        """Return the prompt, what makes each of its positions, and its pictures."""
        sources = [_settled(picture) for picture in images_of(messages)]
        settled = _with_images(messages, sources)
        prompt = self.processor.encode_chat(settled, add_generation_prompt=True, with_pixels=False)
        keys: list[Key] = list(prompt.ids)
        for (first, last), source in zip(prompt.image_spans, sources, strict=True):
            name = _digest(source)
            keys[first:last] = [(name, place) for place in range(last - first)]
        return prompt, keys, sources

    def _room(self, num_prompt_tokens: int, wanted: int) -> int:
        """How many tokens the answer may have, given how many the model reads."""
        reads = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if not reads:
            return wanted
        if num_prompt_tokens >= reads:
            raise MMLMError(
                f"The conversation has {num_prompt_tokens:,} tokens, images included; the model "
                f"reads {reads:,}. Begin a new conversation, or take images out."
            )
        return min(wanted, reads - num_prompt_tokens)

    def _take(self, keys: list[Key], spans: Sequence[tuple[int, int]]) -> tuple[_Kept, int]:
        """Take over the cache with the longest common prefix, cut to it, or begin a new one."""
        with self._lock:
            best, length = None, 0
            for kept in self._kept:
                shared = _usable(_num_common(kept.keys, keys), len(keys), spans)
                if not _can_crop(kept.cache) and shared != len(kept.keys):
                    continue
                if shared > length:
                    best, length = kept, shared
            if best is None:
                return _Kept(DynamicCache(config=self.model.config.text_config)), 0
            self._kept.remove(best)
        if length < len(best.keys):
            best.cache.crop(length - len(best.keys))  # negative: so many positions less
            del best.keys[length:]
        return best, length

    def _keep(self, kept: _Kept) -> None:
        """Put a cache back, and drop the oldest ones beyond the budget."""
        # States (Mamba and the like) cannot be cut; and after a fault in the middle of a step,
        # layers differ in length. Such caches are not kept.
        if not kept.keys or not all(isinstance(layer, DynamicLayer) for layer in kept.cache.layers):
            return
        if kept.cache.get_seq_length() != len(kept.keys):
            return
        with self._lock:
            self._kept.append(kept)
            total = sum(entry.num_bytes for entry in self._kept)
            while self._kept and total > self.budget_bytes:
                total -= self._kept.pop(0).num_bytes

    def _prefill(
        self, kept: _Kept, prompt: Encoded, keys: list[Key], pictures: list[Any], start: int
    ) -> Tensor:
        """Compute what lies behind the kept prefix; returns the last logits ``(1, vocabulary)``."""
        new = [
            picture
            for (first, _), picture in zip(prompt.image_spans, pictures, strict=True)
            if first >= start
        ]
        pixels = [self.processor.image_processor.pixels(picture) for picture in new]
        ids = torch.tensor([prompt.ids[start:]], device=self.model.device)
        logits = self._forward(
            kept, ids, torch.cat(pixels).to(self.model.device) if pixels else None
        )
        kept.keys += keys[start:]
        return logits

    def _step(self, kept: _Kept, token: int) -> Tensor:
        logits = self._forward(kept, torch.tensor([[token]], device=self.model.device), None)
        kept.keys.append(token)
        return logits

    @torch.inference_mode()
    def _forward(self, kept: _Kept, ids: Tensor, pixels: Tensor | None) -> Tensor:
        place = len(kept.keys)
        positions = torch.arange(place, place + ids.shape[1], device=ids.device)[None]
        output = self.model(
            input_ids=ids, pixel_values=pixels, position_ids=positions,
            past_key_values=kept.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits = output.logits[:, -1].float()
        if not torch.isfinite(logits).any() or torch.isnan(logits).any():
            raise CheckpointError(
                "The model gave numbers that are not finite instead of words. The weights are "
                "damaged, or half precision overflows: load it with dtype float32."
            )
        return logits


def _num_common(kept: Sequence[Key], wanted: Sequence[Key]) -> int:
    """The length of the longest common prefix."""
    for index, (left, right) in enumerate(zip(kept, wanted, strict=False)):
        if left != right:
            return index
    return min(len(kept), len(wanted))


def _usable(shared: int, total: int, spans: Iterable[tuple[int, int]]) -> int:
    """Leave one token to compute, and never begin inside an image."""
    shared = min(shared, total - 1)
    for first, last in spans:
        if first < shared < last:
            return first
    return shared


def _can_crop(cache: Any) -> bool:
    """Whether every layer keeps all positions; sliding windows forget some."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _settled(picture: Any) -> Any:
    """Read a file once, so that what is named and what is shown are the same bytes."""
    if not isinstance(picture, str | os.PathLike):
        return picture
    try:
        return Path(picture).read_bytes()
    except OSError:
        return picture  # opening it as a picture explains what is wrong


def _with_images(messages: Sequence[Message], pictures: Sequence[Any]) -> list[Message]:
    """Return the conversation with its pictures replaced, in reading order."""
    rest = iter(pictures)
    return [
        replace(
            message,
            content=tuple(
                ImagePart(next(rest)) if isinstance(part, ImagePart) else part
                for part in message.content
            ),
        )
        for message in messages
    ]


def _digest(picture: Any) -> bytes:
    """A name for what a picture shows, equal only if it shows the same."""
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).digest()
    if isinstance(picture, Image.Image):
        clear, turned = picture.info.get("transparency"), picture.getexif().get(_ORIENTATION)
        head = repr((picture.mode, picture.size, picture.getpalette(), clear, turned))
        return hashlib.sha256(head.encode() + picture.tobytes()).digest()
    if isinstance(picture, np.ndarray):
        head = repr((picture.dtype.str, picture.shape))
        return hashlib.sha256(head.encode() + np.ascontiguousarray(picture).tobytes()).digest()
    raise ImageError(
        f"A {type(picture).__name__} cannot be shown to the model. Give a path, the bytes of a "
        f"file, a PIL picture or a numpy array."
    )
