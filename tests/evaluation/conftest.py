"""A benchmark in a folder, pictures of one colour, and a model that only pretends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

THINGS = ("red", "green", "blue", "yellow", "black", "white")


class Parrot:
    """Answers from a table of functions; counts what it was asked."""

    def __init__(self, reply, fingerprint="parrot"):
        self.reply, self.fingerprint = reply, fingerprint
        self.asked = []

    def answer_all(self, requests, batch_size=8, **settings):
        self.asked += requests
        return [self.reply(request) for request in requests]


def sees(request):
    """Say the colour of the picture, or guess red."""
    if not request.images:
        return "red"
    with Image.open(request.images[0]) as image:
        pixel = image.convert("RGB").getpixel((0, 0))
    return next(name for name in THINGS if Image.new("RGB", (1, 1), name).getpixel((0, 0)) == pixel)


def write_rows(folder: Path, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def colours(tmp_path):
    """Return a folder with 24 rows in 12 pictures: two kinds of question about each."""
    folder = tmp_path / "colours"
    folder.mkdir()
    rows = []
    for number in range(12):
        thing = THINGS[number % len(THINGS)]
        Image.new("RGB", (8 + number, 8), thing).save(folder / f"{number}.png")
        options = [thing, *(name for name in THINGS if name != thing)][:4]
        options = options[number % 4 :] + options[: number % 4]
        common = {
            "image": f"{number}.png",
            "answer": thing,
            "thing": thing,
            "style": f"s{number % 2}",
        }
        rows.append({"id": f"n{number}", "kind": "name", "question": "Which colour?", **common})
        question = f"Which colour: {', '.join(options)}?"
        rows.append(
            {
                "id": f"c{number}",
                "kind": "choice",
                "question": question,
                "choices": options,
                **common,
            }
        )
    write_rows(folder, rows)
    (folder / "colours.yaml").write_text(
        "dataset: {path: rows.jsonl}\nkind: kind\nscorer: {name: name, choice: choice}\n"
        "report: {by: [style]}\n"
    )
    return folder
