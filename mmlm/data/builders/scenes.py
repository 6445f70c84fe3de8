"""Drawn scenes with questions whose answers are known exactly: counting, place, colour, reading.

    puzzle = make_puzzle("count", 17, seed=0)      a pure function of kind, number and seed
    puzzle.image, puzzle.question, puzzle.answer

Answers are dealt out by the number and not by lot, so that every answer of a kind is the right
one equally often and none can be guessed from the question. Things never overlap, and what is
compared is never close. Training uses even seeds and tests odd ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmlm.data.builders.drawing import (
    COLOURS,
    INK,
    PAPERS,
    Row,
    letters,
    page,
    save,
    width_of,
    write_rows,
)
from mmlm.errors import ConfigError

ABOUT = "Drawn scenes: counting, place, colour and reading, with exact answers."
VERSION = 1

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
MOST_COUNTED = 6
_CELLS = 4  # a side
_WORDS = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbour", "island",
    "jacket", "kitchen", "ladder", "market", "needle", "orange", "pepper", "quarry", "river",
    "silver", "tunnel", "velvet", "window", "yellow", "zebra", "anchor", "basket", "copper",
    "dragon", "feather", "hammer", "lantern", "mirror", "planet", "rocket", "summer", "ticket",
)  # fmt: skip


@dataclass(frozen=True)
class Puzzle:
    """One picture with a question that has one right answer.

    Args:
        kind: One of `KINDS`.
        image: The picture, square, RGB.
        question: What is asked.
        answer: The right answer.
        choices: All answers that the question can have; empty where they cannot be listed.
        facts: What is drawn, for reports.
    """

    kind: str
    image: Image.Image
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Thing:
    """One drawn thing: its shape and colour, and its middle and size in cells."""

    shape: str
    colour: str
    column: float
    row: float
    size: float

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


def make_puzzle(kind: str, number: int, *, seed: int = 0, side_px: int = 224) -> Puzzle:
    """Make one puzzle.

    Args:
        kind: One of `KINDS`.
        number: Which one; the same number gives the same puzzle for ever.
        seed: Another seed gives other puzzles.
        side_px: The side of the picture.

    Raises:
        ConfigError: if there is no such kind.
    """
    if kind not in _MAKERS:
        raise ConfigError(f"No puzzle is of the kind {kind!r}. Known: {', '.join(KINDS)}.")
    draw = random.Random(f"puzzle {VERSION} {kind} {number} {seed}")
    return _MAKERS[kind](draw, number, side_px)


def make_puzzles(kind: str, count: int, *, seed: int = 0, side_px: int = 224) -> Iterator[Puzzle]:
    """Make the first `count` puzzles of a kind."""
    for number in range(count):
        yield make_puzzle(kind, number, seed=seed, side_px=side_px)


def _count(draw: random.Random, number: int, side_px: int) -> Puzzle:
    """Ask for the number of things of one shape and colour, 0 to 6 in turn, among others."""
    wanted = number % (MOST_COUNTED + 1)
    shape, colour = draw.choice(SHAPES), draw.choice(list(COLOURS))
    looks = [(shape, colour)] * wanted
    others = [(s, c) for s in SHAPES for c in COLOURS if (s, c) != (shape, colour)]
    # Half of the others share the shape or the colour, so that both must be looked at.
    near = [(s, c) for s, c in others if s == shape or c == colour]
    for _ in range(draw.randint(2, 7)):
        looks.append(draw.choice(near if draw.random() < 0.5 else others))
    things = _place(draw, looks)
    return Puzzle(
        "count",
        _picture(draw, things, side_px),
        f"How many {colour} {plural(shape)} are there? Answer with a number.",
        str(wanted),
        tuple(map(str, range(MOST_COUNTED + 1))),
        {"things": [str(thing) for thing in things]},
    )


def _position(draw: random.Random, number: int, side_px: int) -> Puzzle:
    """Ask how one thing stands to another; each of the four sides in turn, yes and no in turn."""
    sides = ("left of", "right of", "above", "below")
    truth = sides[number % 4]
    looks = draw.sample([(s, c) for s in SHAPES for c in COLOURS], draw.randint(3, 6))
    while True:
        things = _place(draw, looks)
        one, other = things[0], things[1]
        across, down = other.column - one.column, other.row - one.row
        gap = {"left of": across, "right of": -across, "above": down, "below": -down}
        if gap[truth] >= 1.0:
            break
    is_yes = number // 4 % 2 == 0
    opposite = sides[sides.index(truth) ^ 1]
    said = truth if is_yes else opposite
    return Puzzle(
        "position",
        _picture(draw, things, side_px),
        f"Is the {one} {said} the {other}? Answer yes or no.",
        "yes" if is_yes else "no",
        ("yes", "no"),
        {"things": [str(thing) for thing in things]},
    )


def _colour(draw: random.Random, number: int, side_px: int) -> Puzzle:
    """Ask for the colour of the only thing of its shape; each colour in turn."""
    names = list(COLOURS)
    colour = names[number % len(names)]
    shape = draw.choice(SHAPES)
    rest = [s for s in SHAPES if s != shape]
    looks = [(shape, colour)]
    looks += [(draw.choice(rest), draw.choice(names)) for _ in range(draw.randint(2, 6))]
    things = _place(draw, looks)
    return Puzzle(
        "colour",
        _picture(draw, things, side_px),
        f"What colour is the {shape}? Answer with one word.",
        colour,
        tuple(names),
        {"things": [str(thing) for thing in things]},
    )


def _read(draw: random.Random, number: int, side_px: int) -> Puzzle:
    """Ask what a sign says: a word, or digits that nobody can guess, in turn."""
    text = draw.choice(_WORDS) if number % 2 else f"{draw.randrange(10**4):04d}"
    image, pen = page(side_px, side_px, draw.choice(PAPERS))
    size = draw.randint(side_px // 9, side_px // 6)
    width = width_of(text, size)
    left = draw.uniform(size / 2, side_px - width - size / 2)
    top = draw.uniform(size / 2, side_px - 2 * size)
    colour = draw.choice([name for name in COLOURS if name != "yellow"])
    if draw.random() < 0.5:
        pad = size * 0.4
        box = (left - pad, top - pad, left + width + pad, top + size * 1.2 + pad)
        pen.rounded_rectangle(box, size * 0.3, outline=INK, width=max(1, side_px // 110))
    pen.text((left, top), text, fill=COLOURS[colour], font=letters(size))
    return Puzzle("read", image, "What does the sign say?", text, (), {"colour": colour})


_MAKERS: dict[str, Callable[[random.Random, int, int], Puzzle]] = {
    "count": _count,
    "position": _position,
    "colour": _colour,
    "read": _read,
}
KINDS = tuple(_MAKERS)
"""The kinds of puzzle."""


def plural(shape: str) -> str:
    """Return the word for several of a shape.

    >>> plural("cross"), plural("ring")
    ('crosses', 'rings')
    """
    return shape + ("es" if shape.endswith("s") else "s")


def _place(draw: random.Random, looks: list[tuple[str, str]]) -> list[Thing]:
    """Put things into cells of their own, a little beside the middle."""
    cells = draw.sample(range(_CELLS * _CELLS), len(looks))
    things: list[Thing] = []
    for (shape, colour), cell in zip(looks, cells, strict=True):
        row, column = divmod(cell, _CELLS)
        size = draw.uniform(0.55, 0.8)
        room = (1 - size) / 2 - 0.03
        x = column + 0.5 + draw.uniform(-room, room)
        y = row + 0.5 + draw.uniform(-room, room)
        things.append(Thing(shape, colour, x, y, size))
    return things


def _picture(draw: random.Random, things: list[Thing], side_px: int) -> Image.Image:
    image, pen = page(2 * side_px, 2 * side_px, draw.choice(PAPERS))
    cell = 2 * side_px / _CELLS
    for thing in things:
        _draw(pen, thing, cell)
    # Drawn at twice the size and shrunk, so that edges are smooth.
    return image.resize((side_px, side_px), Image.Resampling.BOX)


def _draw(pen: Any, thing: Thing, cell: float) -> None:
    x, y, half = thing.column * cell, thing.row * cell, thing.size * cell / 2
    colour, box = COLOURS[thing.colour], (x - half, y - half, x + half, y + half)
    if thing.shape == "circle":
        pen.ellipse(box, fill=colour)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=colour, width=int(half * 0.35))
    elif thing.shape == "square":
        side = half * 0.88
        pen.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif thing.shape == "cross":
        arm = half * 0.32
        pen.rectangle((x - half, y - arm, x + half, y + arm), fill=colour)
        pen.rectangle((x - arm, y - half, x + arm, y + half), fill=colour)
    else:
        corners, inner = (3, 1.0) if thing.shape == "triangle" else (5, 0.42)
        pen.polygon(list(_corners(x, y, half, corners, inner)), fill=colour)


def _corners(
    x: float, y: float, radius: float, corners: int, inner: float
) -> Iterator[tuple[float, float]]:
    for step in range(2 * corners):
        if step % 2 and inner == 1.0:
            continue
        angle = math.pi * (step / corners - 0.5)
        reach = radius * (inner if step % 2 else 1.0)
        yield x + reach * math.cos(angle), y + reach * math.sin(angle)


@dataclass(frozen=True)
class Settings:
    """What decides how the data set comes out.

    Args:
        seed: Begins every choice; training takes twice this, the test one more.
        side_px: The side of the pictures.
        each: Puzzles of each kind to learn from.
        each_test: Puzzles of each kind in the test.
    """

    seed: int = 0
    side_px: int = 224
    each: int = 2000
    each_test: int = 252


def key() -> str:
    """Return a short text that changes when the data set would."""
    text = json.dumps([VERSION, asdict(Settings())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make(
    folder: Path, say: Callable[[str], None], *, settings: Settings | None = None
) -> dict[str, Any]:
    """Fill an empty folder with `train` and `test`, and return what the report says."""
    settings = settings or Settings()
    counts: dict[str, int] = {}
    for name, each, odd in (("train", settings.each, 0), ("test", settings.each_test, 1)):
        say(f"drawing {each * len(KINDS):,} puzzles for {name}")
        rows = _rows(folder, name, each, 2 * settings.seed + odd, settings.side_px)
        counts[name] = write_rows(folder, name, rows)
    return {"about": ABOUT, "settings": asdict(settings), "rows": counts, "licence": "Apache-2.0"}


def _rows(folder: Path, name: str, each: int, seed: int, side_px: int) -> Iterator[Row]:
    for kind in KINDS:
        for number, puzzle in enumerate(make_puzzles(kind, each, seed=seed, side_px=side_px)):
            image = f"pictures/{name}/{kind}-{number:05d}.png"
            save(puzzle.image, folder / image)
            yield {
                "id": f"{kind}-{number}",
                "image": image,
                "question": puzzle.question,
                "answer": puzzle.answer,
                "kind": kind,
                "choices": list(puzzle.choices),
            }
