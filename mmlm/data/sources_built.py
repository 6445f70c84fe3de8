"""The source of data sets that MMLM makes itself: ``{use: build, name: quickstart, rows: align}``.

A data set that is not there yet is made first, which may need a network; it is kept in the
cache. What is made and how is known to `mmlm.data.builders`, how rows are read to
`sources_files`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmlm.data.base import Source, SourceConfig, sources
from mmlm.data.sources_files import JsonLinesConfig


@sources.register("build")
class BuiltConfig(SourceConfig):
    """One set of rows of a data set that `mmlm data build` makes."""

    name: str = Field(min_length=1)  # pyright: ignore[reportIncompatibleVariableOverride]
    """The data set, as `mmlm data build` lists it."""

    rows: str = Field(min_length=1)
    """Which of its sets of rows, such as align."""

    turns: Literal["chain", "apart"] = "chain"
    """Whether the questions of a row see each other, as for rows of files."""

    def open(self, folder: Path) -> Source:
        """Find the rows, and make the data set if it is not there."""
        from mmlm.data.builders import build

        del folder
        path = build(self.name, say=_say).rows(self.rows)
        words: dict[str, Any] = {
            "path": str(path),
            "name": f"{self.name}/{self.rows}",
            "turns": self.turns,
        }
        return JsonLinesConfig.from_dict(words).open(path.parent)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
