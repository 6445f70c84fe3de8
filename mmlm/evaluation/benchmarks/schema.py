"""The YAML of a benchmark: which keys there are, and what they mean.

Nothing here reads a row; `items` does, and `benchmark` puts both together.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmlm.config import Config


class JoinConfig(Config):
    """A second table, whose columns are added to the rows: answers or pictures kept apart."""

    path: str | None = None
    """A file; relative to that of the rows. From the Hub, leave it out."""

    config: str | None = None
    """The subset of the same dataset on the Hub, or folder of a local copy, that holds it."""

    split: str | None = None
    """Its split; that of the rows when left out."""

    column: str = "id"
    """The column of the rows that names a row of the second table."""

    key: str = "id"
    """The column of the second table with these names."""


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

    config: str | tuple[str, ...] | None = None
    """Its subset, where it has several; of a list, the rows of all, with the column `subset`."""

    split: str = "test"
    """Its split."""

    revision: str | None = None
    """Its commit, so that the numbers stay comparable."""

    images: str | None = None
    """The folder in which relative picture paths begin; by default that of the file."""

    where: dict[str, Any] = Field(default_factory=dict)
    """Keep only rows with these values, such as ``{kind: choice}``; a list means any of it."""

    join: JoinConfig | None = None
    """A second table with further columns."""

    each: str | None = None
    """A column with a list: every entry becomes a row of its own."""


class ReportConfig(Config):
    """What the report shows beside the score."""

    by: tuple[str, ...] = ()
    """Columns by which scores are also given."""


class CanaryConfig(Config):
    """A score that a known model should get with this file: what tells a broken set-up."""

    model: str
    """The model, such as llava-hf/llava-1.5-7b-hf."""

    score: float
    """Its score, in the unit of the scorer: shares between 0 and 1, points as they are."""

    metric: str = ""
    """The number that is meant, where it is not the score itself, such as f1."""

    origin: str
    """Who measured it, and what was different there."""


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

    suites: tuple[str, ...] = ()
    """The suites that it belongs to: `mmlm eval MODEL --suite core`."""

    question: str | dict[str, str] = "{question}"
    """The prompt. Columns stand in braces; `{options}` is the choices with letters, a line each."""

    prompt_by: str | None = None
    """The column that says which of several prompts a row gets; by default its kind."""

    frames: int | None = Field(default=None, ge=1)
    """Where `image` names a film or a folder of its frames: so many are shown, evenly spread. A
    model with a video policy gets them as one clip, every other as pictures."""

    image_size: bool = False
    """Add the columns `image_width` and `image_height`, read from the picture's header."""

    image: str | tuple[str, ...] | None = "image"
    """The column, or columns, of the pictures, or a path with columns in braces; null for none."""

    answer: str | tuple[str, ...] | None = "answer"
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

    canary: CanaryConfig | None = None
    """A known score; null where nobody measured one that can be compared."""
