"""What a person sees while a model learns: one live line in a terminal, plain lines in a file.

Numbers go to `log.jsonl` whatever is shown, and by a word to TensorBoard, W&B or trackio.
A line of the log holds no clock time, only durations, and is cut back on resume, so the log of
a resumed run reads like that of an unbroken one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from mmlm.errors import MissingExtraError

_SECONDS_BETWEEN_LINES = 15.0
_BAR_WIDTH = 24


class JsonLog:
    """A file with one JSON object a line that can be cut back to an earlier length.

    Args:
        path: The file; None keeps nothing, for all ranks but the first.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path or Path(os.devnull)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")

    @property
    def length(self) -> int:
        """The length in bytes; a checkpoint holds it."""
        return self._file.tell()

    def cut(self, length: int) -> None:
        """Forget what was written after a checkpoint."""
        if self.path == Path(os.devnull):
            return
        self._file.truncate(length)
        self._file.seek(length)

    def write(self, values: dict[str, Any]) -> None:
        """Write one line; it is in the file when this returns."""
        self._file.write((json.dumps(values, ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Progress:
    """Shows how a stage goes.

    Args:
        title: The stage and its number.
        quiet: Show nothing; for all ranks but the first.
        file: Where to.
    """

    def __init__(self, title: str, *, quiet: bool = False, file: TextIO | None = None) -> None:
        self.title, self._quiet = title, quiet
        self._file = file or sys.stderr
        self._console = Console(file=self._file)
        self._start = time.monotonic()
        self._start_share = 0.0
        self._last_line = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=21)
        self._live: Live | None = None
        if not quiet and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.start()

    def begin_at(self, share: float) -> None:
        """Say how much was done before this process, so that the time left is right."""
        self._start_share = share
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(
        self,
        *,
        step: int,
        share: float,
        loss: float,
        tokens: int,
        padding: float,
        mfu: float | None = None,
        memory_gib: float | None = None,
        dropped: int = 0,
    ) -> None:
        """Show one step."""
        now = time.monotonic()
        self._recent.append((now, tokens))
        if self._quiet:
            return
        speed = self._speed()
        line = (
            f"{self.title}  step {step:,}  loss {loss:.4f}  {speed:,.0f} tokens/s  "
            f"padding {100 * padding:.1f} %"
        )
        line += "" if mfu is None else f"  MFU {100 * mfu:.0f} %"
        line += "" if memory_gib is None else f"  {memory_gib:.1f} GiB"
        line += f"  {dropped:,} dropped" if dropped else ""
        left = self._left(share)
        if self._live is not None:
            grid = Table.grid(padding=(0, 1))
            done = round(_BAR_WIDTH * min(share, 1.0))
            bar = f"[green]{'━' * done}[/][dim]{'━' * (_BAR_WIDTH - done)}[/]"
            grid.add_row(line, bar, f"{100 * share:3.0f} %", f"{left} left")
            self._live.update(grid)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or share >= 1.0 or step == 1:
            self._last_line = now
            self._file.write(f"{line}  {100 * share:.0f} %  {left} left\n")
            self._file.flush()

    def _speed(self) -> float:
        """Useful tokens per second over the last steps."""
        if len(self._recent) < 2:
            return 0.0
        span = self._recent[-1][0] - self._recent[0][0]
        return sum(tokens for _, tokens in list(self._recent)[1:]) / max(span, 1e-9)

    def left(self, share: float) -> float | None:
        """Return the seconds that the rest of the stage takes, if it goes on like this."""
        done = share - self._start_share
        if done <= 0:
            return None
        return (time.monotonic() - self._start) / done * max(1.0 - share, 0.0)

    def _left(self, share: float) -> str:
        seconds = self.left(share)
        return "?" if seconds is None else duration(seconds)

    def close(self) -> None:
        """End the live line; it stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def duration(seconds: float) -> str:
    """Put a length of time as people say it.

    >>> [duration(seconds) for seconds in (4.2, 75, 9000)]
    ['4 s', '1 min 15 s', '2 h 30 min']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a line of the log, those inside others with both names.

    >>> flat({"loss": 1.0, "loss_by_source": {"a": 2.0}, "mfu": None}, "align/")
    {'align/loss': 1.0, 'align/loss_by_source/a': 2.0}
    """
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            inner: dict[str, Any] = value
            found |= flat(inner, f"{prefix}{key}/")
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found


class Tracker(Protocol):
    """Where numbers go beside the log."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of one step."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            tensorboard = import_module("torch.utils.tensorboard")
        except ImportError:
            raise MissingExtraError("tensorboard", needed_for="run.log_to", extra="train") from None
        self._writer = tensorboard.SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandbLike:
    """W&B, and trackio, which has the same words.

    Each says by its own settings where it sends the numbers, such as ``WANDB_MODE=offline``. What
    W&B writes stands in the folder of the run, and not where the command was given.
    """

    def __init__(self, package: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            self._module: Any = import_module(package)
        except ImportError:
            raise MissingExtraError(package, needed_for="run.log_to", extra="trackers") from None
        place = {"dir": str(folder)} if package == "wandb" else {}
        self._module.init(project="mmlm", name=folder.name, config=config, **place)

    def log(self, values: dict[str, float], step: int) -> None:
        # A count of steps that begins anew with each stage is none of theirs; it stands in values.
        self._module.log(values)

    def close(self) -> None:
        self._module.finish()


def open_trackers(names: Sequence[str], folder: Path, config: dict[str, Any]) -> list[Tracker]:
    """Open the trackers that `run.log_to` names.

    Raises:
        MissingExtraError: if the package of one is not installed.
    """
    return [
        _TensorBoard(folder) if name == "tensorboard" else _WandbLike(name, folder, config)
        for name in names
    ]
