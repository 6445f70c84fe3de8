"""A baseline without any language model: the nearest neighbour on the encoder's own features.

    training pictures ──► pooled features ──┐
    question's picture ─► pooled features ──┴─► the option whose picture is most alike

It is measured on the same items, among the same options, in the same run, and says how much
of what the frozen encoder knows has reached the answers. Only items all of whose options have
a training picture can be answered so; how many these are is the `n` of the score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import DataError, EvaluationError
from mmlm.evaluation.asking.backend import Backend, LocalBackend
from mmlm.evaluation.benchmarks.benchmark import Benchmark
from mmlm.evaluation.benchmarks.conditions import Case
from mmlm.evaluation.benchmarks.pictures import find_picture, picture_key
from mmlm.evaluation.benchmarks.tables import read_table
from mmlm.evaluation.results import Score
from mmlm.evaluation.scorers.choice import truth_number
from mmlm.evaluation.scorers.text import plain
from mmlm.evaluation.statistics import share_interval

CONDITION = "nearest_neighbour"

Encode = Callable[[Sequence[Any]], Tensor]
"""From pictures to pooled features ``(pictures, width)``."""


@dataclass(frozen=True)
class Remembered:
    """One training picture and everything it is known as: its name, colour, group."""

    picture: Any
    labels: frozenset[str]


def remember(
    path: Path, *, image: str = "image", labels: Sequence[str] = ("thing", "answer")
) -> list[Remembered]:
    """Read training pictures and their labels from a file of rows.

    Args:
        path: JSONL, JSON, CSV or parquet.
        image: The column of the picture.
        labels: The columns whose texts are labels; those that a row lacks are passed over.

    Raises:
        DataError: if no row has a picture and a label.
    """
    known: dict[Any, set[str]] = {}
    for row in read_table(path):
        if not row.get(image):
            continue
        picture = find_picture(row[image], [path.parent])
        texts = (row.get(column) for column in labels)
        names = {plain(text) for text in texts if isinstance(text, str)}
        known.setdefault(picture, set()).update(names - {""})
    memory = [Remembered(picture, frozenset(names)) for picture, names in known.items() if names]
    if not memory:
        raise DataError(
            f"{path} has no row with a picture in {image!r} and a text in {' or '.join(labels)}."
        )
    return memory


class NearestNeighbour:
    """A score to add to an evaluation: ``evaluate(…, extra=[NearestNeighbour(memory)])``.

    Args:
        memory: The training pictures.
        encode: Gives pooled features; the frozen encoder of the model when left out.
        seed: Seed of the interval.
    """

    def __init__(
        self, memory: Sequence[Remembered], *, encode: Encode | None = None, seed: int = 0
    ) -> None:
        if not memory:
            raise EvaluationError("The nearest neighbour needs at least one training picture.")
        self._memory, self._encode, self._seed = list(memory), encode, seed
        self._places: dict[str, list[int]] = {}
        for place, each in enumerate(self._memory):
            for label in each.labels:
                self._places.setdefault(label, []).append(place)
        self._features: dict[int, Tensor] = {}

    def __call__(
        self, benchmark: Benchmark, cases: Sequence[Case], backend: Backend
    ) -> list[Score]:
        """Score the items that can be answered so; nothing where there are none."""
        usable = [case for case in cases if self._can_answer(case)]
        if not usable:
            return []
        encode = self._encode or pooled_features(backend)
        self._recall(usable, encode)
        pictures = {case.image_keys[0]: case.images[0] for case in usable}
        asked = _unit(encode(list(pictures.values())))
        row_of = {key: row for row, key in enumerate(pictures)}
        right = [
            float(
                self.choose(asked[row_of[case.image_keys[0]]], case)
                == truth_number(case.item.target)
            )
            for case in usable
        ]
        interval = share_interval(right, [case.item.cluster for case in usable], seed=self._seed)
        chance = sum(1 / len(case.choices) for case in usable) / len(usable)
        return [
            Score(
                set=benchmark.name,
                question=usable[0].item.kind,
                condition=CONDITION,
                n=len(usable),
                score=interval.score,
                low=interval.low,
                high=interval.high,
                metric="accuracy",
                scorer="choice@1",
                chance=chance,
                parse_fail_rate=0.0,
                empty_rate=0.0,
                num_images=len(pictures),
            )
        ]

    def choose(self, feature: Tensor, case: Case) -> int:
        """Return the option whose nearest training picture is the nearest.

        Shapes:
            feature: ``(width,)``, of length 1
        """
        best = [self._likeness(feature, plain(choice)) for choice in case.choices]
        return max(range(len(best)), key=best.__getitem__)

    def _likeness(self, feature: Tensor, label: str) -> float:
        known = torch.stack([self._features[place] for place in self._places[label]])
        return float((known @ feature).max())

    def _recall(self, cases: Sequence[Case], encode: Encode) -> None:
        """Encode the training pictures of all options that were not encoded before."""
        labels = {plain(choice) for case in cases for choice in case.choices}
        places = {place for label in labels for place in self._places[label]}
        wanted = sorted(places - self._features.keys())
        if wanted:
            features = _unit(encode([self._memory[place].picture for place in wanted]))
            self._features |= zip(wanted, features, strict=True)

    def _can_answer(self, case: Case) -> bool:
        known = (plain(choice) in self._places for choice in case.choices)
        return len(case.images) == 1 and bool(case.choices) and all(known)


def pooled_features(backend: Backend, *, batch_size: int = 32) -> Encode:
    """Return a function from pictures to the mean over the encoder's features.

    Raises:
        EvaluationError: if the model has no encoder that can be asked.
    """
    if not isinstance(backend, LocalBackend):
        raise EvaluationError(
            "The nearest neighbour needs an encoder: evaluate a model of ours, or pass `encode`."
        )

    def encode(pictures: Sequence[Any]) -> Tensor:
        rows: list[Tensor] = []
        for start in range(0, len(pictures), batch_size):
            batch = list(pictures[start : start + batch_size])
            features = backend.features(batch, [picture_key(picture) for picture in batch])
            rows += [each.values.float().mean(dim=0).cpu() for each in features]
        return torch.stack(rows)

    return encode


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
