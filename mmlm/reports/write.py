"""Puts a report on disk: `report.html`, `contact_sheet.png` and `loss.svg`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmlm.reports.choose import examples
from mmlm.reports.contact_sheet import contact_sheet
from mmlm.reports.files import RunFiles, read_run, stage_curves
from mmlm.reports.page import page
from mmlm.reports.svg import curves

_SHEET_CARDS = 24
_PLOT_STYLE = (
    "<style>text{font:13px sans-serif;fill:#5f636b}.grid{stroke:#dcd9d2}.stage{color:#0072b2}"
    ".s1{color:#c25100}.s2{color:#00705f}.s3{color:#8a5a9e}.stage-area{fill:currentColor;opacity:.06}"
    ".raw,.smooth{fill:none;stroke:currentColor}.raw{opacity:.3}.smooth{stroke-width:2.5}</style>"
)


class Written(NamedTuple):
    """The files of a report; None where there was nothing to draw."""

    page: Path
    sheet: Path | None
    loss: Path | None


def write_report(
    out: Path,
    *,
    run: Path | None = None,
    scores: Path | None = None,
    title: str = "",
    lead: str = "",
    facts: Mapping[str, str] | None = None,
    pictures: Mapping[str, Any] | None = None,
) -> Written:
    """Write the report of a training run, of an evaluation, or of both.

    Args:
        out: The folder for the files.
        run: The folder of the training run, with `log.jsonl` and `growth.jsonl`.
        scores: The folder of the evaluation, with `results.json` and `predictions.jsonl`.
        title: The headline; the name of the folder when left out.
        lead: A sentence or two under it.
        facts: Short facts beside it.
        pictures: Pictures by key, for those that are no files.

    Raises:
        DataError: if a file of the run is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = read_run(run, scores)
    title = title or (run or scores or out).resolve().name
    html = page(found, title=title, lead=lead, facts=facts, pictures=pictures)
    _put(out / "report.html", html.encode("utf-8"))
    return Written(
        out / "report.html",
        _write_sheet(out / "contact_sheet.png", found, title, pictures),
        _write_loss(out / "loss.svg", found),
    )


def _write_sheet(
    path: Path, found: RunFiles, title: str, pictures: Mapping[str, Any] | None
) -> Path | None:
    kinds = len({(row["set"], row["question"]) for row in found.predictions})
    if not kinds:
        return None
    each = max(2, _SHEET_CARDS // kinds)
    wrong = max(1, each // 4)
    chosen = examples(found.predictions, drawn=each - wrong, wrong=wrong, pictures=pictures)
    cards = [example.shown() for fair, further in chosen.values() for example in (*fair, *further)]
    if not cards:
        return None
    aside = path.with_name(f".{path.name}")
    contact_sheet(cards, title=title).save(aside, "PNG", optimize=True)
    aside.replace(path)
    return path


def _write_loss(path: Path, found: RunFiles) -> Path | None:
    plot = curves(stage_curves(found.log, "loss"), title="Loss")
    if not plot:
        return None
    head, _, rest = plot.partition("<title>")
    _put(path, f"{head}{_PLOT_STYLE}<title>{rest}".encode())
    return path


def _put(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    aside.replace(path)
