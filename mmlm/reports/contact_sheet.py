"""One picture of many answers: each image with its question, what was answered, and the truth.

Right and wrong are told by a tick and a cross, by the word, and by the frame; the colour
only helps. Everything is drawn with Pillow and the font that it brings.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

INK, FAINT, PAPER, CARD = (28, 30, 34), (96, 100, 108), (247, 246, 243), (255, 255, 255)
RIGHT, WRONG = (0, 112, 96), (178, 58, 30)

_SIDE_PX = 208
_CARD_PX = (232, 372)
_GAP_PX = 16
_HEAD_PX = 72
_MOST_LETTERS = 240
"""Letters of a line that are measured; far more than any line of a card has room for."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Shown:
    """One card: a picture (path, bytes, PIL, or None) and what was said about it."""

    picture: Any
    question: str
    answer: str
    truth: str
    is_right: bool
    note: str = ""
    """What stands above the question: the set, or the kind of question."""


def contact_sheet(cards: Sequence[Shown], *, title: str, columns: int = 6) -> Image.Image:
    """Draw cards in rows under a title."""
    columns = max(1, min(columns, len(cards)))
    lines = -(-len(cards) // columns)
    width = columns * (_CARD_PX[0] + _GAP_PX) + _GAP_PX
    height = _HEAD_PX + lines * (_CARD_PX[1] + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP_PX, 20), fit(draw, title, font(26), width - 2 * _GAP_PX), INK, font(26))
    for number, card in enumerate(cards):
        left = _GAP_PX + number % columns * (_CARD_PX[0] + _GAP_PX)
        top = _HEAD_PX + number // columns * (_CARD_PX[1] + _GAP_PX)
        _draw_card(sheet, draw, card, left, top)
    return sheet


def _draw_card(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, card: Shown, left: int, top: int
) -> None:
    width, height = _CARD_PX
    colour = RIGHT if card.is_right else WRONG
    box = (left, top, left + width, top + height)
    draw.rounded_rectangle(box, 10, CARD, outline=colour, width=2 if card.is_right else 4)
    pad = (width - _SIDE_PX) // 2
    picture = thumbnail(card.picture, _SIDE_PX)
    if picture is None:
        draw.rectangle((left + pad, top + pad, left + width - pad, top + pad + _SIDE_PX), PAPER)
        draw.text((left + pad + 12, top + pad + 90), "no picture", FAINT, font(16))
    else:
        dx, dy = (_SIDE_PX - picture.width) // 2, (_SIDE_PX - picture.height) // 2
        sheet.paste(picture, (left + pad + dx, top + pad + dy))
    x, y, room = left + pad, top + pad + _SIDE_PX + 8, _SIDE_PX
    if card.note:
        draw.text((x, y), fit(draw, card.note, font(12), room), FAINT, font(12))
        y += 16
    for line in wrap(draw, card.question, font(13), room, most=2):
        draw.text((x, y), line, FAINT, font(13))
        y += 17
    y = top + height - 92
    _draw_sign(draw, x, y + 3, is_right=card.is_right, colour=colour)
    draw.text((x + 22, y), "right" if card.is_right else "wrong", colour, font(14))
    y += 20
    for line in wrap(draw, card.answer or "(no answer)", font(17), room, most=2):
        draw.text((x, y), line, INK, font(17))
        y += 21
    truth = f"truth: {card.truth}"
    draw.text((x, top + height - 26), fit(draw, truth, font(13), room), FAINT, font(13))


def _draw_sign(
    draw: ImageDraw.ImageDraw, x: int, y: int, *, is_right: bool, colour: tuple[int, int, int]
) -> None:
    """Draw a tick or a cross; no font is sure to have one."""
    if is_right:
        draw.line([(x, y + 6), (x + 5, y + 11), (x + 14, y)], colour, width=3, joint="curve")
    else:
        draw.line([(x + 1, y), (x + 12, y + 11)], colour, width=3)
        draw.line([(x + 12, y), (x + 1, y + 11)], colour, width=3)


def thumbnail(picture: Any, side_px: int) -> Image.Image | None:
    """Open a picture and fit it into a square, on white where it is transparent; else None."""
    try:
        if isinstance(picture, Image.Image):
            image = picture
        elif picture is None:
            return None
        else:
            image = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
            image.draft("RGB", (2 * side_px, 2 * side_px))
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    # Tiny photographs (CIFAR: 32 pixels) are enlarged, or nobody sees anything.
    scale = side_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def font(size_px: int) -> Font:
    """Return Pillow's own font at a size."""
    if size_px not in _FONTS:
        _FONTS[size_px] = ImageFont.load_default(size_px)
    return _FONTS[size_px]


_FONTS: dict[int, Font] = {}


def fit(draw: ImageDraw.ImageDraw, text: str, face: Font, room_px: int) -> str:
    """Shorten a line to the room that there is."""
    text = " ".join(text[:_MOST_LETTERS].split())
    if draw.textlength(text, font=face) <= room_px:
        return text
    while text and draw.textlength(text + "…", font=face) > room_px:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(draw: ImageDraw.ImageDraw, text: str, face: Font, room_px: int, *, most: int) -> list[str]:
    """Break a text into lines; the last one says with … that there is more."""
    words, lines = text[:600].split(), [""]
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=face) <= room_px or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {' '.join(words[number:])}"
            break
    return [fit(draw, line, face, room_px) for line in lines]
