"""Hands a finished evaluation to `mmlm.reports`, with its pictures and the parts of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.evaluation.asking.backend import Backend, LocalBackend
from mmlm.reports import Written, write_report

if TYPE_CHECKING:
    from mmlm.evaluation.runner import Evaluation


def report(
    result: Evaluation,
    *,
    run: Path | None = None,
    title: str = "",
    lead: str = "",
    facts: Mapping[str, str] | None = None,
) -> Written:
    """Write `report.html` and `contact_sheet.png` beside the scores.

    Args:
        result: What was measured.
        run: The folder of the training run, for the curves and the growth of the answers.
        title: The headline.
        lead: A sentence or two under it.
        facts: Short facts; what the model is made of is added by `facts_of`.
    """
    pictures = {
        key: image
        for prediction in result.predictions
        for key, image in zip(prediction.case.image_keys, prediction.case.images, strict=True)
        if not isinstance(image, Path)
    }
    return write_report(
        result.out,
        run=run,
        scores=result.out,
        title=title,
        lead=lead,
        facts=facts,
        pictures=pictures,
    )


def facts_of(backend: Backend) -> dict[str, str]:
    """Say in short what a model is made of; empty for a model that is not ours."""
    if not isinstance(backend, LocalBackend):
        return {}
    config = backend.assistant.model.config
    sources: dict[str, dict[str, Any]] = getattr(config, "sources", None) or {}
    facts = {
        "encoder": _part(sources.get("vision") or config.vision),
        "reducer": _part(config.reducer),
        "connector": _part(config.connector),
        "language model": _part(sources.get("language")),
    }
    return {name: text for name, text in facts.items() if text}


def _part(values: dict[str, Any] | None) -> str:
    """Name a part by its checkpoint, else by its name in the registry."""
    if not values:
        return ""
    checkpoint = values.get("checkpoint")
    return Path(str(checkpoint)).name if checkpoint else str(values.get("use", ""))
