"""An answer piece by piece, which stops within one token when nobody listens any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from mmlm.generation.batch import generate_options, model_inputs
from mmlm.generation.settings import GenerationSettings
from mmlm.messages import Message
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.processing import MMLMProcessor


class _Stop(StoppingCriteria):
    """Ends generation when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return True for every row once the event is set."""
        stopped = self.event.is_set()
        return torch.full((input_ids.shape[0],), stopped, device=input_ids.device)


def stream(
    model: MMLMForConditionalGeneration,
    processor: MMLMProcessor,
    messages: Sequence[Message],
    settings: GenerationSettings | None = None,
    stop_event: threading.Event | None = None,
) -> Iterator[str]:
    """Give the answer to a conversation in pieces, as they are generated.

    Closing the iterator, or setting `stop_event`, ends generation within one token. A fault
    while generating is raised here, in the caller's thread.
    """
    settings = settings or GenerationSettings()
    stop = stop_event or threading.Event()
    prompt = processor.encode_chat(messages, add_generation_prompt=True)
    inputs = model_inputs([prompt], processor, model)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    faults: list[BaseException] = []

    def work() -> None:
        try:
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
            with torch.inference_mode():
                generator: Any = model
                generator.generate(
                    **inputs,
                    **generate_options(processor, settings),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                )
        except BaseException as fault:
            faults.append(fault)
        finally:
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from _until_stop_string(iter(streamer), settings.stop)
    finally:
        stop.set()
        thread.join()
    if faults:
        raise faults[0]


def _until_stop_string(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Pass pieces on, and hold back what may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    held = ""
    for piece in pieces:
        held += piece
        places = [place for stop in stops if (place := held.find(stop)) >= 0]
        if places:
            yield held[: min(places)]
            return
        ready = len(held) - longest
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held
