"""A conversation that remembers what was said and shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

from mmlm.generation.batch import answer_batch
from mmlm.generation.settings import GenerationSettings, Request
from mmlm.generation.stream import stream
from mmlm.messages import Message, assistant, user
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.processing import MMLMProcessor


class Chat:
    """One conversation with one model.

    Args:
        model: The model.
        processor: Its processor.
        settings: How answers are generated, unless a question says otherwise.
        messages: What was said before.
    """

    def __init__(
        self,
        model: MMLMForConditionalGeneration,
        processor: MMLMProcessor,
        settings: GenerationSettings | None = None,
        messages: Sequence[Message] = (),
    ) -> None:
        self._model = model
        self._processor = processor
        self.settings = settings or GenerationSettings()
        self.messages: list[Message] = list(messages)

    @overload
    def ask(
        self, text: str, images: Sequence[Any] = (), *, stream: Literal[False] = False
    ) -> str: ...
    @overload
    def ask(
        self, text: str, images: Sequence[Any] = (), *, stream: Literal[True]
    ) -> Iterator[str]: ...
    def ask(
        self, text: str, images: Sequence[Any] = (), *, stream: bool = False
    ) -> str | Iterator[str]:
        """Ask, and remember question and answer.

        Args:
            text: The question.
            images: Images shown with it.
            stream: Give the answer in pieces; what was heard before closing is remembered.
        """
        turn = user(text, images)
        if stream:
            return self._stream(turn)
        request = Request(messages=(*self.messages, turn))
        (answer,) = answer_batch(self._model, self._processor, [request], self.settings)
        self.messages += [turn, assistant(answer.text)]
        return answer.text

    def _stream(self, turn: Message) -> Iterator[str]:
        heard: list[str] = []
        try:
            for piece in stream(
                self._model, self._processor, [*self.messages, turn], self.settings
            ):
                heard.append(piece)
                yield piece
        finally:
            self.messages += [turn, assistant("".join(heard).strip())]

    def undo(self) -> None:
        """Forget the last question and its answer."""
        del self.messages[-2:]
