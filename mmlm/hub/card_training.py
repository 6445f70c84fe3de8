"""The section of the model card that says how the training went, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HEADS = (
    "stage", "steps", "tokens", "minutes", "tokens/s", "loss", "unseen rows", "dropped",
    "padding", "MFU", "memory GiB",
)  # fmt: skip


def training_section(stages: Sequence[Mapping[str, Any]]) -> str:
    """Write the section; nothing where nobody knows how the training went.

    Args:
        stages: The facts of each stage, as `result.json` holds them.

    >>> stage = {"name": "align", "steps": 10, "tokens": 2048, "seconds": 60.0, "first_loss": 5.0,
    ...     "last_loss": 4.0, "dropped": 1, "seen": {"mfu": 0.4, "mfu_against": "a datasheet",
    ...     "peak_gib": 1.5, "padding": 0.0, "loss_by_source": {"cats": 4.0}}}
    >>> print(training_section([stage]).splitlines()[4])
    | align | 10 | 2,048 | 1.0 | 34 | 5.000 to 4.000 |  | 1 | 0.0 % | 40 % | 1.50 |
    """
    if not stages:
        return ""
    lines = ["## How it was trained", "", _line(_HEADS), _line(["---"] * len(_HEADS))]
    lines += [_line(_cells(stage)) for stage in stages]
    sources = [
        f"{stage['name']}: "
        + ", ".join(f"{name} {loss:.3f}" for name, loss in seen["loss_by_source"].items())
        for stage in stages
        if (seen := stage.get("seen") or {}).get("loss_by_source")
    ]
    if sources:
        lines += ["", f"Loss of a token at the end, by source. {'; '.join(sources)}."]
    against = {(stage.get("seen") or {}).get("mfu_against") for stage in stages} - {None}
    if against:
        lines += ["", f"MFU: useful operations over {', '.join(sorted(map(str, against)))}."]
    return "\n".join(lines)


def _cells(stage: Mapping[str, Any]) -> list[str]:
    seen: Mapping[str, Any] = stage.get("seen") or {}
    seconds = float(stage.get("seconds") or 0.0)
    held = stage.get("validation_loss")
    return [
        str(stage["name"]),
        f"{stage['steps']:,}",
        f"{stage['tokens']:,}",
        f"{seconds / 60:.1f}",
        f"{stage['tokens'] / seconds:,.0f}" if seconds else "",
        f"{stage.get('first_loss') or 0:.3f} to {stage.get('last_loss') or 0:.3f}",
        "" if held is None else f"{held:.3f}",
        f"{stage['dropped']:,}",
        f"{100 * seen['padding']:.1f} %" if "padding" in seen else "",
        f"{100 * seen['mfu']:.0f} %" if "mfu" in seen else "",
        f"{seen['peak_gib']:.2f}" if "peak_gib" in seen else "",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
