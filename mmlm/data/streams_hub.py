"""Streams of whatever the package `datasets` can read without downloading it first.

    {use: hub, repo: HuggingFaceM4/the_cauldron, subset: ai2d}     a data set of the Hub
    {use: hub, repo: my/folder}                                    a folder with shards
    {use: hub, repo: parquet, files: "s3://bucket/*.parquet"}      files at an address

Each file is one shard and keeps its own place (`IterableDataset.state_dict`), so that going on is
exact. Pictures stay bytes. Without a `revision` the newest one is looked up once and its hash
becomes part of the run's data. Order and windows are those of `streams`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field

from mmlm.data.base import Source, sources
from mmlm.data.schema import BadRowError
from mmlm.data.sources_arrow import open_parquet
from mmlm.data.streams import OpenShard, Shards, StreamConfig
from mmlm.errors import DataError, MissingExtraError


class HubShard(OpenShard):
    """The rows of one shard.

    Args:
        dataset: An `IterableDataset` of this shard alone.
        done: Whether it was read to its end.
    """

    def __init__(self, dataset: Any, *, done: bool = False) -> None:
        self._dataset, self._done = dataset, done

    def state(self) -> Any:
        """Return the state of the data set, or None at the end."""
        return None if self._done else self._dataset.state_dict()

    def __iter__(self) -> Iterator[Any]:
        """Go through the rows; whatever the reader raises ends the shard under its own name."""
        if self._done:
            return
        begun = False
        try:
            for row in self._dataset:
                begun = True
                yield row
        except Exception as error:  # readers of formats and networks raise anything at all
            self._done = True
            text = f"{type(error).__name__}: {error}"
            yield BadRowError("cut_shard" if begun else "no_shard", text)
        self._done = True


class HubShards(Shards):
    """The shards of one split.

    Args:
        dataset: An `IterableDataset`.
        names: The name of each shard.
        num_rows: Its rows, if that is known.
        facts: What the split is, for the fingerprint.
    """

    def __init__(self, dataset: Any, names: list[str], num_rows: int | None, facts: str) -> None:
        self._dataset, self.names = dataset, names
        self._num_rows, self._facts = num_rows, facts

    def _shard(self, number: int) -> Any:
        return self._dataset.shard(num_shards=len(self.names), index=number)

    def open(self, number: int) -> OpenShard:
        """Open a shard."""
        return HubShard(self._shard(number))

    def go_on(self, number: int, state: Any) -> OpenShard:
        """Open a shard where a state says."""
        dataset = self._shard(number)
        if state is not None:
            dataset.load_state_dict(state)
        return HubShard(dataset, done=state is None)

    def fingerprint(self) -> str:
        """Return a hash of repository, revision and shards."""
        return hashlib.sha256(self._facts.encode()).hexdigest()[:16]

    def count(self) -> int | None:
        """Return the rows that the data set says it has."""
        return self._num_rows


@sources.register("hub")
class HubConfig(StreamConfig):
    """A stream of a Hub data set, or of anything else that `datasets` streams."""

    repo: str = Field(min_length=1)
    """A Hub id, a folder of this machine, or a format such as parquet, with `files`."""

    subset: str | None = None
    """The configuration of the data set, where it has several."""

    split: str = "train"
    """Which split."""

    revision: str | None = None
    """A commit, tag or branch of the Hub; without one, the newest commit when the run begins."""

    files: str | list[str] | None = None
    """Patterns of files in the data set, or addresses; by default those it says itself."""

    def open(self, folder: Path) -> Source:
        """Ask for the list of shards; no row is read."""
        try:
            from datasets import load_dataset_builder
        except ImportError:
            raise MissingExtraError(
                "datasets", needed_for="A stream of the Hub", extra="train"
            ) from None
        repo, revision = self._repo(folder), self.revision
        is_here = Path(repo).is_dir() or self.files is not None
        try:
            if not is_here:
                from huggingface_hub import HfApi

                revision = HfApi().dataset_info(repo, revision=revision).sha
            builder: Any = load_dataset_builder(
                repo, self.subset, revision=revision, data_files=self.files
            )
            dataset: Any = builder.as_streaming_dataset(split=self.split).decode(False)
        except Exception as error:  # the Hub, the network and readers raise anything at all
            raise DataError(
                f"The data set {self.repo} ({self.subset or 'no subset'}, split {self.split}) "
                f"cannot be streamed: {type(error).__name__}: {error}"
            ) from None
        names = _names(builder, self.split, dataset.num_shards, repo)
        parts = [f"{PurePosixPath(n).name} {_size(n)}" for n in names]
        place = PurePosixPath(repo).name if is_here else repo
        facts = "\n".join([place, self.subset or "", self.split, revision or "", *parts])
        shards = HubShards(dataset, names, _num_rows(builder, self.split, names), facts)
        return self.stream(self.name or self._title(), shards, folder)

    def _repo(self, folder: Path) -> str:
        """Return a folder beside the recipe as such, and anything else as it stands."""
        beside = folder / Path(self.repo).expanduser()
        return str(beside.absolute()) if beside.is_dir() else self.repo

    def _title(self) -> str:
        last = PurePosixPath(self.repo).name
        return last if self.subset is None else f"{last}/{self.subset}"


def _names(builder: Any, split: str, num_shards: int, repo: str) -> list[str]:
    """Name the shards by their files, where each file is a shard."""
    files = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
    if len(files) == num_shards:
        return files
    return [f"{repo} {split} shard {index} of {num_shards}" for index in range(num_shards)]


def _size(name: str) -> str:
    return str(os.path.getsize(name)) if os.path.isfile(name) else "-"


def _num_rows(builder: Any, split: str, names: list[str]) -> int | None:
    """Return the rows of a split by its card, or by the footers of files on this machine."""
    splits = builder.info.splits
    if splits is not None and split in splits and splits[split].num_examples:
        return int(splits[split].num_examples)
    if not all(name.endswith(".parquet") and os.path.isfile(name) for name in names):
        return None
    rows = 0
    for name in names:
        try:
            rows += open_parquet(name).metadata.num_rows
        except DataError:
            rows += 1  # It becomes one bad row.
    return rows
