"""Conversations whose key-value cache is kept: a follow-up costs its own tokens and no more.

    Sessions.stream(messages) ──► longest kept prefix ──► prefill of the rest ──► piece by piece

`Sessions` holds the caches of the conversations that were answered last, within a memory
budget. A new request takes over the cache that shares the longest prefix with it, images
included, and only what lies behind that prefix is computed: pictures in it are neither
opened nor encoded again. Which conversation a request belongs to need not be said, so a
stateless API profits like a chat page. In float32 the answers are those of `answer_batch`,
token for token.

Several answers at once are stepped by `mmlm.generation.together`; beams are not served here
(see `mmlm.generation.batch`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmlm.connectors import QuestionConfig, check_visual_tokens, visual_tokens
from mmlm.errors import CheckpointError, ConfigError, MMLMError
from mmlm.generation.answering import Answering as Answering
from mmlm.generation.answering import Kept, Key
from mmlm.generation.answering import Piece as Piece
from mmlm.generation.answering import Usage as Usage
from mmlm.generation.batch import connector_of
from mmlm.generation.choosing import Chooser
from mmlm.generation.identity import digest, settled, with_images
from mmlm.generation.json_form import JsonForm
from mmlm.generation.settings import GenerationSettings
from mmlm.generation.words import Words
from mmlm.messages import Message, images_of
from mmlm.modeling import MMLMForConditionalGeneration, question_of
from mmlm.processing import Encoded, MMLMProcessor

BUDGET_BYTES = 1 << 30
"""How much memory kept caches may take together, unless said otherwise."""


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
        self.using: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered around every forward pass; where others share the model, it holds it for us."""
        self._kept: list[Kept] = []
        self._lock = threading.Lock()

    def stream(
        self,
        messages: Sequence[Message],
        settings: GenerationSettings | None = None,
        stop_event: threading.Event | None = None,
        *,
        num_top: int = 0,
        as_json: bool = False,
    ) -> Generator[Piece]:
        """Give the answer to a conversation in pieces, as they are generated.

        Nothing runs while the caller does not ask for the next piece; closing the generator,
        or setting `stop_event`, ends the answer, and what was computed is kept.

        Args:
            messages: The conversation, which ends with a user turn.
            settings: How to answer.
            stop_event: Set it to end the answer before its next token.
            num_top: How many likeliest tokens each piece carries.
            as_json: The answer is one JSON object: tokens that break it are never chosen.

        Raises:
            ConfigError: if beams are asked for.
            MMLMError: if the conversation is longer than the model reads.
            CheckpointError: if the model gives numbers that are not finite.
            ImageError: if a picture cannot be opened.
        """
        answering = self.begin(messages, settings, num_top=num_top, as_json=as_json)
        try:
            logits = self.prefill(answering)
            while stop_event is None or not stop_event.is_set():
                piece = answering.take(logits)
                if piece is not None:
                    yield piece
                if answering.ended:
                    break
                logits = self.step(answering)
            yield answering.rest()
        finally:
            self.end(answering)

    def begin(
        self,
        messages: Sequence[Message],
        settings: GenerationSettings | None = None,
        *,
        num_top: int = 0,
        as_json: bool = False,
        began: float | None = None,
    ) -> Answering:
        """Prepare an answer, whose tokens are then taken one by one; `end` must follow.

        Args:
            messages: The conversation, which ends with a user turn.
            settings: How to answer.
            num_top: How many likeliest tokens each piece carries.
            as_json: The answer is one JSON object.
            began: When the request came, by `time.perf_counter`; now, when left out.
        """
        began = time.perf_counter() if began is None else began
        settings = settings or GenerationSettings()
        if settings.num_beams > 1:
            raise ConfigError(
                f"num_beams is {settings.num_beams}: a beam search knows its words only at the "
                f"end and cannot be streamed. Set num_beams to 1, or use `answer_all`."
            )
        check_visual_tokens(settings.visual_tokens, connector_of(self.model))
        with visual_tokens(settings.visual_tokens):
            prompt, keys, pictures = self._encode(messages)
        limit = self._room(len(prompt.ids), settings.max_new_tokens)
        kept, start = self._take(keys, prompt.image_spans)
        stop_ids = frozenset(self.processor.chat.stop_ids)
        tokenizer = self.processor.tokenizer
        return Answering(
            prompt=prompt, keys=keys, pictures=pictures, start=start, kept=kept,
            usage=Usage(len(prompt.ids), sum(b - a for a, b in prompt.image_spans), start),
            chooser=Chooser(settings, prompt.ids, self.model.device),
            words=Words(tokenizer, settings.stop), stop_ids=stop_ids, limit=limit,
            num_top=num_top, began=began, form=JsonForm(tokenizer, stop_ids) if as_json else None,
            visual_tokens=settings.visual_tokens,
        )  # fmt: skip

    def end(self, answering: Answering) -> None:
        """Keep the cache of an answer that ended, however it did."""
        usage = answering.usage
        usage.seconds = usage.seconds or time.perf_counter() - answering.began
        self._keep(answering.kept)

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
        sources = [settled(picture) for picture in images_of(messages)]
        conversation = with_images(messages, sources)
        prompt = self.processor.encode_chat(
            conversation, add_generation_prompt=True, with_pixels=False
        )
        keys: list[Key] = list(prompt.ids)
        connector = connector_of(self.model)
        for (first, last), source in zip(prompt.image_spans, sources, strict=True):
            name = digest(source)
            if isinstance(connector, QuestionConfig):  # another question sees another picture
                asked = question_of(prompt.ids, (first, last), connector)
                name += repr(asked).encode()
            keys[first:last] = [(name, place) for place in range(last - first)]
        return prompt, keys, sources

    @property
    def _reads_question(self) -> bool:
        return isinstance(connector_of(self.model), QuestionConfig)

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

    def _take(self, keys: list[Key], spans: Sequence[tuple[int, int]]) -> tuple[Kept, int]:
        """Take over the cache with the longest common prefix, cut to it, or begin a new one."""
        with self._lock:
            best, length = None, 0
            for kept in self._kept:
                shared = _usable(_num_common(kept.keys, keys), len(keys), spans)
                if not can_crop(kept.cache) and shared != len(kept.keys):
                    continue
                if self._reads_question and any(first >= shared for first, _ in spans):
                    continue  # a new picture needs its whole question
                if shared > length:
                    best, length = kept, shared
            if best is None:
                return Kept(DynamicCache(config=self.model.config.text_config)), 0
            self._kept.remove(best)
        if length < len(best.keys):
            best.cache.crop(length - len(best.keys))  # negative: so many positions less
            del best.keys[length:]
        return best, length

    def _keep(self, kept: Kept) -> None:
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

    def prefill(self, answering: Answering) -> Tensor:
        """Compute what lies behind the kept prefix; returns the last logits ``(1, vocabulary)``."""
        prompt, start, kept = answering.prompt, answering.start, answering.kept
        new = [
            picture
            for (first, _), picture in zip(prompt.image_spans, answering.pictures, strict=True)
            if first >= start
        ]
        looks = self.processor.image_processor
        seen = looks.together([looks.look(picture) for picture in new])
        ids = torch.tensor([prompt.ids[start:]], device=self.model.device)
        pixels, sizes = seen.get("pixel_values"), seen.get("image_sizes")
        pixels = None if pixels is None else pixels.to(self.model.device)
        with visual_tokens(answering.visual_tokens):
            logits = self.read(kept, ids, pixels, image_sizes=sizes)
        kept.keys += answering.keys[start:]
        return logits

    def step(self, answering: Answering) -> Tensor:
        """Let the model read the token that was taken last; returns ``(1, vocabulary)``."""
        ids = torch.tensor([[answering.token]], device=self.model.device)
        logits = self.read(answering.kept, ids, None)
        answering.kept.keys.append(answering.token)
        return logits

    @torch.inference_mode()
    def read(self, kept: Kept, ids: Tensor, pixels: Tensor | None, **extra: Any) -> Tensor:
        """Let the model read on in a conversation; returns the last logits ``(1, vocabulary)``.

        Shapes:
            ids: ``(1, tokens)``, behind what `kept` holds
            pixels: ``(tiles, channels, height, width)`` of the images among them, or None
        """
        place = len(kept.keys)
        positions = torch.arange(place, place + ids.shape[1], device=ids.device)[None]
        with self.using():
            output = self.model(
                input_ids=ids, pixel_values=pixels, position_ids=positions,
                past_key_values=kept.cache, use_cache=True, logits_to_keep=1, **extra,
            )  # fmt: skip
        return checked(output.logits[:, -1].float())


def checked(logits: Tensor) -> Tensor:
    """Return logits that words can be chosen from.

    Raises:
        CheckpointError: if they are not numbers.
    """
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


def can_crop(cache: Any) -> bool:
    """Whether every layer keeps all positions; sliding windows and states forget some."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)
