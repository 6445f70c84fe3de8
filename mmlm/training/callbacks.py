"""The same few pictures, asked again and again while a model learns: `growth.jsonl`.

Asking changes nothing: answers are greedy, the random numbers are put back, and the parts
that learn learn on as before. Each line holds one round: stage, step, and for every picture the
question, what was expected and what was answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mmlm.assistant import Assistant
from mmlm.data import BadRowError, Mixture
from mmlm.errors import ImageError
from mmlm.generation import Request
from mmlm.images import all_readers, read_size
from mmlm.messages import Message, images_of
from mmlm.training.display import JsonLog
from mmlm.training.recipe import AskConfig

_TRIES = 50


@dataclass(frozen=True)
class Question:
    """One picture that is asked: the turns up to the answer, and the answer expected."""

    id: str
    messages: tuple[Message, ...]
    truth: str

    def plain(self) -> dict[str, Any]:
        """Return what a report shows."""
        images = [str(i) for i in images_of(self.messages) if isinstance(i, str)]
        return {"id": self.id, "image": images[0] if images else None,
                "question": self.messages[-1].text.strip(), "truth": self.truth}  # fmt: skip


def choose_questions(mixture: Mixture, num: int) -> list[Question]:
    """Choose pictures spread evenly over a mixture, broken ones passed over."""
    chosen: list[Question] = []
    for start in mixture.spread(num):
        for position in range(start, min(start + _TRIES, mixture.epoch_rows)):
            question = _question(mixture, position)
            if question is not None and all(question.id != other.id for other in chosen):
                chosen.append(question)
                break
    return chosen


def _question(mixture: Mixture, position: int) -> Question | None:
    place = mixture.place(position)
    try:
        sample = mixture.sources[place.source].sample(place.row)
        turns = list(sample.messages)
        end = next(i for i, message in enumerate(turns) if message.role == "assistant")
        if not images_of(turns[:end]):
            return None
        for image in images_of(turns[:end]):
            read_size(image, readers=all_readers())
    except (BadRowError, ImageError, OSError, StopIteration):
        return None
    return Question(f"{sample.source}/{sample.id}", tuple(turns[:end]), turns[end].text.strip())


class Growth:
    """Asks the questions and writes the answers down.

    Args:
        assistant: What learns.
        questions: What is asked.
        config: How often, and how long answers may be.
        log: `growth.jsonl`.
    """

    def __init__(
        self, assistant: Assistant, questions: list[Question], config: AskConfig, log: JsonLog
    ) -> None:
        self.assistant, self._questions, self._config = assistant, questions, config
        self.log = log

    def is_due(self, step: int, before: float, after: float) -> bool:
        """Whether the questions are asked after this step.

        Args:
            step: Its number.
            before: The share of the stage that was done before it.
            after: And after it.
        """
        rounds = self._config.rounds
        if rounds is None:
            return bool(self._questions) and step % self._config.every_steps == 0
        return bool(self._questions) and int(after * rounds) > int(before * rounds)

    def ask(self, *, stage: str, step: int, samples: int) -> list[str]:
        """Ask all questions, write the answers down and return them."""
        if not self._questions:
            return []
        model = self.assistant.model
        modes = {module: module.training for module in model.modules()}
        state = torch.get_rng_state()
        requests = [Request(messages=question.messages) for question in self._questions]
        with torch.no_grad():
            answers = self.assistant.answer_all(
                requests, max_new_tokens=self._config.max_new_tokens
            )
        torch.set_rng_state(state)
        for module, training in modes.items():
            module.training = training
        rows = [
            {**question.plain(), "answer": answer}
            for question, answer in zip(self._questions, answers, strict=True)
        ]
        self.log.write({"stage": stage, "step": step, "samples": samples, "answers": rows})
        return answers
