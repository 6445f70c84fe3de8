"""One model that a few people talk to at once, each in fair turn.

    assistant, generation.Sessions ──► engine ──► chat_ui, openai_api, the terminal
                                       you are here

An engine adds to `Sessions` what a server needs: a line that is fair between clients, a few
answers that grow together, the words for what went wrong, and what the model tells about
itself. It is for one machine and few users; for many put vLLM before the stock folder.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from mmlm.errors import MMLMError
from mmlm.generation import GenerationSettings
from mmlm.generation.session import BUDGET_BYTES, Answering, Piece, Sessions
from mmlm.generation.together import Together
from mmlm.messages import Message
from mmlm.serving.about import About, read_about
from mmlm.serving.line import FairLine

T = TypeVar("T")
_LONGEST_STEP_SECONDS = 60.0
"""How long who leaves waits for the step that runs, so that its cache is kept first."""

log = logging.getLogger("mmlm.serving")


class EngineGoneError(MMLMError):
    """The server that runs the model does not answer, or failed; later it may."""


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
        as_json: bool = False,
        client: str = "",
    ) -> Generator[Piece]:
        """Answer piece by piece; closing the generator or setting the event ends the answer."""
        ...


class _Ticket:
    """One request: what is asked, and the pieces of its answer on their way to who asked."""

    def __init__(self, begin: Callable[[], Answering], stop_event: threading.Event | None) -> None:
        self.begin = begin
        self.answering: Answering | None = None
        self.logits: Any = None
        self.pieces: SimpleQueue[Piece | BaseException | None] = SimpleQueue()
        self.left = threading.Event()
        self.done = threading.Event()
        self._stop_event = stop_event

    @property
    def stopped(self) -> bool:
        """Whether nobody wants the next token."""
        return self.left.is_set() or (self._stop_event is not None and self._stop_event.is_set())


class Engine:
    """A model that answers a few conversations at a time, and lets the others wait in line.

    A thread works while there is something to answer. Between two tokens it admits who waits,
    lets go who left, and steps all answers with one forward (see `mmlm.generation.together`).

    Args:
        sessions: Answers conversations and keeps their caches.
        name: What it is called, on the page and as `model` in the API.
        about: What it tells about itself.
        max_together: Most answers that grow at once.
    """

    def __init__(
        self, sessions: Sessions, *, name: str, about: About | None = None, max_together: int = 4
    ) -> None:
        self.name = name
        self.about = about or About(title=name)
        self.sessions = sessions
        self.max_together = max_together
        self._guard = threading.Lock()
        self._line: FairLine[_Ticket] = FairLine()
        self._growing: list[_Ticket] = []
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._together = Together(sessions)
        self._worker: threading.Thread | None = None

    @classmethod
    def load(
        cls, source: str | Path, *, budget_bytes: int = BUDGET_BYTES, bits: int | None = None
    ) -> Engine:
        """Load a model from a folder or the Hub.

        Args:
            source: The folder, or the name on the Hub.
            budget_bytes: Memory for the caches of conversations.
            bits: Hold the language model in 4 (NF4) or 8 bits.

        Raises:
            CheckpointError: if it cannot be loaded.
            MissingExtraError: if `bits` is asked for and bitsandbytes is not installed.
        """
        from mmlm.assistant import load

        assistant = load(source)
        if bits is not None:
            from mmlm.generation.bits import hold_in_bits

            hold_in_bits(assistant.model, bits)
        about = read_about(source)
        sessions = Sessions(assistant.model.eval(), assistant.processor, budget_bytes=budget_bytes)
        return cls(sessions, name=about.title or Path(source).name, about=about)

    @property
    def num_waiting(self) -> int:
        """How many requests wait in line."""
        with self._guard:
            return len(self._line)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is answered and nobody waits."""
        with self._guard:
            return not self._growing and not len(self._line)

    def stream(
        self,
        messages: Sequence[Message],
        settings: GenerationSettings,
        stop_event: threading.Event | None = None,
        *,
        num_top: int = 0,
        as_json: bool = False,
        client: str = "",
    ) -> Generator[Piece]:
        """Wait in line, then answer piece by piece."""
        began = time.perf_counter()

        def begin() -> Answering:
            return self.sessions.begin(
                messages, settings, num_top=num_top, as_json=as_json, began=began
            )

        ticket = _Ticket(begin, stop_event)
        with self._guard:
            self._line.put(client, ticket)
            self._wake()
        try:
            while (item := ticket.pieces.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            ticket.left.set()
            # What was computed is kept before anybody goes on from there.
            if threading.current_thread() is not self._worker:
                ticket.done.wait(_LONGEST_STEP_SECONDS)

    def between(self, call: Callable[[], T]) -> T:
        """Use the model for something else between two tokens; returns what `call` returns."""
        future: Future[T] = Future()
        with self._guard:
            self._calls.append((future, call))
            self._wake()
        return future.result()

    def _wake(self) -> None:
        """Begin to work, unless that is being done; the guard is held."""
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name=self.name, daemon=True)
            self._worker.start()

    def _work(self) -> None:
        """Answer until nothing is left to do; a fault of our own must not leave anybody waiting."""
        try:
            self._answer_all()
        except BaseException as fault:
            with self._guard:
                left = [*self._growing, *self._line.waiting()]
                self._growing, self._line, self._worker = [], FairLine(), None
                self._together = Together(self.sessions)
            for ticket in left:
                _settle(ticket, fault)

    def _answer_all(self) -> None:
        while True:
            with self._guard:
                calls, self._calls = self._calls, deque()
                gone = [ticket for ticket in self._line.waiting() if ticket.stopped]
                for ticket in gone:
                    self._line.drop(ticket)
                admitted: list[_Ticket] = []
                while len(self._line) and len(self._growing) < self.max_together:
                    admitted.append(self._line.take())
                    self._growing.append(admitted[-1])
                if not calls and not gone and not self._growing:
                    self._worker = None
                    return
            for future, call in calls:
                _fulfil(future, call)
            for ticket in gone:
                _settle(ticket)
            for ticket in admitted:
                self._admit(ticket)
            self._read()

    def _admit(self, ticket: _Ticket) -> None:
        """Compute the prompt of a request."""
        if ticket.stopped:
            self._finish(ticket)
            return
        try:
            ticket.answering = ticket.begin()
            ticket.logits = self.sessions.prefill(ticket.answering)
        except BaseException as fault:
            self._finish(ticket, fault)

    def _read(self) -> None:
        """Take a token of every answer, and let the model read it."""
        for ticket in list(self._growing):
            if ticket.stopped:
                self._finish(ticket)
            elif isinstance(ticket.logits, Exception):
                self._finish(ticket, ticket.logits)
            else:
                self._take(ticket)
        growing = self._growing
        logits = self._together.step([t.answering for t in growing if t.answering is not None])
        for ticket, given in zip(growing, logits, strict=True):
            ticket.logits = given

    def _take(self, ticket: _Ticket) -> None:
        answering = ticket.answering
        assert answering is not None
        try:
            piece = answering.take(ticket.logits)
        except Exception as fault:
            self._finish(ticket, fault)
            return
        if piece is not None:
            ticket.pieces.put(piece)
        if answering.ended:
            self._finish(ticket)

    def _finish(self, ticket: _Ticket, fault: BaseException | None = None) -> None:
        """Keep the cache of an answer, and tell whoever listens that it ended."""
        answering = ticket.answering
        if answering is not None:
            self._together.part()
            if fault is None:
                ticket.pieces.put(answering.rest())
            self.sessions.end(answering)
        with self._guard:
            self._growing.remove(ticket)
        _settle(ticket, fault)


def _settle(ticket: _Ticket, fault: BaseException | None = None) -> None:
    ticket.logits = None
    ticket.pieces.put(fault)
    ticket.done.set()


def _fulfil(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as fault:
        future.set_exception(fault)


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
