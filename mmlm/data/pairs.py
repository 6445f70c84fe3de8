"""Pairs of a better and a worse answer to one question, for preference objectives.

    {image, question, chosen, rejected}                 a table
    {messages | conversations, image, chosen, rejected}  turns up to the question

A pair is one sample of two pieces that do not see one another, the chosen answer first, so that
packing, micro-batches and ranks never part them. `reference` may hold what a reference model
gives to both answers: ``[log p(chosen), log p(rejected)]``, summed over their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationInfo, field_validator

from mmlm.data.base import Source, sources
from mmlm.data.planning import Planned, Planner
from mmlm.data.schema import BadRowError, Sample
from mmlm.data.sources_files import FileConfig, FileSource, parse_line
from mmlm.data.sources_index import index_lines

_REJECTED, _REFERENCE = "rejected", "reference"
_KEPT_APART = ("chosen", _REJECTED, _REFERENCE)


@dataclass(frozen=True)
class PlannedPair(Planned):
    """A planned sample of two pieces: the chosen answer and the rejected one.

    Args:
        reference: What a reference model gives to both, or None.
    """

    reference: tuple[float, float] | None = None


@sources.register("pairs")
class PairsConfig(FileConfig):
    """One JSON object in a line, with a chosen and a rejected answer."""

    @field_validator("turns", "learn")
    @classmethod
    def _one_answer(cls, value: str, info: ValidationInfo) -> str:
        """Refuse what would part the two answers of a pair, or learn more than them."""
        if value in ("apart", "all"):
            usual = "chain" if value == "apart" else "answers"
            raise ValueError(
                f"`{info.field_name}: {value}` does not go with `use: pairs`: a pair compares two "
                f"last answers to one conversation. Leave it out (`{info.field_name}: {usual}`), "
                f"or write the questions as pairs of their own"
            )
        return value

    def open(self, folder: Path) -> Source:
        """Find the lines."""
        return PairSource(
            self.title(), index_lines(self.locate(folder)), parse_line, self.reader(),
            unique_ids=self.unique_ids,
        )  # fmt: skip


class PairSource(FileSource):
    """The pairs of one file."""

    def sample(self, row: int) -> Sample:
        """Read one pair: a sample of the chosen answer, the rejected one in its `meta`."""
        values = self._parse(self._rows.read(row))
        if not isinstance(values, dict) or not {"chosen", "rejected"} <= values.keys():
            raise BadRowError("no_pair", "the row has not both `chosen` and `rejected`")
        if answer_of(values["chosen"]) == answer_of(values["rejected"]):
            raise BadRowError("no_pair", "the chosen and the rejected answer are the same")
        chosen, rejected = (
            self._reader.read(
                with_answer(values, answer_of(values[key]), self._reader.columns.answer),
                number=row, source=self.name, folder=self._folder,
            )
            for key in ("chosen", "rejected")
        )  # fmt: skip
        meta = {**chosen.meta, _REJECTED: rejected.messages, _REFERENCE: _reference(values)}
        return replace(chosen, meta=meta)


def answer_of(value: Any) -> str:
    """Return the text of an answer: a string, a turn, or the last of several turns.

    >>> answer_of([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    'b'
    """
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        value = value.get("content", value.get("value"))
    if not isinstance(value, str) or not value.strip():
        raise BadRowError("no_pair", f"an answer is {value!r:.80}, not text")
    return value


def with_answer(row: dict[str, Any], answer: str, column: str = "answer") -> dict[str, Any]:
    """Return a row that ends with an answer, in its own shape; that of a table is in `column`."""
    plain = {key: value for key, value in row.items() if key not in _KEPT_APART}
    for key, turn in (
        ("messages", {"role": "assistant", "content": answer}),
        ("conversations", {"from": "gpt", "value": answer}),
    ):
        if isinstance(plain.get(key), list):
            return {**plain, key: [*plain[key], turn]}
    return {**plain, column: answer}


def _reference(row: dict[str, Any]) -> tuple[float, float] | None:
    value = row.get(_REFERENCE)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise BadRowError("no_pair", f"`reference` is {value!r:.80}, not two numbers")
    return float(value[0]), float(value[1])


class PairPlanner(Planner):
    """Plans a pair as one sample of two pieces."""

    def _plan(self, sample: Sample, position: int, row: int) -> Planned:
        rejected: Sequence[Any] | None = sample.meta.get(_REJECTED)
        if rejected is None:
            raise BadRowError("no_pair", "this source has single answers; name one with use: pairs")
        better = super()._plan(sample, position, row)
        worse = super()._plan(replace(sample, messages=tuple(rejected)), position, row)
        pair = PlannedPair(
            position=position, source=better.source, row=row, id=better.id,
            ids=np.concatenate([better.ids, worse.ids]),
            labels=np.concatenate([better.labels, worse.labels]),
            images=(*better.images, *worse.images), num_tiles=better.num_tiles + worse.num_tiles,
            sizes=(*better.sizes, *worse.sizes), pieces=(better.num_tokens, worse.num_tokens),
            reference=sample.meta.get(_REFERENCE),
        )  # fmt: skip
        if pair.num_tokens > self.max_tokens or pair.num_tiles > self.max_tiles:
            raise BadRowError(
                "too_long",
                f"both answers with their pictures have {pair.num_tokens} tokens and "
                f"{pair.num_tiles} tiles; a row has {self.max_tokens} and {self.max_tiles}",
            )
        return pair
