"""Sources that are read forward: shards in a shuffled order, several at once, row after row.

    shards ──► walk over open shards ──► window, shuffled ──► Sample
               (a cursor says where)     (undecoded rows)

A stream has no row numbers of its own. The walk makes an endless sequence of its shards, a pure
function of seed and list; row `n` of the source is place `n` of that sequence after each window
of rows was shuffled. A cursor at the beginning of every window that is still needed is the whole
state, so a run goes on exactly, given the same shards. Pictures stay as they are in the shard.

What a shard is, is said by `Shards`: tar files in `streams_tar`, whatever `datasets` can stream in
`streams_hub`. A shard that is missing or cut short becomes one bad row under that name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mmlm.data.base import Source
from mmlm.data.order import key_of, permute
from mmlm.data.schema import BadRowError, Sample
from mmlm.data.sources_rows import RowReader, RowsConfig
from mmlm.errors import DataError

Cursor = dict[str, Any]
"""Where a walk stands: plain JSON."""


class OpenShard(ABC):
    """One shard that is being read."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Go through the rows; what cannot be one is a `BadRowError` in its place."""

    @abstractmethod
    def state(self) -> Any:
        """Return plain JSON from which the shard goes on after the last row it gave."""


class Shards(ABC):
    """A fixed list of shards."""

    names: list[str]

    @abstractmethod
    def open(self, number: int) -> OpenShard:
        """Open a shard at its beginning; nothing is read yet."""

    @abstractmethod
    def go_on(self, number: int, state: Any) -> OpenShard:
        """Open a shard where a state of `OpenShard` says."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that changes when the list or the size of a shard changes."""

    @abstractmethod
    def count(self) -> int | None:
        """Return the number of rows, or None if only reading everything could tell."""

    def part(self, numbers: list[int]) -> Shards:
        """Return some of the shards, as a list of their own."""
        return ShardsPart(self, numbers)


class ShardsPart(Shards):
    """Some shards of a list.

    Args:
        whole: The list.
        numbers: Which of it.
    """

    def __init__(self, whole: Shards, numbers: list[int]) -> None:
        self._whole, self._numbers = whole, numbers
        self.names = [whole.names[number] for number in numbers]

    def open(self, number: int) -> OpenShard:
        """Open a shard."""
        return self._whole.open(self._numbers[number])

    def go_on(self, number: int, state: Any) -> OpenShard:
        """Open a shard where a state says."""
        return self._whole.go_on(self._numbers[number], state)

    def fingerprint(self) -> str:
        """Return what the whole is, and which part this is."""
        return f"{self._whole.fingerprint()}-{key_of(*self._numbers):016x}"

    def count(self) -> int | None:
        """Only reading them would tell."""
        return None


class Walk:
    """All rows of all shards, epoch after epoch, `at_once` shards in turn.

    Args:
        shards: What is read.
        key: The order of the shards; None keeps the order of the list, one after another.
        at_once: How many shards are open.
        cursor: Where to go on; None begins at the beginning.
    """

    def __init__(
        self, shards: Shards, *, key: int | None, at_once: int, cursor: Cursor | None = None
    ) -> None:
        self._shards, self._key = shards, key
        self._at_once = 1 if key is None else at_once
        cursor = cursor or {"epoch": 0, "next": 0, "turn": 0, "rows": 0, "open": []}
        self._epoch, self._next = cursor["epoch"], cursor["next"]
        self._turn, self._rows = cursor["turn"], cursor["rows"]
        opened = [(number, shards.go_on(number, state)) for number, state in cursor["open"]]
        self._open = [(number, shard, iter(shard)) for number, shard in opened]

    def take(self) -> tuple[int, Any]:
        """Return the next row, and the number of its shard.

        Raises:
            DataError: if no shard holds a row.
        """
        while True:
            self._fill()
            self._turn %= len(self._open)
            number, _, rows = self._open[self._turn]
            try:
                row = next(rows)
            except StopIteration:
                # The next one steps into the place, so that the turn stays where it is.
                del self._open[self._turn]
                self._open_next(self._turn)
                continue
            self._turn, self._rows = self._turn + 1, self._rows + 1
            return number, row

    def _fill(self) -> None:
        while len(self._open) < self._at_once and self._open_next(len(self._open)):
            pass
        if not self._open:
            if self._rows == 0:
                raise DataError(
                    f"None of the {len(self._shards.names)} shards holds a row, such as "
                    f"{self._shards.names[0]}."
                )
            self._epoch, self._next, self._turn, self._rows = self._epoch + 1, 0, 0, 0
            self._fill()

    def _open_next(self, place: int) -> bool:
        num = len(self._shards.names)
        if self._next >= num:
            return False
        number = self._next
        if self._key is not None:
            key = key_of("shards", self._key, self._epoch)
            number = int(permute(np.array([number]), num, key)[0])
        shard = self._shards.open(number)
        self._open.insert(place, (number, shard, iter(shard)))
        self._next += 1
        return True

    def cursor(self) -> Cursor:
        """Return where the walk stands."""
        return {
            "epoch": self._epoch,
            "next": self._next,
            "turn": self._turn,
            "rows": self._rows,
            "open": [[number, shard.state()] for number, shard, _ in self._open],
        }


class StreamSource(Source):
    """Rows of shards, read forward; see the module's docstring.

    Args:
        name: The name for logs and counts.
        shards: What is read.
        reader: Turns values into a sample.
        folder: Where image paths in the rows begin.
        num_rows: The rows of an epoch, for shares and schedules.
        window: How many rows are shuffled among themselves.
        at_once: How many shards are read in turn.
        counted: Whether `num_rows` was counted in the shards, and not said by the recipe.
        split: Whether each rank reads shards of its own.
    """

    def __init__(
        self,
        name: str,
        shards: Shards,
        reader: RowReader,
        *,
        folder: Path,
        num_rows: int,
        window: int,
        at_once: int,
        counted: bool = False,
        split: bool = True,
    ) -> None:
        self.name = name
        self._counted, self.split = counted, split
        self._shards, self._reader, self._folder = shards, reader, folder
        self._num_rows, self._window, self._at_once = num_rows, window, at_once
        self._windows_an_epoch = -(-num_rows // window)
        self.start(None)

    def start(self, key: int | None) -> None:
        """Go to the beginning; `key` gives the order, None that of the shards as they are."""
        self._key = key
        self._cursors: dict[int, Cursor | None] = {0: None}
        self._walk: Walk | None = None
        self._block = -1
        self._held: list[tuple[int, Any]] = []
        self._order: list[int] = []
        self._next = 0

    def __len__(self) -> int:
        return self._num_rows

    def part(self, number: int, of: int) -> StreamSource:
        """Return the stream of every `of`-th shard, beginning with `number`.

        Raises:
            DataError: if there are fewer shards than parts.
        """
        if len(self._shards.names) < of:
            raise DataError(
                f"{self.name} has {len(self._shards.names)} shards, too few for {of} readers that "
                f"have shards of their own. Write the data into more shards, or let every rank "
                f"read all of them: split_ranks: false."
            )
        numbers = list(range(number, len(self._shards.names), of))
        shards = self._shards.part(numbers)
        num_rows = shards.count() if self._counted else None
        if num_rows is None:
            num_rows = max(1, self._num_rows * len(numbers) // len(self._shards.names))
        return StreamSource(
            self.name, shards, self._reader, folder=self._folder, num_rows=num_rows,
            window=self._window, at_once=self._at_once, counted=self._counted, split=self.split,
        )  # fmt: skip

    def sample(self, row: int) -> Sample:
        """Read on to a row and shape it; going back costs reading its window again."""
        block, place = self._block_of(row)
        self._next = row + 1
        if block != self._block:
            self._read(block)
        shard, values = self._held[self._order[place]]
        where = self._shards.names[shard]
        try:
            if isinstance(values, BadRowError):
                raise values
            return self._reader.read(values, number=row, source=self.name, folder=self._folder)
        except BadRowError as error:
            raise BadRowError(error.cause, f"{error.detail} (in {where})") from None

    def _block_of(self, row: int) -> tuple[int, int]:
        """Return in which window a row stands, and where; no window reaches over an epoch."""
        epoch, within = divmod(row, self._num_rows)
        number, place = divmod(within, self._window)
        return epoch * self._windows_an_epoch + number, place

    def _size_of(self, block: int) -> int:
        number = block % self._windows_an_epoch
        return min(self._window, self._num_rows - number * self._window)

    def _read(self, block: int) -> None:
        """Read windows until `block` is held."""
        start = max(known for known in self._cursors if known <= block)
        if self._walk is None or start != self._block + 1:
            self._walk = Walk(
                self._shards, key=self._key, at_once=self._at_once, cursor=self._cursors[start]
            )
        for number in range(start, block + 1):
            self._held = [self._walk.take() for _ in range(self._size_of(number))]
            self._cursors[number + 1] = self._walk.cursor()
        self._block = block
        indices = np.arange(len(self._held))
        if self._key is not None:
            indices = permute(indices, len(indices), key_of("window", self._key, block))
        self._order = indices.tolist()

    def state(self, oldest: int | None) -> dict[str, Any]:
        """Return what a checkpoint must hold, and forget what no later one can need.

        Args:
            oldest: The first row that must be read again; None if it is the next one.
        """
        row = self._next if oldest is None else oldest
        block, _ = self._block_of(row)
        for known in [known for known in self._cursors if 0 < known < block]:
            del self._cursors[known]
        if block not in self._cursors:
            self._read(block - 1)
        return {"block": block, "next": self._next, "cursor": self._cursors[block]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a state."""
        self.start(self._key)
        self._cursors[state["block"]] = state["cursor"]
        self._next = state["next"]

    def fingerprint(self) -> str:
        """Return what the shards are, and how they are read."""
        settings = f"{self._num_rows}-{self._window}-{self._at_once}"
        return f"{self._shards.fingerprint()}-{settings}"


class StreamConfig(RowsConfig):
    """What all streams have in common."""

    rows: int | None = Field(default=None, ge=1)
    """The rows of one epoch, where the shards do not say."""

    window: int = Field(default=512, ge=1)
    """How many rows are held, undecoded, and shuffled among themselves."""

    shards_at_once: int = Field(default=8, ge=1)
    """How many shards are read in turn, so that neighbours come from different ones."""

    split_ranks: bool = True
    """Whether each rank of a run on several reads shards of its own, and packs them by itself. The
    order then hangs on the number of ranks. Otherwise every rank reads all shards."""

    def stream(self, name: str, shards: Shards, folder: Path) -> Source:
        """Make the source of opened shards.

        Raises:
            DataError: if the number of rows is known to nobody.
        """
        num_rows = self.rows if self.rows is not None else shards.count()
        if num_rows is None:
            raise DataError(
                f"Only reading all {len(shards.names)} shards of {name} would tell how many rows "
                f"they hold. Say it: rows: 1_000_000 (about is enough; an epoch is so many rows)."
            )
        return StreamSource(
            name,
            shards,
            self.reader(),
            folder=folder,
            num_rows=num_rows,
            window=self.window,
            at_once=self.shards_at_once,
            counted=self.rows is None,
            split=self.split_ranks,
        )
