"""Descriptions against descriptions by people: CIDEr, with BLEU, ROUGE-L and METEOR beside it.

The numbers come from pycocoevalcap, the field's own code, whose scorers are called one by
one: its `evaluate()` always asks for SPICE, which downloads. Its tokenizer is a Java program;
METEOR and SPICE, which are such too, have a module of their own, `java_programs`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np

from mmlm.errors import EvaluationError, MissingExtraError
from mmlm.evaluation.scorers.base import Mark, Row, ScorerConfig, Target, scorers
from mmlm.evaluation.scorers.java_programs import find_corenlp, find_java, meteor, spice
from mmlm.evaluation.statistics import Floats

Words = dict[str, list[str]]
"""Captions whose words are joined by spaces, by the number of the picture as text."""

_WORD = re.compile(r"[a-z0-9]+(?:[-'.][a-z0-9]+)*")


def words_plainly(text: str) -> str:
    """Lower-case words without punctuation: what CIDEr counts, without Java.

    >>> words_plainly("A man, riding a T-shirt!")
    'a man riding a t-shirt'
    """
    return " ".join(_WORD.findall(text.lower()))


def tokenise(texts: Sequence[Sequence[str]], *, dialect: str) -> dict[str, list[str]]:
    """Split captions into words, joined by spaces, by the number of the picture as text.

    `official` and `lmms-eval`: the Penn Treebank tokenizer. `vlmevalkit`: none, the texts as
    they stand. `mmlm`: lower-case words without punctuation, in Python.
    """
    if dialect == "vlmevalkit":
        return {str(number): list(each) for number, each in enumerate(texts)}
    if dialect == "mmlm":
        return {str(n): [words_plainly(text) for text in each] for n, each in enumerate(texts)}
    wrapped = {
        str(number): [{"caption": text.replace("\n", " ")} for text in each]
        for number, each in enumerate(texts)
    }
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        raise _missing() from None
    find_java()
    try:
        return PTBTokenizer().tokenize(wrapped)
    except OSError as error:
        raise EvaluationError(
            f"The caption tokenizer of pycocoevalcap cannot run: {error}. It writes a temporary "
            f"file beside itself; take the dialect `mmlm`, which needs neither Java nor a file."
        ) from None


def _missing() -> MissingExtraError:
    return MissingExtraError("pycocoevalcap", needed_for="the scorer `caption`", extra="eval")


@scorers.register("caption")
class CaptionConfig(ScorerConfig):
    """CIDEr-D of descriptions; 1 is what tables print as 100.

    Word frequencies are those of the references of the items that are asked: a subset gives
    another number, and a single picture gives 0. The interval keeps them as they are.
    """

    metric = "CIDEr"
    is_share = False
    dialects = ("official", "mmlm", "vlmevalkit", "lmms-eval")

    meteor: bool = False
    """Whether METEOR stands beside it; it starts Java and takes ten seconds or so."""

    spice: bool = False
    """Whether SPICE stands beside it; it needs CoreNLP 3.6.0 in MMLM_CORENLP, and Java."""

    def ready(self) -> None:
        """Fail if the tokenizer, METEOR or SPICE cannot run."""
        try:
            import pycocoevalcap  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError:
            raise _missing() from None
        if self.spoken in ("official", "lmms-eval") or self.meteor:
            find_java()
        if self.spice:
            find_corenlp()

    def mark(self, answer: str, target: Target) -> Mark:
        """Keep the description; `settle` marks it, because CIDEr needs all of them."""
        return Mark(0.0, answer.strip() or None)

    def settle(self, answers: Sequence[str], rows: Sequence[Row]) -> list[Mark]:
        """Mark every description: its own CIDEr."""
        said, true = self._words(answers, rows)
        from pycocoevalcap.cider.cider import Cider

        _, values = Cider().compute_score(true, said)
        return [
            Mark(float(value) if row.mark.reading is not None else 0.0, row.mark.reading)
            for value, row in zip(values, rows, strict=True)
        ]

    def also(self, rows: Sequence[Row]) -> dict[str, float]:
        """BLEU-4 and ROUGE-L; METEOR and SPICE where they are asked for."""
        said, true = self._words([row.mark.reading or "" for row in rows], rows)
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.rouge.rouge import Rouge

        with redirect_stdout(StringIO()):
            bleu: Any = Bleu(4).compute_score(true, said)[0]
        found = {"BLEU-4": float(bleu[3]), "ROUGE-L": float(Rouge().compute_score(true, said)[0])}
        if self.meteor:
            found["METEOR"] = meteor(true, said)
        if self.spice:
            found["SPICE"] = spice(true, said)
        return found

    def _words(self, answers: Sequence[str], rows: Sequence[Row]) -> tuple[Words, Words]:
        self.ready()
        # The tokenizer drops an empty line and would lose count; a word of nobody keeps it.
        texts = [[text.strip() or "."] for text in answers]
        said = tokenise(texts, dialect=self.spoken)
        true = tokenise([row.target.references for row in rows], dialect=self.spoken)
        # In the order of the rows: the scorers pair by position.
        names = [str(number) for number in range(len(rows))]
        return {name: said[name] for name in names}, {name: true[name] for name in names}

    def tallies(self, rows: Sequence[Row]) -> Floats:
        """Return the description's CIDEr and one, for each row."""
        return np.array([[row.mark.score, 1.0] for row in rows], dtype=np.float64)
