"""A language model as the judge: optional, named, kept on disk, and never the default.

Which model judged stands in the label of every score. A judge's mark of an answer is asked once
and kept, so that the same answers get the same score; what it says is read by rule, and an
answer of the judge in which no number can be read counts as unreadable.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from mmlm.errors import ConfigError
from mmlm.evaluation.scorers.base import Mark, Row, ScorerConfig, Target, scorers
from mmlm.storage import cache_folder, write_atomic

PROMPT = (
    "You compare an answer with a reference. Facts that are joined by <AND> must all be there; of "
    "those joined by <OR> one is enough. Say how much of the reference is in the answer, as a "
    "number between 0 and 1 with one decimal, and nothing else.\n\n"
    "Question: {question}\nReference: {reference}\nAnswer: {answer}\nNumber:"
)
_NUMBER = re.compile(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?|\.\d+)(?![\d.]*\d)")


def read_verdict(said: str) -> float | None:
    """The only number between 0 and 1 in what a judge says, or None.

    >>> [read_verdict(text) for text in ("0.7", "Number: 1.0", "I would say 0.5.", "7 of 10", "")]
    [0.7, 1.0, 0.5, None, None]
    >>> read_verdict("between 0.4 and 0.6") is None
    True
    """
    found = {float(number) for number in _NUMBER.findall(said)}
    return found.pop() if len(found) == 1 else None


@scorers.register("judge")
class JudgeConfig(ScorerConfig):
    """A language model says how much of the reference is in the answer (MM-Vet and its kin)."""

    metric = "judge's mark"

    model: str = ""
    """The judge's name at the address; scores of two judges are two different numbers."""

    endpoint: str = ""
    """An OpenAI-compatible address up to ``/v1``."""

    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, if the address asks for one."""

    cache: str = ""
    """Where its marks are kept; the cache folder of MMLM when left out."""

    @property
    def label(self) -> str:
        """The name of the judge belongs to the score."""
        return f"{super().label}/{self.model}"

    def mark(self, answer: str, target: Target) -> Mark:
        """Keep the answer; `settle` asks for all marks together."""
        return Mark(0.0, answer.strip() or None)

    def settle(self, answers: Sequence[str], rows: Sequence[Row]) -> list[Mark]:
        """Ask the judge, or find what it said before.

        Raises:
            EvaluationError: if it cannot be asked.
        """
        from mmlm.evaluation.asking.chat_client import ChatClient

        client = ChatClient(self.endpoint, key=os.environ.get(self.key_variable, ""))

        def one(pair: tuple[str, Row]) -> Mark:
            answer, row = pair
            if not answer.strip():
                return Mark(0.0, None)
            prompt = PROMPT.format(
                question=row.target.facts.get("question", ""),
                reference=" <OR> ".join(row.target.references),
                answer=answer,
            )
            kept = self._kept(prompt)
            if kept.is_file():
                said = str(json.loads(kept.read_text(encoding="utf-8"))["said"])
            else:
                talk = [{"role": "user", "content": prompt}]
                said = client.ask(self.model, talk, {"temperature": 0.0, "max_tokens": 16})
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(kept, json.dumps({"said": said, "prompt": prompt}))
            verdict = read_verdict(said)
            return Mark(0.0 if verdict is None else verdict, None if verdict is None else said)

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, zip(answers, rows, strict=True)))

    def _kept(self, prompt: str) -> Path:
        name = sha256(f"{self.endpoint} {self.model} {prompt}".encode()).hexdigest()[:32]
        folder = Path(self.cache).expanduser() if self.cache else cache_folder("judge")
        return folder / f"{name}.json"

    def ready(self) -> None:
        """Refuse a judge without a name or an address."""
        if not self.model or not self.endpoint:
            raise ConfigError(
                "scorer: a judge needs `model`, which stands in every score, and `endpoint`, the "
                "address at which it is asked."
            )
