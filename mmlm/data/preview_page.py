"""A page that shows samples as the model sees them: tiles, every token, labels in colour.

The tiles are cut as for training and shown before they are normalised. Every token is a box of its
own with its number in the hint; what is learnt is green, control tokens are framed, pictures are
folded. The page is one file, needs no network and runs no script.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from PIL import Image

from mmlm.data.planning import NOT_LEARNT, Planned
from mmlm.data.preview import Survey, title_of
from mmlm.data.schema import CAUSES
from mmlm.errors import ImageError
from mmlm.features import Size
from mmlm.images import cut_each, open_image
from mmlm.messages import Clip
from mmlm.processing import MMLMProcessor

_TILE_PX = 144
_MOST_TILES = 24
_MOST_TOGETHER = 8  # tokens that a character outside of ASCII may be spread over


class Shown(NamedTuple):
    """One box: a token, or as many as one character needs, or a picture.

    Args:
        text: What it reads.
        numbers: The ids.
        kind: ``text``, ``control`` or ``picture``.
        learnt: Whether the loss covers it.
        begins: Whether a branch of a shared sample begins here.
    """

    text: str
    numbers: tuple[int, ...]
    kind: str
    learnt: bool
    begins: bool = False


def preview_page(
    found: Survey, processor: MMLMProcessor, *, title: str, lead: str = "", most: int = 12
) -> str:
    """Write the page.

    Args:
        found: What some samples look like.
        processor: What made them.
        title: The headline.
        lead: A sentence under it.
        most: The largest number of samples that are shown.
    """
    image_id = processor.image_token_id
    tokens = max(1, found.num_tokens)
    facts = {
        "samples": f"{len(found.samples):,}",
        "left out": f"{len(found.drops):,}",
        "tokens a sample": f"{found.num_tokens / max(1, len(found.samples)):.0f}, at most "
        f"{found.longest():,}",
        "image tokens": f"{100 * found.image_tokens(image_id) / tokens:.0f} %",
        "learnt": f"{100 * found.num_labels / tokens:.0f} %",
    }
    cells = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    samples = "\n".join(_sample(sample, processor) for sample in found.samples[:most])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body><main>\n"
        f"<h1>{escape(title)}</h1>\n<p class=lead>{escape(lead)}</p>\n<dl>{cells}</dl>\n"
        f"{_legend()}\n{_drops(found)}\n{samples}\n</main></body></html>\n"
    )


@cache
def _style() -> str:
    return files("mmlm.data").joinpath("preview_page.css").read_text(encoding="utf-8")


def _legend() -> str:
    kinds = (
        ("t", "the", "is read"), ("t learnt", "cat", "is learnt"),
        ("t control", "&lt;|im_end|&gt;", "control token"),
        ("t picture", "picture × 256", "tokens of a picture"),
    )  # fmt: skip
    marks = "".join(f'<span><i class="{c}">{text}</i> {says}</span>' for c, text, says in kinds)
    return f'<p class="legend">{marks}</p>'


def _drops(found: Survey) -> str:
    """Return a table of what was left out, by source and cause."""
    if not found.drops:
        return ""
    counts = Counter((drop.source, drop.cause) for drop in found.drops)
    rows: list[str] = []
    for (source, cause), count in counts.most_common():
        first = next(d for d in found.drops if (d.source, d.cause) == (source, cause))
        cells = (source, cause, f"{count:,}", CAUSES[cause], f"row {first.row}: {first.detail}")
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>source<th>cause<th>rows<th>what it means<th>such as</tr>"
    table = f"<table>{head}{''.join(rows)}</table>"
    return f"<h2>Left out</h2>\n<div class=scroll>{table}</div>"


def _sample(sample: Planned, processor: MMLMProcessor) -> str:
    boxes = "".join(_box(shown) for shown in tokens_of(sample, processor))
    return (
        f"<section><h2>{escape(title_of(sample))}</h2>\n{_tiles(sample, processor)}\n"
        f"<p class=tokens>{boxes}</p></section>"
    )


def _box(shown: Shown) -> str:
    kinds = ["t", *([shown.kind] if shown.kind != "text" else []), *(["learnt"] * shown.learnt)]
    hint = " ".join(map(str, shown.numbers[:_MOST_TOGETHER]))
    # A line break is shown as a sign, and broken where it stands.
    text = escape(_visible(shown.text)).replace("\n", "⏎\n")
    branch = '<b class="branch"></b>' if shown.begins else ""
    return f'{branch}<span class="{" ".join(kinds)}" title="{hint}">{text}</span>'


def tokens_of(sample: Planned, processor: MMLMProcessor) -> Iterator[Shown]:
    """Give the boxes of a sample; tokens that only together are a character share one."""
    tokenizer: Any = processor.tokenizer
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids, learnt = sample.ids.tolist(), (sample.labels != NOT_LEARNT).tolist()
    starts = _branch_starts(sample)
    before: list[int] = []
    place = 0
    while place < len(ids):
        end = place + 1
        if ids[place] == processor.image_token_id:
            while end < len(ids) and ids[end] == ids[place]:
                end += 1
            text, kind = f"picture × {end - place}", "picture"
        elif ids[place] in control:
            text, kind = tokenizer.decode(ids[place:end]), "control"
        else:
            text, kind = _text_after(tokenizer, before, ids[place:end]), "text"
            while text.endswith("�") and end < len(ids) and end - place < _MOST_TOGETHER:
                end += 1
                text = _text_after(tokenizer, before, ids[place:end])
        yield Shown(text, tuple(ids[place:end]), kind, learnt[place], place in starts)
        before = ids[place:end] if kind == "text" else []
        place = end


def _branch_starts(sample: Planned) -> set[int]:
    starts: set[int] = set()
    position = 0
    for length in sample.pieces:
        starts.add(position)
        position += length
    return starts - {0}


def _text_after(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """Return what tokens read behind others: a first word may hide the space before it."""
    if not before:
        return tokenizer.decode(ids)
    known = tokenizer.decode(before)
    whole = tokenizer.decode([*before, *ids])
    return whole[len(known) :] if whole.startswith(known) else tokenizer.decode(ids)


def _visible(text: str) -> str:
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


def _tiles(sample: Planned, processor: MMLMProcessor) -> str:
    """Return the tiles of the pictures of a sample."""
    shown: list[str] = []
    for number, picture in enumerate(sample.images):
        for tile, words in tiles_of(picture, processor):
            said = words if len(sample.images) == 1 else f"picture {number + 1}, {words}"
            shown.append(
                f'<figure><img src="{_address(tile)}" alt="{escape(said)}">'
                f"<figcaption>{escape(said)}</figcaption></figure>"
            )
    rest = len(shown) - _MOST_TILES
    more = f"<figure class=more>and {rest} more</figure>" if rest > 0 else ""
    return f"<div class=tiles>{''.join(shown[:_MOST_TILES])}{more}</div>" if shown else ""


def tiles_of(picture: Any, processor: MMLMProcessor) -> Iterator[tuple[Image.Image, str]]:
    """Give the tiles of a picture as pictures, each with its size in words."""
    counter = getattr(processor.image_processor, "counter", None)
    if isinstance(picture, Clip):
        yield from _frames(picture, processor)
        return
    try:
        image = open_image(picture, readers=None if counter is None else counter.policy.readers)
    except (ImageError, OSError) as error:
        yield Image.new("RGB", (8, 8), (178, 58, 30)), f"broken: {error}"
        return
    if counter is None:
        yield image, f"{image.width} × {image.height} px"
        return
    facts: Any = counter.facts
    fill: Any = (0, 0, 0)
    if counter.policy.fill == "mean":
        fill = tuple(int(value * 255) for value in facts.mean)
    tiles = counter.plan(Size(image.height, image.width)).tiles
    for tile, pixels in zip(
        tiles, cut_each(image, tiles, resample=facts.resample, fill=fill), strict=True
    ):
        shown = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        yield shown, f"{tile.size.width} × {tile.size.height} px"


def _frames(clip: Clip, processor: MMLMProcessor) -> Iterator[tuple[Image.Image, str]]:
    """Give the frames of a clip that are taken, as the encoder gets them."""
    looks = processor.image_processor
    try:
        frames, size = looks.frames(clip)
    except (ImageError, OSError) as error:
        yield Image.new("RGB", (8, 8), (178, 58, 30)), f"broken: {error}"
        return
    way: Any = looks.counter.facts.resample
    tile = looks.counter.plan(size).tiles[0]
    for number, frame in enumerate(frames):
        (pixels,) = cut_each(frame, [tile], resample=way, fill=(0, 0, 0))
        shown = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        yield shown, f"frame {number + 1}, {tile.size.width} × {tile.size.height} px"


def _address(tile: Image.Image) -> str:
    small = tile.copy()
    small.thumbnail((_TILE_PX * 2, _TILE_PX * 2))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
