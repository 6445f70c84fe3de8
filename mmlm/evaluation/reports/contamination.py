"""Was the benchmark in the training data? Pictures that look alike, and runs of the same words.

    training samples ──┐
                       ├──► contamination ──► a table, contamination.json
    benchmark items  ──┘    you are here

A picture is found by its perceptual hash, so a copy at another size or quality counts (see
`mmlm.data.alike`); a text by a run of `NGRAM_WORDS` words that stands in a training text, or by
the whole question with its answer where that is shorter. Training is read once, forward, in
constant memory; neither a picture nor a text is kept.

A found item is not proof: a short question is asked of many pictures. What counts is the share
of items whose picture *and* text were found, and the examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from mmlm.data import Sample
from mmlm.data.alike import Look, alike, look_of
from mmlm.errors import EvaluationError, ImageError
from mmlm.evaluation.benchmarks.benchmark import Benchmark
from mmlm.evaluation.benchmarks.items import Item
from mmlm.evaluation.scorers.text import words_of
from mmlm.images import open_image
from mmlm.messages import images_of

NGRAM_WORDS = 8
_FEWEST_WORDS = 4
"""A question and answer of fewer words is no evidence, and is not looked for."""

_AT_ONCE = 2048
_EXAMPLES = 20


@dataclass(frozen=True)
class Contamination:
    """What of a benchmark was found in training.

    Args:
        set: The benchmark.
        num_items: Its items.
        num_training_samples: Training samples that were read.
        num_training_pictures: Pictures among them that could be opened.
        by_picture: Share of items whose picture was found.
        by_text: Share of items whose words were found.
        by_both: Share of items of which both were found, in whichever samples.
        num_unreadable: Training pictures that could not be opened.
        examples: Items that were found, each with the training sample.
    """

    set: str
    num_items: int
    num_training_samples: int
    num_training_pictures: int
    by_picture: float
    by_text: float
    by_both: float
    num_unreadable: int
    examples: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass
class _Found:
    """What was found of one benchmark so far: items by place, and the sample that holds each."""

    pictures: dict[int, str] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)


def contamination(
    benchmarks: Sequence[Benchmark], samples: Iterable[Sample]
) -> list[Contamination]:
    """Look for the items of benchmarks in training samples.

    Args:
        benchmarks: What is measured.
        samples: What was learnt from, one after another.

    Raises:
        EvaluationError: if there is not one sample, or a picture of a benchmark cannot be opened.
    """
    sought = [_Sought(benchmark) for benchmark in benchmarks]
    num_samples = num_pictures = num_unreadable = 0
    for batch in _batches(samples):
        num_samples += len(batch)
        looks: list[Look] = []
        names: list[str] = []
        for sample in batch:
            name = f"{sample.source}/{sample.id}"
            for each in sought:
                each.look_at_text(" ".join(turn.text for turn in sample.messages), name)
            for picture in images_of(sample.messages):
                look = _look(picture)
                num_unreadable += look is None
                if look is not None:
                    looks.append(look)
                    names.append(name)
        num_pictures += len(looks)
        for each in sought:
            each.look_at_pictures(looks, names)
    if not num_samples:
        raise EvaluationError("There is not one training sample to look into.")
    return [each.result(num_samples, num_pictures, num_unreadable) for each in sought]


def contamination_table(found: Sequence[Contamination]) -> Table:
    """Return the shares as a table for the terminal."""
    table = Table(title="Found in the training data, in percent of items", title_justify="left")
    table.add_column("set")
    for name in ("items", "picture", "text", "both", "training samples"):
        table.add_column(name, justify="right")
    for each in found:
        table.add_row(
            each.set, f"{each.num_items:,}", f"{100 * each.by_picture:.1f}",
            f"{100 * each.by_text:.1f}", f"{100 * each.by_both:.1f}",
            f"{each.num_training_samples:,}",
        )  # fmt: skip
    table.caption = (
        f"picture: looks alike; text: a run of {NGRAM_WORDS} words, or the whole question with its "
        f"answer"
    )
    return table


class _Sought:
    """One benchmark while training is read."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._benchmark = benchmark
        self._found = _Found()
        self._looks: list[Look] = []
        self._places: list[int] = []
        known: dict[str, Look] = {}
        for place, item in enumerate(benchmark.items):
            for key, picture in zip(item.image_keys, item.images, strict=True):
                if key not in known:
                    look = _look(picture)
                    if look is None:
                        raise EvaluationError(
                            f"A picture of {benchmark.name}, item {item.id}, cannot be opened."
                        )
                    known[key] = look
                self._looks.append(known[key])
                self._places.append(place)
        self._grams: dict[tuple[str, ...], list[int]] = {}
        self._lengths: set[int] = set()
        for place, item in enumerate(benchmark.items):
            for gram in _grams_of(_words(item)):
                self._grams.setdefault(gram, []).append(place)
                self._lengths.add(len(gram))

    def look_at_text(self, text: str, name: str) -> None:
        """Look for the words of the items in a training text."""
        words = words_of(text)
        for length in self._lengths:
            for start in range(len(words) - length + 1):
                for place in self._grams.get(tuple(words[start : start + length]), ()):
                    self._found.texts.setdefault(place, name)

    def look_at_pictures(self, looks: Sequence[Look], names: Sequence[str]) -> None:
        """Look for the pictures of the items among training pictures."""
        own = len(self._looks)
        for first, second in alike([*self._looks, *looks]):
            if first < own <= second:
                self._found.pictures.setdefault(self._places[first], names[second - own])

    def result(self, samples: int, pictures: int, unreadable: int) -> Contamination:
        """Return the shares, and examples with those first of which both were found."""
        items, found = self._benchmark.items, self._found
        both = set(found.pictures) & set(found.texts)
        shown = sorted(set(found.pictures) | set(found.texts), key=lambda p: (p not in both, p))
        return Contamination(
            set=self._benchmark.name, num_items=len(items), num_training_samples=samples,
            num_training_pictures=pictures, by_picture=len(found.pictures) / len(items),
            by_text=len(found.texts) / len(items), by_both=len(both) / len(items),
            num_unreadable=unreadable,
            examples=tuple(
                {
                    "id": items[place].id,
                    "question": str(items[place].columns.get("question", ""))[:200],
                    "picture_in": found.pictures.get(place),
                    "text_in": found.texts.get(place),
                }
                for place in shown[:_EXAMPLES]
            ),
        )  # fmt: skip


def _words(item: Item) -> list[str]:
    """The words of a question and its answer, without what every prompt of the set says."""
    question = str(item.columns.get("question") or item.columns.get("text") or "")
    answer = item.target.references[0] if item.target.references else ""
    return words_of(f"{question} {answer}")


def _grams_of(words: Sequence[str]) -> set[tuple[str, ...]]:
    """Return runs of words; of a short text the whole.

    >>> sorted(_grams_of("is the left dog red yes".split()))
    [('is', 'the', 'left', 'dog', 'red', 'yes')]
    >>> _grams_of(["red"])
    set()
    """
    if len(words) < _FEWEST_WORDS:
        return set()
    if len(words) <= NGRAM_WORDS:
        return {tuple(words)}
    ends = range(len(words) - NGRAM_WORDS + 1)
    return {tuple(words[start : start + NGRAM_WORDS]) for start in ends}


def _look(picture: Any) -> Look | None:
    try:
        return look_of(open_image(picture))
    except ImageError:
        return None


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
