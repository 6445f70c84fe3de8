"""Shows samples as the model sees them: every token, what is learnt in colour, what was dropped.

Image tokens are folded into one mark with their number. The colours of a terminal and of a
page are the same two: plain is read, marked is learnt. Nothing is trained and no pixel opened
beyond headers.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mmlm.data.planning import NOT_LEARNT, Planned, Planner
from mmlm.data.schema import Drop
from mmlm.processing import MMLMProcessor


class Piece(NamedTuple):
    """A stretch of tokens that are all learnt, or all not."""

    text: str
    learnt: bool
    num_tokens: int


@dataclass
class Survey:
    """What a number of samples look like to the model.

    Args:
        samples: The samples that can be used.
        drops: The ones that cannot, with causes.
    """

    samples: list[Planned] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def num_labels(self) -> int:
        """The tokens that are learnt."""
        return sum(sample.num_labels for sample in self.samples)

    @property
    def num_images(self) -> int:
        """All images."""
        return sum(len(sample.images) for sample in self.samples)

    def image_tokens(self, image_token_id: int) -> int:
        """The tokens that stand for images."""
        return sum(int((sample.ids == image_token_id).sum()) for sample in self.samples)

    def longest(self) -> int:
        """The length of the longest sample."""
        return max((sample.num_tokens for sample in self.samples), default=0)


def survey(planner: Planner, positions: Iterable[int]) -> Survey:
    """Plan some samples and keep what came of it."""
    found = Survey()
    for position in positions:
        planned = planner.plan(position)
        if isinstance(planned, Drop):
            found.drops.append(planned)
        else:
            found.samples.append(planned)
    return found


def pieces(sample: Planned, processor: MMLMProcessor) -> list[Piece]:
    """Return a sample as stretches of text, images folded."""
    tokenizer, image_id = processor.tokenizer, processor.image_token_id
    found: list[Piece] = []
    start = 0
    kinds = [(label != NOT_LEARNT, token == image_id) for token, label in _pairs(sample)]
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[start]:
            continue
        learnt, is_image = kinds[start]
        ids = sample.ids[start:end].tolist()
        text = f"<image ×{len(ids)}>" if is_image else tokenizer.decode(ids)
        found.append(Piece(text, learnt, len(ids)))
        start = end
    return found


def _pairs(sample: Planned) -> list[tuple[int, int]]:
    return list(zip(sample.ids.tolist(), sample.labels.tolist(), strict=True))


def as_terminal(sample: Planned, processor: MMLMProcessor, *, colour: bool = True) -> str:
    """Return a sample for a terminal: what is learnt is green, or in brackets without colour."""
    on, off = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    text = "".join(
        f"{on}{_visible(piece.text)}{off}" if piece.learnt else _visible(piece.text)
        for piece in pieces(sample, processor)
    )
    return f"{_title(sample)}\n{text.rstrip()}"


def as_html(samples: Sequence[Planned], processor: MMLMProcessor) -> str:
    """Return a page with samples; what is learnt has a green ground."""
    blocks: list[str] = []
    for sample in samples:
        spans = "".join(
            f"<mark>{html.escape(piece.text)}</mark>" if piece.learnt else html.escape(piece.text)
            for piece in pieces(sample, processor)
        )
        blocks.append(f"<h2>{html.escape(_title(sample))}</h2>\n<pre>{spans}</pre>")
    style = (
        "body{font:15px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "pre{white-space:pre-wrap;background:#f6f6f4;padding:1rem;border-radius:.5rem}"
        "mark{background:#b9e6c3}h2{font-size:1rem}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>What the model sees</title><style>{style}</style></head><body>\n"
        "<h1>What the model sees</h1>\n<p>Marked text is learnt; the rest is read.</p>\n"
        + "\n".join(blocks)
        + "\n</body></html>\n"
    )


def _title(sample: Planned) -> str:
    images = f", {len(sample.images)} images" if len(sample.images) != 1 else ", 1 image"
    return (
        f"{sample.source} {sample.id}: {sample.num_tokens} tokens, {sample.num_labels} "
        f"learnt{images}"
    )


def _visible(text: str) -> str:
    """Make control characters visible, line breaks apart."""
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)
