"""Fractals drawn by formula: pictures without any photograph, as many kinds as one likes.

One fractal is an iterated function system: a few affine maps with random numbers, each
followed as often as it fills space. FractalDB (Kataoka et al., 2020) taught encoders with
them; OneInstance FractalDB (Nakamura et al., 2023) shows that one picture a kind is enough if
the picture is augmented. Here a kind is a number, and its formula a pure function of it.

    train      one picture a kind and its name                     (OFDB)
    same       two pictures: do they come from one formula?        (yes and no in turn)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmlm.data.builders.drawing import Row, save, write_rows

ABOUT = "Fractals by formula (OFDB): one picture a kind, and pairs of one formula or two."
VERSION = 1

_CHAINS, _STEPS, _STEPS_TRIED, _SETTLE = 2000, 60, 3, 20
_LEAST_FILLED = 0.12  # of the grid of 32 x 32; below this a fractal is a few dots
_GRID = 32


@dataclass(frozen=True)
class Formula:
    """An iterated function system.

    Shapes:
        maps: ``(maps, 2, 3)``, rotation and shift of each
        chances: ``(maps,)``, how often each is followed
    """

    maps: NDArray[np.float64]
    chances: NDArray[np.float64]


def formula_of(kind: int, *, seed: int = 0) -> Formula:
    """Return the formula of a kind: the first of its random ones that fills enough space."""
    draw = np.random.default_rng([VERSION, seed, kind])
    while True:
        maps = draw.uniform(-1.0, 1.0, (int(draw.integers(2, 9)), 2, 3))
        # Contracting, or the points run away.
        scale = np.linalg.norm(maps[:, :, :2], ord=2, axis=(1, 2))
        maps[:, :, :2] *= (np.minimum(scale, 0.95) / scale)[:, None, None]
        weight = np.abs(np.linalg.det(maps[:, :, :2])) + 1e-3
        formula = Formula(maps, weight / weight.sum())
        grid = (
            np.floor(_unit(_points(formula, draw, _STEPS_TRIED)) * _GRID)
            .astype(int)
            .clip(0, _GRID - 1)
        )
        if len(np.unique(grid[:, 0] * _GRID + grid[:, 1])) >= _LEAST_FILLED * _GRID * _GRID:
            return formula


def draw_fractal(formula: Formula, *, instance: int = 0, side_px: int = 224) -> Image.Image:
    """Draw a formula; instances differ in colour, turn, mirror and in which points are drawn."""
    draw = np.random.default_rng([VERSION, 1, instance])
    points = _unit(_points(formula, draw, _STEPS))
    if draw.random() < 0.5:
        points[:, 0] = 1.0 - points[:, 0]
    turns = int(draw.integers(4))
    margin = 0.06
    pixels = ((margin + (1 - 2 * margin) * points) * side_px).astype(int).clip(0, side_px - 1)
    heat = np.zeros((side_px, side_px))
    np.add.at(heat, (pixels[:, 1], pixels[:, 0]), 1.0)
    glow = np.rot90(np.log1p(heat) / np.log1p(heat.max()), turns)[:, :, None]
    ground, ink = draw.uniform(0, 60, 3), draw.uniform(120, 255, 3)
    shine = np.where(glow > 0, 0.35 + 0.65 * glow, 0.0)
    return Image.fromarray((ground + (ink - ground) * shine).astype(np.uint8))


def _points(formula: Formula, draw: np.random.Generator, steps: int) -> NDArray[np.float64]:
    """Follow the maps from many places at once: ``(points, 2)``."""
    x, y = draw.uniform(-1.0, 1.0, (2, _CHAINS))
    ends = np.cumsum(formula.chances)[:-1]
    found: list[NDArray[np.float64]] = []
    for step in range(_SETTLE + steps):
        choice = np.searchsorted(ends, draw.random(_CHAINS), side="right")
        (a, b, e), (c, d, f) = formula.maps.transpose(1, 2, 0)[:, :, choice]
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= _SETTLE:
            found.append(np.stack([x, y], axis=1))
    return np.concatenate(found)


def _unit(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move points into the unit square, keeping their proportions; a few strays are left out."""
    low, high = np.quantile(points, [0.002, 0.998], axis=0)
    span = max(float((high - low).max()), 1e-9)
    moved = (points - (low + high) / 2) / span + 0.5
    return moved[((moved >= 0) & (moved <= 1)).all(axis=1)]


@dataclass(frozen=True)
class Settings:
    """What decides how the data set comes out.

    Args:
        seed: Begins every choice.
        side_px: The side of the pictures.
        kinds: The number of formulas.
        pairs: The number of pairs; their formulas are others.
    """

    seed: int = 0
    side_px: int = 224
    kinds: int = 1000
    pairs: int = 1000


def key() -> str:
    """Return a short text that changes when the data set would."""
    return hashlib.sha256(json.dumps([VERSION, asdict(Settings())]).encode()).hexdigest()[:12]


def make(
    folder: Path, say: Callable[[str], None], *, settings: Settings | None = None
) -> dict[str, Any]:
    """Fill an empty folder with `train` and `same`, and return what the report says."""
    settings = settings or Settings()
    say(f"drawing {settings.kinds:,} fractals")
    counts = {"train": write_rows(folder, "train", _kinds(folder, settings))}
    say(f"drawing {settings.pairs:,} pairs")
    counts["same"] = write_rows(folder, "same", _pairs(folder, settings))
    return {"about": ABOUT, "settings": asdict(settings), "rows": counts, "licence": "Apache-2.0"}


def _kinds(folder: Path, settings: Settings) -> Iterator[Row]:
    for kind in range(settings.kinds):
        image = f"pictures/kinds/{kind:05d}.png"
        formula = formula_of(kind, seed=settings.seed)
        save(draw_fractal(formula, instance=0, side_px=settings.side_px), folder / image)
        yield {
            "id": f"kind-{kind}",
            "image": image,
            "question": "Which fractal is this?",
            "answer": f"fractal {kind}",
            "kind": "name",
        }


def _pairs(folder: Path, settings: Settings) -> Iterator[Row]:
    for number in range(settings.pairs):
        is_same = number % 2 == 0
        first = settings.kinds + 2 * number
        kinds = (first, first if is_same else first + 1)
        images: list[str] = []
        for place, kind in enumerate(kinds):
            images.append(f"pictures/pairs/{number:05d}-{place}.png")
            formula = formula_of(kind, seed=settings.seed)
            picture = draw_fractal(
                formula, instance=1 + 2 * number + place, side_px=settings.side_px
            )
            save(picture, folder / images[-1])
        yield {
            "id": f"pair-{number}",
            "image": images,
            "question": "Do both pictures come from one formula? Answer yes or no.",
            "answer": "yes" if is_same else "no",
            "kind": "same",
        }
