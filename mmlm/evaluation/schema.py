"""The YAML of a benchmark: which keys there are, and what they mean.

Nothing here reads a row; `items` does, and `benchmark` puts both together.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmlm.config import Config


class DatasetConfig(Config):
    """Where the rows are: exactly one of `path`, `build` and `hub`."""

    path: str | None = None
    """A file or folder; relative to the YAML file, else to the current folder."""

    build: str | None = None
    """A data set that `mmlm data build` makes, such as quickstart; made if it is not there."""

    rows: str | None = None
    """Which of its sets of rows, such as unseen_style."""

    hub: str | None = None
    """A dataset on the Hub, ``org/name``."""

    config: str | None = None
    """Its subset, where it has several."""

    split: str = "test"
    """Its split."""

    revision: str | None = None
    """Its commit, so that the numbers stay comparable."""

    images: str | None = None
    """The folder in which relative picture paths begin; by default that of the file."""

    where: dict[str, Any] = Field(default_factory=dict)
    """Keep only rows with these values, such as ``{kind: choice}``; a list means any of it."""


class ReportConfig(Config):
    """What the report shows beside the score."""

    by: tuple[str, ...] = ()
    """Columns by which scores are also given."""


class BenchmarkConfig(Config):
    """One benchmark. `question` and `scorer` may also be mappings from kind to value."""

    title: str = ""
    """What it measures, in a few words."""

    set: str = ""
    """Its name in tables; by default the name of the file."""

    dataset: DatasetConfig
    """Where the rows are."""

    id: str | None = None
    """The column that names a row; by default `id`, else the row's number, which `row` asks for."""

    kind: str | None = None
    """The column that says which kind of question a row asks; by default there is one kind."""

    question: str | dict[str, str] = "{question}"
    """The prompt. Columns stand in braces; `{options}` is the choices with letters, a line each."""

    image: str | tuple[str, ...] | None = "image"
    """The column, or columns, of the pictures, or a path with columns in braces; null for none."""

    answer: str | tuple[str, ...] = "answer"
    """The column, or columns, of the accepted answers; a list in a column is several answers."""

    answer_counts_from: Literal[0, 1] | None = None
    """Where the answer is the number of a choice: the number of the first one."""

    choices: str | tuple[str, ...] | None = "choices"
    """The column that lists the options, or one column for each option."""

    thing: str = "thing"
    """The column of what is in the picture; a shuffled picture never shows the same thing."""

    scorer: Any = "exact"
    """A scorer's name, ``{use: name, **settings}``, or a mapping from kind to either."""

    decide: Literal["generate", "likelihood"] = "generate"
    """The answer that is written, or the choice whose tokens are the likeliest on average."""

    generate: dict[str, Any] = Field(default_factory=dict)
    """Generation settings."""

    draw: int | dict[str, int] | None = None
    """How many items of each kind are drawn, for all kinds or by kind; all when left out."""

    look_draw: int | None = None
    """How many of these are also asked blind and with other pictures; all when left out."""

    report: ReportConfig = ReportConfig()
    """What the report shows beside the score."""

    hub_id: str | None = None
    """The benchmark's dataset on the Hub, for the evaluation results of a model card."""

    expect: dict[str, Any] = Field(default_factory=dict)
    """Known scores: the canary of this file."""
