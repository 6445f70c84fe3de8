"""What an assistant has learned to see, in words for the people who talk to it.

A model folder may carry `about.json`, which the quickstart and other recipes write:

    {"title": "quickstart", "learned": "Drawings and photos of 300 everyday things.",
     "limits": "It has never seen people, maps or written text.",
     "examples": [{"image": "examples/fox.png", "question": "What is this?"}]}

All of it may be missing. Then the model card speaks, and if there is none, the config.
A small model is asked about a visitor's own photo within a minute; this page is why the
answer need not be a silly surprise.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

FILE = "about.json"
_HEADINGS = ("what it has learned to see", "what it has learned", "intended use", "model details")
_LONGEST = 1200


class Example(BaseModel):
    """A question that the assistant can be expected to answer."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    question: str
    """What to ask."""

    image: str | None = None
    """A picture, as a path inside the model folder."""


class About(BaseModel):
    """What an assistant is, for people."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    title: str = ""
    """Its name."""

    learned: str = ""
    """What it has learned to see, in a few sentences."""

    limits: str = ""
    """What it cannot do."""

    parts: str = ""
    """Its parts in one line: encoder, connector, language model."""

    examples: tuple[Example, ...] = ()
    """Questions to begin with."""

    @property
    def sentence(self) -> str:
        """What it has learned to see, or an honest word that nobody wrote it down."""
        told = " ".join(part for part in (self.learned, self.limits) if part)
        return told or "Nobody wrote down what this model has learned to see. Expect mistakes."


def read_about(source: str | Path) -> About:
    """Read what a model folder tells about itself.

    Args:
        source: A model folder, or a run that holds one as `model/`; a Hub id tells its name only.
    """
    folder = Path(source)
    title = folder.name if folder.exists() else str(source)
    for place in (folder, folder / "model", folder.parent):
        told = _from_json(place / FILE) if place.is_dir() else None
        if told is not None:
            return told.model_copy(update=_complete(told, place, title))
    home = folder if (folder / "config.json").is_file() else folder / "model"
    cards = (place / "README.md" for place in (home, folder))
    texts = (card.read_text("utf-8", errors="replace") for card in cards if card.is_file())
    learned = next((told for text in texts if (told := _from_card(text))), "")
    return About(title=title, learned=learned, parts=_parts_of(home / "config.json"))


def _from_json(path: Path) -> About | None:
    """Read `about.json`; a broken one is as good as none, because nothing depends on it."""
    try:
        return About.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _complete(about: About, folder: Path, title: str) -> dict[str, Any]:
    """Add what the file left out, and make the paths of its examples whole."""
    examples: list[Example] = []
    for example in about.examples:
        if example.image is None:
            examples.append(example)
            continue
        path = (folder / example.image).resolve()
        # A folder from elsewhere must not put other files of this machine onto the page.
        if path.is_relative_to(folder.resolve()) and path.is_file():
            examples.append(example.model_copy(update={"image": str(path)}))
    return {
        "title": about.title or title,
        "parts": about.parts or _parts_of(folder / "config.json"),
        "examples": tuple(examples),
    }


def _from_card(text: str) -> str:
    """Return the first paragraph of the card's section on what was learned."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    sections = re.split(r"^#+\s+(.+?)\s*$", text, flags=re.MULTILINE)
    bodies = {
        heading.lower().rstrip("?:"): body
        for heading, body in zip(sections[1::2], sections[2::2], strict=True)
    }
    for heading in _HEADINGS:
        for paragraph in bodies.get(heading, "").strip().split("\n\n"):
            if paragraph.strip() and "[More Information Needed]" not in paragraph:
                return " ".join(paragraph.split())[:_LONGEST]
    return ""


def _parts_of(path: Path) -> str:
    """Name encoder and language model from a `config.json`, MMLM's or a stock one."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ""
    if not isinstance(config, dict):
        return ""
    sources = config.get("sources") or {}
    names: list[str] = []
    for part, key in (("vision", "vision_config"), ("language", "text_config")):
        told = sources.get(part) if isinstance(sources, dict) else None
        tower = config.get(key)
        name = told.get("checkpoint") if isinstance(told, dict) else None
        if not name and isinstance(tower, dict):
            name = tower.get("_name_or_path") or tower.get("model_type")
        if name:
            names.append(str(name))
    return " + ".join(names)
