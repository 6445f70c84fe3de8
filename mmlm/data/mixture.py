"""Several sources, mixed by weight into one endless, exactly known order of rows.

A mixture says for every position which row of which source stands there; epoch after epoch,
in constant memory. The words under `data:` in a recipe become a mixture here:

    data: align                              a data recipe (see `mmlm recipes`)
    data: photos.jsonl                       a file
    data: {use: csv, path: a.csv}            a source, written out
    data: {mix: [{use: …, weight: 2}, …]}    several
    data: {mix: […], temperature: 2}         several, the small ones more often: size^(1/2)

A stream among the sources is read forward: its row at a position is the number of times that
it was drawn before. This module plans nothing and packs nothing; see `mmlm.data.pipeline`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmlm.config import Config, read_yaml
from mmlm.data.base import Source, SourceConfig, SourcePart, sources
from mmlm.data.facts import facts_of
from mmlm.data.order import key_of, permute
from mmlm.data.sources_files import SUFFIXES
from mmlm.data.streams import StreamSource
from mmlm.errors import ConfigError, DataError

_BLOCK = 4096


class Share(Config):
    """How much of one source goes into a mixture."""

    weight: float = Field(default=1.0, gt=0.0)
    """How often each row is seen in one epoch of the mixture; 0.5 takes half of the rows,
    other ones each epoch."""

    cap: int | None = Field(default=None, ge=1)
    """Most rows that one epoch takes from this source."""

    temperature: float = Field(default=1.0, gt=0.0)
    """What the mix says about sizes: each source has a part of the epoch that goes with its rows to
    the power of 1 / temperature. 1 leaves them, 2 takes the root, a thousand makes them equal."""

    among: str = ""
    """Which mix that is; filled in when the mix is read."""

    def rows_an_epoch(self, num_rows: int) -> int:
        """Return how many rows of a source of `num_rows` one epoch takes."""
        rows = max(1, round(self.weight * num_rows)) if num_rows else 0
        return rows if self.cap is None else min(rows, self.cap)


class Place(NamedTuple):
    """Which row stands at a position."""

    source: int
    row: int
    epoch: int


class Mixture:
    """Opened sources with their shares.

    Args:
        opened: Each source with its share.
        seed: Changes the order and nothing else.
        shuffle: False keeps the order as written, source after source.
    """

    def __init__(
        self, opened: Sequence[tuple[Source, Share]], *, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.sources = [source for source, _ in opened]
        self._shares = [share for _, share in opened]
        self._counts = [share.rows_an_epoch(len(source)) for source, share in opened]
        self._ends = list(accumulate(self._counts))
        self._seed, self._shuffle = seed, shuffle
        self._block: tuple[int, int, list[int]] | None = None
        self._drawn: tuple[int, int, NDArray[np.int64]] | None = None
        self._streams = {s.name: s for s in self.sources if isinstance(s, StreamSource)}
        for number, source in enumerate(self.sources):
            if isinstance(source, StreamSource):
                source.start(key_of("stream", seed, number) if shuffle else None)
        if not self._ends or self._ends[-1] == 0:
            names = ", ".join(source.name for source in self.sources) or "none"
            raise DataError(f"There is not one row to learn from. Sources: {names}.")

    @property
    def splits(self) -> bool:
        """Whether ranks read parts of their own: where a stream is to be split among them."""
        return any(stream.split for stream in self._streams.values())

    def part(self, number: int, of: int) -> Mixture:
        """Return the mixture of one of several readers, such as a rank or a worker of one.

        Streams are split by shards, other sources by rows; all parts together are the whole.

        Raises:
            DataError: if a stream has fewer shards than there are readers.
        """
        parts: list[Source] = [
            source.part(number, of) if isinstance(source, StreamSource)
            else SourcePart(source, number, of)
            for source in self.sources
        ]  # fmt: skip
        opened = list(zip(parts, self._shares, strict=True))
        return Mixture(opened, seed=self._seed, shuffle=self._shuffle)

    @property
    def epoch_rows(self) -> int:
        """The number of rows of one epoch."""
        return self._ends[-1]

    @property
    def counts(self) -> dict[str, int]:
        """How many rows of each source one epoch takes."""
        return {
            source.name: count for source, count in zip(self.sources, self._counts, strict=True)
        }

    def place(self, position: int) -> Place:
        """Return which row stands at a position; positions go on through the epochs."""
        epoch, offset = divmod(position, self.epoch_rows)
        index = self._shuffled(epoch, offset) if self._shuffle else offset
        number = bisect_right(self._ends, index)
        within = index - (self._ends[number] - self._counts[number])
        if isinstance(self.sources[number], StreamSource):
            before = self._times_drawn(epoch, offset, number) if self._shuffle else within
            return Place(number, epoch * self._counts[number] + before, epoch)
        size = len(self.sources[number])
        rounds, rest = divmod(within, size)
        if rounds == self._counts[number] // size:
            # The last, partial round takes a random part of the rows, another one each epoch.
            key = key_of("part", self._seed, epoch, number)
            rest = int(permute(np.array([rest]), size, key)[0]) if self._shuffle else rest
        return Place(number, rest, epoch)

    def _shuffled(self, epoch: int, index: int) -> int:
        block, offset = divmod(index, _BLOCK)
        if self._block is None or self._block[:2] != (epoch, block):
            start = block * _BLOCK
            indices = np.arange(start, min(start + _BLOCK, self.epoch_rows))
            key = key_of("order", self._seed, epoch)
            self._block = (epoch, block, permute(indices, self.epoch_rows, key).tolist())
        return self._block[2][offset]

    def _times_drawn(self, epoch: int, offset: int, number: int) -> int:
        """Count how often a source stands before an offset of an epoch."""
        if len(self.sources) == 1:
            return offset
        block, within = divmod(offset, _BLOCK)
        if self._drawn is None or self._drawn[0] != epoch or self._drawn[1] > block:
            self._drawn = (epoch, 0, np.zeros(len(self.sources), dtype=np.int64))
        _, done, counts = self._drawn
        for earlier in range(done, block):
            counts = counts + self._draws(epoch, earlier * _BLOCK, (earlier + 1) * _BLOCK)
        self._drawn = (epoch, block, counts)
        return int((counts + self._draws(epoch, block * _BLOCK, block * _BLOCK + within))[number])

    def _draws(self, epoch: int, start: int, end: int) -> NDArray[np.int64]:
        """Count the sources that stand from `start` to `end`, inside one block."""
        if end == start:
            return np.zeros(len(self.sources), dtype=np.int64)
        self._shuffled(epoch, start)
        assert self._block is not None
        numbers = np.searchsorted(self._ends, self._block[2][: end - start], side="right")
        return np.bincount(numbers, minlength=len(self.sources))

    def spread(self, num: int) -> list[int]:
        """Return `num` positions to look at: evenly over an epoch, or the first ones of a stream.

        >>> class Numbers(Source):
        ...     name = "numbers"
        ...     __len__ = lambda self: 100
        ...     sample = fingerprint = None
        >>> Mixture([(Numbers(), Share())]).spread(4)
        [0, 25, 50, 75]
        """
        return [0 if self._streams else index * self.epoch_rows // num for index in range(num)]

    def stream_states(self, waiting: Mapping[str, int]) -> dict[str, Any]:
        """Return where the streams stand.

        Args:
            waiting: For each source the first row that must be read again, if there is one.
        """
        return {name: stream.state(waiting.get(name)) for name, stream in self._streams.items()}

    def restore_streams(self, states: Mapping[str, Any]) -> None:
        """Go back to where the streams stood."""
        for name, state in states.items():
            self._streams[name].restore(state)

    def fingerprint(self) -> str:
        """Return a text that changes when the rows or their order change."""
        parts = [f"{s.name}:{s.fingerprint()}" for s in self.sources]
        return f"{key_of(self._seed, self._shuffle, self._counts, parts):016x}"


def read_mixture(
    words: Any, *, folder: Path, origin: str = "data", find: Any = None
) -> list[tuple[SourceConfig, Share, Path]]:
    """Turn the words under `data:` into configs, without opening anything.

    Args:
        words: A name, a path, a mapping, or a list of these.
        folder: Where relative paths begin.
        origin: The key, for messages.
        find: Turns the name of a data recipe into its path, or raises `ConfigError`.

    Returns:
        Each source with its share and the folder in which its paths begin.
    """
    if isinstance(words, str):
        return _read_name(words, folder=folder, origin=origin, find=find)
    if isinstance(words, list):
        words = {"mix": words}
    if not isinstance(words, dict) or not words:
        raise ConfigError(
            f"{origin} must be the name of a data recipe, a file, or a source such as "
            f"{{use: jsonl, path: my.jsonl}} (got {words!r})."
        )
    facts_of(words, origin=origin)
    words = {key: value for key, value in words.items() if key != "about"}
    if "mix" in words:
        extra = sorted(set(words) - {"mix", "temperature"})
        if extra or not isinstance(words["mix"], list):
            raise ConfigError(f"{origin} with `mix` takes a list of sources and no {extra}.")
        found: list[tuple[SourceConfig, Share, Path]] = []
        for index, entry in enumerate(words["mix"]):
            found += read_mixture(entry, folder=folder, origin=f"{origin}.mix[{index}]", find=find)
        if "temperature" not in words:
            return found
        heat = Share.from_dict({"temperature": words["temperature"]}, origin=origin).temperature
        if any(share.among for _, share, _ in found):
            raise ConfigError(
                f"{origin}: a mix with a temperature stands inside another. Say it once, outside."
            )
        return [
            (config, share.model_copy(update={"temperature": heat, "among": origin}), home)
            for config, share, home in found
        ]
    share_words = {key: words[key] for key in ("weight", "cap") if key in words}
    share = Share.from_dict(share_words, origin=origin)
    rest = {key: value for key, value in words.items() if key not in share_words}
    if "recipe" in rest:
        inner = _read_name(rest["recipe"], folder=folder, origin=origin, find=find)
        return [(config, _product(share, part), home) for config, part, home in inner]
    return [(sources.read(rest, origin=origin), share, folder)]


def _product(outer: Share, inner: Share) -> Share:
    caps = [cap for cap in (outer.cap, inner.cap) if cap is not None]
    weight, cap = outer.weight * inner.weight, min(caps) if caps else None
    return inner.model_copy(update={"weight": weight, "cap": cap})


def evened(opened: Sequence[tuple[Source, Share]]) -> list[tuple[Source, Share]]:
    """Turn temperatures into weights; an epoch of each mix keeps its length, caps come after."""
    masses = [share.weight * len(source) for source, share in opened]
    found: list[tuple[Source, Share]] = []
    for source, share in opened:
        if share.temperature == 1.0 or not len(source):
            found.append((source, share))
            continue
        mix = [mass for mass, (_, other) in zip(masses, opened, strict=True)
               if other.among == share.among]  # fmt: skip
        power = 1.0 / share.temperature
        whole = sum(mix) / sum(mass**power for mass in mix if mass)
        rows = whole * (share.weight * len(source)) ** power
        found.append((source, share.model_copy(update={"weight": rows / len(source)})))
    return found


def _read_name(
    name: str, *, folder: Path, origin: str, find: Any
) -> list[tuple[SourceConfig, Share, Path]]:
    """Read a data file named by its path, or a data recipe named by name or path."""
    use = SUFFIXES.get(Path(name).suffix.lower())
    if use is not None:
        return [(sources.read({"use": use, "path": name}, origin=origin), Share(), folder)]
    path = next((p for p in (folder / name, Path(name)) if p.is_file()), None)
    if path is None:
        if find is None:
            raise ConfigError(f"{origin}: there is no data file or recipe {name!r}.")
        path = Path(find(name))
    return read_mixture(read_yaml(path), folder=path.parent, origin=str(path), find=find)


def open_mixture(
    words: Any,
    *,
    folder: Path,
    seed: int = 0,
    shuffle: bool = True,
    origin: str = "data",
    find: Any = None,
) -> Mixture:
    """Open every source that `words` name; see `read_mixture` for the arguments."""
    configs = read_mixture(words, folder=folder, origin=origin, find=find)
    opened = evened([(config.open(home), share) for config, share, home in configs])
    seen: dict[str, int] = {}
    for source, _ in opened:
        seen[source.name] = seen.get(source.name, 0) + 1
        if seen[source.name] > 1:
            source.name = f"{source.name}-{seen[source.name]}"
    return Mixture(opened, seed=seed, shuffle=shuffle)
