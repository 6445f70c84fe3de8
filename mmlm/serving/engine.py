"""One model that many people talk to: answers one at a time, first come, first served.

    assistant, generation.Sessions ──► engine ──► chat_ui, openai_api, the terminal
                                       you are here

An engine adds to `Sessions` what a server needs: a fair turn, the words for what went wrong,
and what the model tells about itself. It does not batch; for many users at once put vLLM
behind the stock folder.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Protocol

from mmlm.errors import MMLMError
from mmlm.generation import GenerationSettings
from mmlm.generation.session import BUDGET_BYTES, Piece, Sessions
from mmlm.messages import Message
from mmlm.serving.about import About, read_about

log = logging.getLogger("mmlm.serving")


class Speaker(Protocol):
    """What the page, the API and the terminal talk to."""

    name: str
    about: About

    def stream(
        self,
        messages: Sequence[Message],
        settings: GenerationSettings,
        stop_event: threading.Event | None = None,
        *,
        num_top: int = 0,
    ) -> Generator[Piece]:
        """Answer piece by piece; closing the generator or setting the event ends the answer."""
        ...


class Turns:
    """A lock that is given in the order in which it was asked for, to any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    @property
    def num_waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    def take(self, stop_event: threading.Event | None = None) -> bool:
        """Wait for the turn; False if `stop_event` was set before it came."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return True
            mine = threading.Event()
            self._waiting.append(mine)
        while not mine.wait(0.05):
            if stop_event is not None and stop_event.is_set():
                with self._guard:
                    if mine in self._waiting:
                        self._waiting.remove(mine)
                        return False
                break  # the turn came in this very moment
        return True

    def give(self) -> None:
        """Hand the turn to the next in line."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False


class Engine:
    """A model that answers one conversation at a time.

    Args:
        sessions: Answers conversations and keeps their caches.
        name: What it is called, on the page and as `model` in the API.
        about: What it tells about itself.
    """

    def __init__(self, sessions: Sessions, *, name: str, about: About | None = None) -> None:
        self.name = name
        self.about = about or About(title=name)
        self.sessions = sessions
        self.turns = Turns()

    @classmethod
    def load(cls, source: str | Path, *, budget_bytes: int = BUDGET_BYTES) -> Engine:
        """Load a model from a folder or the Hub.

        Raises:
            CheckpointError: if it cannot be loaded.
        """
        from mmlm.assistant import load

        assistant = load(source)
        about = read_about(source)
        sessions = Sessions(assistant.model, assistant.processor, budget_bytes=budget_bytes)
        return cls(sessions, name=about.title or Path(source).name, about=about)

    def stream(
        self,
        messages: Sequence[Message],
        settings: GenerationSettings,
        stop_event: threading.Event | None = None,
        *,
        num_top: int = 0,
    ) -> Generator[Piece]:
        """Wait for the turn, then answer piece by piece."""
        if not self.turns.take(stop_event):
            return
        try:
            yield from self.sessions.stream(messages, settings, stop_event, num_top=num_top)
        finally:
            self.turns.give()


def in_words(fault: BaseException) -> str:
    """Say what went wrong so that the person who asked understands it.

    What was raised on purpose explains itself. Anything else is written to the log with its
    traceback, and named without inner details.
    """
    if isinstance(fault, MMLMError):
        return str(fault)
    kind = type(fault).__name__
    if kind == "OutOfMemoryError" or isinstance(fault, MemoryError):
        _free_memory()
        return (
            "The machine ran out of memory on this conversation. Begin a new one, use fewer or "
            "smaller pictures, or a shorter answer."
        )
    log.error("answering failed", exc_info=fault)
    return (
        f"Something went wrong inside the model ({kind}). The conversation is kept; the log of "
        f"the server says more."
    )


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
