"""A conversation that remembers what was said and shown, and keeps its cache between turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

from mmlm.generation.batch import answer_batch
from mmlm.generation.session import Sessions
from mmlm.generation.settings import GenerationSettings, Request
from mmlm.messages import Message, assistant, user
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.processing import MMLMProcessor
from mmlm.whole import WholeProcessor


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
        self._sessions = Sessions(model, processor)
        self.settings = settings or GenerationSettings()
        self.messages: list[Message] = list(messages)

    @property
    def _whole(self) -> bool:
        """Whether the model is a stock class taken whole: it answers at once."""
        return isinstance(self._sessions.processor, WholeProcessor)

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
        said = self._answer([*self.messages, turn])
        self.messages += [turn, assistant(said)]
        return said

    def _answer(self, messages: Sequence[Message]) -> str:
        if self.settings.num_beams == 1 and not self._whole:
            return self._sessions.answer(messages, self.settings)[0]
        # A beam search keeps several answers at once, and none of their caches; a stock class
        # taken whole has positions of its own, so its cache is begun anew.
        request = Request(messages=tuple(messages))
        model, processor = self._sessions.model, self._sessions.processor
        return answer_batch(model, processor, [request], self.settings)[0].text

    def _stream(self, turn: Message) -> Iterator[str]:
        heard: list[str] = []
        if self._whole:
            heard.append(self._answer([*self.messages, turn]))
            self.messages += [turn, assistant(heard[0])]
            yield heard[0]
            return
        try:
            for piece in self._sessions.stream([*self.messages, turn], self.settings):
                heard.append(piece.text)
                yield piece.text
        finally:
            self.messages += [turn, assistant("".join(heard).strip())]

    def undo(self) -> None:
        """Forget the last question and its answer."""
        del self.messages[-2:]
