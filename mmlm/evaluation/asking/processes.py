"""Several processes answer one benchmark: each its share, the first gathers.

    accelerate launch -m mmlm eval …  ──► answers.jsonl  answers.rank1.jsonl  …
                                          ──► the first process puts all into answers.jsonl

Every process appends to a log of its own, so that a kill loses nothing, whichever it hits; the
next run, with as many processes or fewer, finds all of them. Nothing here knows a question.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmlm.evaluation.asking.answers import AnswerLog, read_answers

EachT = TypeVar("EachT")
LOG = "answers.jsonl"


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is.

    Args:
        rank: Its number, from 0.
        count: How many there are.
        state: What they wait for one another with, where there are several.
    """

    rank: int = 0
    count: int = 1
    state: Any = None

    @classmethod
    def here(cls) -> Processes:
        """Find out from what the launcher says; a plain process is alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        import torch
        from accelerate import PartialState

        state: Any = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state)

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batches: Sequence[EachT]) -> list[EachT]:
        """Return what this process answers, dealt like cards."""
        return list(batches[self.rank :: self.count])

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    @contextmanager
    def answers(self, folder: Path, *, fresh: bool) -> Generator[AnswerLog]:
        """Open this process's log; it knows the answers of all logs in the folder."""
        main = folder / LOG
        if self.is_first:
            if fresh:
                for path in (main, *_others(folder)):
                    path.unlink(missing_ok=True)
            self._gather(folder)
        self.wait()
        own = main if self.is_first else folder / f"answers.rank{self.rank}.jsonl"
        with AnswerLog(own) as log:
            if not self.is_first:
                log.learn(read_answers(main))
            yield log

    def gather(self, folder: Path, log: AnswerLog) -> None:
        """Bring the answers of all processes together; the first writes them into its log."""
        if self.count < 2:
            return
        self.wait()
        if self.is_first:
            for path in _others(folder):
                log.append(row for row in read_answers(path).values() if row["key"] not in log)
        self.wait()
        if not self.is_first:
            log.learn(read_answers(folder / LOG))
            log.path.unlink(missing_ok=True)

    def _gather(self, folder: Path) -> None:
        """Take over the logs that processes of a killed run left."""
        left = _others(folder)
        if not left:
            return
        with AnswerLog(folder / LOG) as log:
            for path in left:
                log.append(row for row in read_answers(path).values() if row["key"] not in log)
                path.unlink()


def _others(folder: Path) -> list[Path]:
    return sorted(folder.glob("answers.rank*.jsonl"))
