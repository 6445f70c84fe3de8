"""A model that needs no weights: it says what it was asked and shown, word by word."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence

from mmlm.generation import GenerationSettings
from mmlm.generation.session import Piece, Usage
from mmlm.messages import Message
from mmlm.serving.about import About


class FakeSpeaker:
    """Answers with the number of turns, the pictures and the last question."""

    def __init__(
        self, name: str = "fake", *, words: int = 0, pause: float = 0.0,
        fault: BaseException | None = None, about: About | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.about = about or About(title=name)
        self.words, self.pause, self.fault = words, pause, fault
        self.heard: list[Sequence[Message]] = []
        self.settings: list[GenerationSettings] = []
        self.clients: list[str] = []
        self.forms: list[bool] = []
        self.num_said = 0
        self.num_closed = 0

    def stream(
        self, messages: Sequence[Message], settings: GenerationSettings,
        stop_event: threading.Event | None = None, *, num_top: int = 0, as_json: bool = False,
        client: str = "",
    ) -> Generator[Piece]:  # fmt: skip
        self.heard.append(list(messages))
        self.settings.append(settings)
        self.clients.append(client)
        self.forms.append(as_json)
        usage = Usage(num_prompt_tokens=7, num_image_tokens=4)
        images = sum(len(message.images) for message in messages)
        text = f"{len(messages)} turns, {images} pictures: {messages[-1].text}"
        words = text.split(" ") + [f"word{number}" for number in range(self.words)]
        began = time.perf_counter()
        try:
            for number, word in enumerate(words):
                if stop_event is not None and stop_event.is_set():
                    return
                if self.fault is not None and number == 2:
                    raise self.fault
                time.sleep(self.pause)
                self.num_said += 1
                usage.num_tokens = number + 1
                usage.seconds = time.perf_counter() - began
                usage.first_token_seconds = usage.first_token_seconds or usage.seconds
                if number == len(words) - 1:
                    usage.finish_reason = "stop"
                yield Piece(word if number == 0 else " " + word, usage, number, -0.5, ())
        finally:
            self.num_closed += 1
