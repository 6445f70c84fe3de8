"""A tiny training: real classes, random weights, a few pictures, seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import picture, save_language, save_vision

WORDS = ("red", "green", "blue", "a small cat", "two dogs on a hill", "rain", "nothing at all")


def write_rows(folder: Path, count: int = 40, *, bad: int = 0) -> Path:
    """Write pictures and a JSONL file over them; every fifth row has no image."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        name = f"{index % 12}.png"
        if not (folder / name).exists():
            picture(index % 12).save(folder / name)
        row: dict[str, Any] = {
            "question": "What is it?" if index % 3 else "Tell me what you see here.",
            "answer": WORDS[index % len(WORDS)],
        }
        if index % 5:
            row["image"] = name
        rows.append(row)
    for index in range(bad):
        rows.append({"image": f"missing{index}.png", "question": "a", "answer": "b"})
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def parts(folder: Path, language: str = "llama") -> dict[str, Any]:
    """Write the parts of a model and return the words that name them."""
    vision, text = folder / "vision", folder / language
    if not vision.exists():
        save_vision(vision)
    if not text.exists():
        save_language(text, language)
    return {
        "vision": {"use": "hf", "checkpoint": str(vision), "layer": -2},
        "connector": {"use": "mlp"},
        "language": {"use": "causal_lm", "checkpoint": str(text)},
    }


def tiny_recipe(folder: Path, *, stages: Any = None, **run: Any) -> dict[str, Any]:
    """Return a recipe of two short stages over tiny parts, all in `folder`."""
    data = str(folder / "rows.jsonl")
    if not Path(data).exists():
        write_rows(folder)
    first = {"name": "align", "learn": ["connector.*"], "data": data, "until": {"epochs": 1},
             "step_tokens": 256, "peak_lr": 1e-2}  # fmt: skip
    second = {"name": "instruct", "learn": {"connector.*": 1e-3, "language.*": 1e-3},
              "data": data, "until": {"epochs": 1}, "step_tokens": 256,
              "weight_decay": 0.1}  # fmt: skip
    return {
        "model": parts(folder),
        "stages": stages or [first, second],
        "run": {"precision": "fp32", "pool_samples": 8, "device": "cpu", **run},
    }
