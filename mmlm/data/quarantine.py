"""Every sample that was left out, counted by cause and written down.

One line of `quarantine.jsonl` for each drop. A budget stops the run: a data set of which a
fifth cannot be read is not the data set that the recipe names. The counts travel with the
checkpoints, so a resumed run counts nothing twice. No sample is ever replaced by another.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmlm.data.schema import CAUSES, Drop
from mmlm.errors import DataError


class Quarantine:
    """Counts drops and stops the run when there are too many.

    Args:
        path: Where the drops are written; None writes nothing.
        budget: Largest share of the samples that may be dropped.
        floor: So many drops are always allowed, for small data sets.
    """

    def __init__(self, path: Path | None, *, budget: float = 0.05, floor: int = 10) -> None:
        self.path = path
        self.budget = budget
        self.floor = floor
        self.counts: Counter[tuple[str, str]] = Counter()
        self.seen = 0
        self._bytes = path.stat().st_size if path is not None and path.exists() else 0

    @property
    def dropped(self) -> int:
        """The number of samples left out so far."""
        return self.counts.total()

    def record(self, drops: Iterable[Drop], *, seen: int, expected: int | None = None) -> None:
        """Write drops down and check the budget.

        Args:
            drops: What was left out since the last call.
            seen: How many samples were looked at since the last call, good ones included.
            expected: How many samples the whole stage looks at, if that is known.

        Raises:
            DataError: if the budget is spent; the message has the causes.
        """
        drops = list(drops)
        self.seen += seen
        for drop in drops:
            self.counts[drop.source, drop.cause] += 1
        if drops and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                for drop in drops:
                    line = json.dumps(drop._asdict(), ensure_ascii=False) + "\n"
                    self._bytes += file.write(line.encode("utf-8", "surrogatepass"))
        allowed = max(self.floor, int(self.budget * max(expected or 0, self.seen)))
        if self.dropped > allowed:
            where = f" All of them are in {self.path}." if self.path is not None else ""
            raise DataError(
                f"{self.dropped:,} of {self.seen:,} samples could not be used, more than "
                f"`run.drop_budget` allows ({self.budget:.1%}, at least {self.floor}).\n"
                f"{self.table()}\nMend the data, or raise `run.drop_budget`.{where}"
            )

    def table(self) -> str:
        """Return the counts by source and cause, one a line."""
        rows = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return "\n".join(
            f"  {count:>8,}  {source}: {cause} ({CAUSES[cause]})" for (source, cause), count in rows
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        counts = [[source, cause, n] for (source, cause), n in sorted(self.counts.items())]
        return {"seen": self.seen, "counts": counts, "bytes": self._bytes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint: what was written after it is cut off."""
        self.seen = state["seen"]
        self.counts = Counter({(s, c): n for s, c, n in state["counts"]})
        self._bytes = state["bytes"]
        if self.path is not None and self.path.exists():
            with self.path.open("r+b") as file:
                file.truncate(self._bytes)
