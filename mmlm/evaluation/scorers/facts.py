"""Answers in sentences that must hold several facts (MM-Vet), marked without a judge."""

from __future__ import annotations

from collections.abc import Sequence

from mmlm.evaluation.scorers.base import Mark, ScorerConfig, Target, scorers
from mmlm.evaluation.scorers.text import find, stems_of


def facts_held(answer: str, reference: str) -> tuple[int, int]:
    """How many of a reference's facts an answer says: ``a<AND>b<OR>c`` is a and one of b, c.

    >>> facts_held("The answer is 42 and the sky is blue.", "42<AND>blue<OR>azure")
    (2, 2)
    >>> facts_held("blue", "42<AND>blue")
    (1, 2)
    """
    stems = stems_of(answer)
    facts = [part.split("<OR>") for part in reference.split("<AND>")]
    held = sum(any(_said(stems, text) for text in either) for either in facts)
    return held, len(facts)


def _said(stems: list[str], text: str) -> bool:
    wanted = stems_of(text)
    return bool(wanted) and bool(find(stems, wanted))


@scorers.register("facts")
class FactsConfig(ScorerConfig):
    """The share of the reference's facts that stand in the answer, as whole words.

    MM-Vet's published score comes from GPT-4 as a judge; this one needs none and is another
    number, good for comparing checkpoints with each other and with nothing else.
    """

    metric = "share of facts (no judge)"

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer; of several references the best counts."""
        return Mark(best_share(answer, target.references), answer.strip() or None)


def best_share(answer: str, references: Sequence[str]) -> float:
    """Return the largest share of facts over the references.

    >>> best_share("a red bus", ["red<AND>bus<AND>stop", "train"])
    0.666...
    """
    held = [facts_held(answer, reference) for reference in references]
    return max(said / wanted for said, wanted in held)
