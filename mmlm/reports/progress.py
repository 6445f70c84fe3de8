"""A progress line with the time left: live in a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 20.0


class ProgressLine:
    """Shows how far something is, and how long it will still take.

    Args:
        title: What is being done.
        total: Number of items.
        quiet: Show nothing.
        file: Where to; the standard error stream by default.
    """

    def __init__(
        self, title: str, total: int, *, quiet: bool = False, file: TextIO | None = None
    ) -> None:
        self._title, self._total, self._quiet = title, total, quiet
        self._file = file or sys.stderr
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if not quiet and self._file.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("time left"),
                TimeRemainingColumn(),
                console=Console(file=self._file),
            )
            self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Say that `count` more items are done, and what is being done now."""
        self._done += count
        if self._bar is not None:
            title = f"{self._title}  {note}" if note else self._title
            self._bar.update(self._task, advance=count, description=title)
            return
        now = time.monotonic()
        finished = self._done >= self._total
        if not self._quiet and (finished or now - self._last >= _SECONDS_BETWEEN_LINES):
            self._last = now
            left = (now - self._start) / self._done * (self._total - self._done)
            line = f"{self._title}: {self._done:,} of {self._total:,}"
            self._file.write(line + ("\n" if finished else f", {duration(left)} left\n"))
            self._file.flush()


def duration(seconds: float) -> str:
    """Put a length of time as people say it.

    >>> [duration(seconds) for seconds in (4.2, 75, 3600, 9000)]
    ['4 s', '1 min 15 s', '1 h 0 min', '2 h 30 min']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
