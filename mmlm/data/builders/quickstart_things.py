"""The quickstart's things and their pictures: names joined to drawings, drawings rendered.

A thing is an emoji with a name, keywords and a group; a drawing is one style's picture of it.
Rendering is exact: the same package gives the same pixels. The main colour of a drawing is
computed from its opaque pixels. No question is asked here.
"""

from __future__ import annotations

import colorsys
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmlm.data.builders.npm import read_files
from mmlm.data.builders.quickstart_parts import GROUPS, LEFT_OUT_WORDS
from mmlm.errors import DataError, MissingExtraError

Pixels = NDArray[np.uint8]

COLOUR_SHARE = 0.5
"""A drawing has a main colour if at least this share of its opaque pixels has it."""


@dataclass(frozen=True)
class Thing:
    """Something that several artists have drawn.

    Args:
        name: What people call it, in lower case.
        group: Our word for its group.
        tags: Keywords that people gave it, in lower case.
    """

    name: str
    group: str
    tags: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name as icon sets and file names write it."""
        return slug_of(self.name)


def slug_of(name: str) -> str:
    """Return a name as icon sets write it.

    >>> slug_of("woman’s hat"), slug_of("piñata"), slug_of("t-shirt")
    ('womans-hat', 'pinata', 't-shirt')
    """
    name = name.lower().translate(str.maketrans("ñéåôãç", "neaoac", "’'“”.&"))
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def read_things(archive: Path) -> list[Thing]:
    """Read names, keywords and groups out of emojibase's archive, in its order.

    Raises:
        DataError: if the archive does not have the shape that we know.
    """
    files = read_files(archive, ["en/data.json", "en/messages.json"])
    try:
        # `order` is what emoji refer to. Seafood and sweets share one; Unicode has moved all
        # seafood to marine animals, so the last key, sweets, is the right one.
        subgroups = json.loads(files["en/messages.json"])["subgroups"]
        keys: dict[int, str] = {row["order"]: row["key"] for row in subgroups}
        things = [
            Thing(row["label"].lower(), GROUPS[group], _tags(row))
            for row in json.loads(files["en/data.json"])
            if (group := keys.get(row.get("subgroup", -1), "")) in GROUPS
            and not any(word in row["label"].lower() for word in LEFT_OUT_WORDS)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{archive} does not have the shape of emojibase 17: {error!r}.") from None
    if not things:
        raise DataError(f"{archive} names no thing of the groups that are used.")
    return things


def _tags(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(tag).lower() for tag in row.get("tags", ()))


class Style:
    """The drawings of one icon set in Iconify's format."""

    def __init__(self, name: str, icons: dict[str, Any]) -> None:
        self.name = name
        self._icons: dict[str, Any] = icons["icons"]
        self._aliases: dict[str, Any] = icons.get("aliases", {})
        self._width, self._height = icons.get("width", 16), icons.get("height", 16)

    def __contains__(self, thing: Thing) -> bool:
        return thing.slug in self._icons or thing.slug in self._aliases

    def svg(self, thing: Thing) -> str:
        """Return the drawing of a thing as an SVG file."""
        name = thing.slug
        if name not in self._icons:
            name = self._aliases[name]["parent"]
        icon = self._icons[name]
        width, height = icon.get("width", self._width), icon.get("height", self._height)
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{box}">{icon["body"]}</svg>'
        )


def read_style(name: str, archive: Path) -> Style:
    """Read an icon set.

    Raises:
        DataError: if the archive holds none.
    """
    icons = json.loads(read_files(archive, ["icons.json"])["icons.json"])
    if "icons" not in icons:
        raise DataError(f"{archive} holds no icons in Iconify's format.")
    return Style(name, icons)


def render(svg: str, side_px: int) -> Pixels:
    """Return a drawing as pixels with alpha, ``(side_px, side_px, 4)``.

    A drawing that is not square stands in the middle of a transparent square.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise MissingExtraError("resvg-py", needed_for="Drawing SVG", extra="quickstart") from None
    png = bytes(svg_to_bytes(svg_string=svg, width=side_px, skip_system_fonts=True))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (side_px, side_px):
        image.thumbnail((side_px, side_px), Image.Resampling.BICUBIC)
        square = Image.new("RGBA", (side_px, side_px))
        square.paste(image, ((side_px - image.width) // 2, (side_px - image.height) // 2))
        image = square
    return np.asarray(image)


def on_white(pixels: Pixels) -> Pixels:
    """Return a drawing on white paper, ``(side, side, 3)``."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    flat = pixels[..., :3] * alpha + 255 * (1 - alpha)
    return np.round(flat).astype(np.uint8)


def main_colour(pixels: Pixels) -> str | None:
    """Return the colour that at least half of a drawing's opaque pixels have, if one has it."""
    opaque = pixels[pixels[..., 3] >= 128][:, :3]
    if not len(opaque):
        return None
    codes = (opaque >> 4).astype(np.int64) @ (256, 16, 1)  # 16 shades of each of red, green, blue
    counts = np.bincount(codes)
    totals: dict[str, int] = {}
    for code in np.flatnonzero(counts).tolist():
        name = colour_name(*((code >> shift & 15) * 17 for shift in (8, 4, 0)))
        totals[name] = totals.get(name, 0) + int(counts[code])
    name = max(totals, key=lambda key: totals[key])
    return name if totals[name] >= COLOUR_SHARE * len(opaque) else None


def colour_name(red: int, green: int, blue: int) -> str:
    """Return which of eleven basic colours a colour is.

    >>> [colour_name(*c) for c in ((255, 204, 0), (120, 70, 30), (30, 90, 220), (250, 250, 250))]
    ['yellow', 'brown', 'blue', 'white']
    """
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    degrees = hue * 360
    if value < 0.22:
        return "black"
    if saturation < 0.14:
        return "white" if value > 0.85 else "grey"
    if degrees < 15 or degrees >= 345:
        return "pink" if saturation < 0.5 and value > 0.75 else "red"
    if degrees < 45:
        if value < 0.7 or (saturation < 0.55 and value < 0.9):
            return "brown"
        return "orange"
    for limit, name in ((68, "yellow"), (165, "green"), (258, "blue"), (300, "purple")):
        if degrees < limit:
            return name
    return "pink"


def drawn_by(things: Iterable[Thing], styles: Iterable[Style]) -> dict[Thing, list[Style]]:
    """Return who draws each thing."""
    artists = list(styles)
    return {thing: [style for style in artists if thing in style] for thing in things}
