"""Shows samples as the model sees them: every token, what is learnt in colour, what was dropped.

Image tokens are folded into one mark with their number. Plain is read, green is learnt; the
page with tiles is written by `preview_page`. Nothing is trained and no pixel opened beyond headers.
What would be lost in silence elsewhere is a complaint here: see `complaint`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from mmlm.data.planning import NOT_LEARNT, Planned, Planner
from mmlm.data.schema import CAUSES, Drop
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


GRAVE: dict[str, str] = {
    "no_labels": "learn nothing of them, or mark turns with `learn`",
    "bad_template": "give `model.language` another chat template, or mend the turns",
    "no_image_file": "set `images:` of the source to the folder of the pictures, or fetch them",
    "too_long": "raise `run.row_tokens`: an answer is never cut, so the whole sample is left out",
}
"""Causes that most often mean a mistake in the recipe and not in a few rows, with the mend."""


def complaint(found: Survey, *, budget: float) -> str | None:
    """Say what is wrong with a data set as a whole, or None.

    Args:
        found: What some of its samples look like.
        budget: The share of samples that may be left out.
    """
    looked_at = len(found.samples) + len(found.drops)
    counts = Counter(drop.cause for drop in found.drops)
    if looked_at and not found.samples:
        cause = counts.most_common(1)[0][0]
        return (
            f"Not one of {looked_at:,} samples can be used, most of them because {CAUSES[cause]} "
            f"({cause}). Such as: {_example(found, cause)}"
        )
    for cause, mend in GRAVE.items():
        if counts[cause] > budget * looked_at:
            return (
                f"{counts[cause]:,} of {looked_at:,} samples are left out because {CAUSES[cause]} "
                f"({cause}); `run.drop_budget` allows {budget:.1%}. To mend it, {mend}. Such as: "
                f"{_example(found, cause)}"
            )
    return None


def told(found: Survey, processor: MMLMProcessor) -> list[str]:
    """Say in a few lines what samples look like, and what was left out."""
    lines: list[str] = []
    for (source, cause), count in sorted(Counter((d.source, d.cause) for d in found.drops).items()):
        example = next(d for d in found.drops if (d.source, d.cause) == (source, cause))
        lines.append(f"  dropped   {count:,} of {source}: {cause} ({CAUSES[cause]})")
        lines.append(f"            such as row {example.row}: {example.detail}")
    if found.samples:
        tokens, image = found.num_tokens, found.image_tokens(processor.image_token_id)
        lines.append(
            f"samples     {tokens / len(found.samples):.0f} tokens on average, longest "
            f"{found.longest():,}; {100 * image / tokens:.0f} % are image tokens, "
            f"{100 * found.num_labels / tokens:.0f} % are learnt"
        )
    return lines


def _example(found: Survey, cause: str) -> str:
    drop = next(drop for drop in found.drops if drop.cause == cause)
    return f"{drop.source}, row {drop.row}: {drop.detail}"


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
    return f"{title_of(sample)}\n{text.rstrip()}"


def title_of(sample: Planned) -> str:
    """Say in a line what a sample is."""
    images = f", {len(sample.images)} images" if len(sample.images) != 1 else ", 1 image"
    apart = ""
    if sample.pieces:
        count = len(sample.pieces) - sample.shares
        apart = f", {count} questions {'on shared tokens' if sample.shares else 'apart'}"
    return (
        f"{sample.source} {sample.id}: {sample.num_tokens} tokens, {sample.num_labels} "
        f"learnt{images}{apart}"
    )


def _visible(text: str) -> str:
    """Make control characters visible, line breaks apart."""
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)
