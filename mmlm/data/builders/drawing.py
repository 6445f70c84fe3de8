"""What the builders that draw their own pictures share: colours, letters, files.

Everything is drawn by Pillow with the typeface that it carries, so that a picture hangs on the
seed and on Pillow alone. Sizes are in pixels. Nothing here chooses what is drawn or asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Row = dict[str, Any]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 205, 40),
    "green": (40, 150, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
    "pink": (240, 130, 180),
    "brown": (125, 80, 45),
    "black": (30, 30, 30),
}
"""Colours that nobody mistakes for one another, by name."""

PAPERS: tuple[Colour, ...] = ((255, 255, 255), (244, 244, 238), (232, 240, 247), (250, 240, 228))
"""Grounds on which all of the colours stand out."""

INK: Colour = (35, 35, 40)


@cache
def letters(size_px: int) -> Any:
    """Return the typeface at a size."""
    return ImageFont.load_default(size_px)


def page(width_px: int, height_px: int, ground: Colour = (255, 255, 255)) -> Any:
    """Return an empty picture and the pen that draws on it."""
    image = Image.new("RGB", (width_px, height_px), ground)
    return image, ImageDraw.Draw(image)


def width_of(text: str, size_px: int) -> float:
    """Return how wide a line of text is."""
    return float(letters(size_px).getlength(text))


def shortened(text: str, size_px: int, room_px: float) -> str:
    """Return a text cut to a width, with three dots where something is missing."""
    if width_of(text, size_px) <= room_px:
        return text
    while text and width_of(text + "...", size_px) > room_px:
        text = text[:-1]
    return text.rstrip() + "..."


def wrapped(text: str, size_px: int, room_px: float) -> list[str]:
    """Break a text into lines that fit a width."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size_px) <= room_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG, quickly: these pictures are mostly flat colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", compress_level=3)


def write_rows(folder: Path, name: str, rows: Iterable[Row]) -> int:
    """Write one set of rows; return their number."""
    count = 0
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
