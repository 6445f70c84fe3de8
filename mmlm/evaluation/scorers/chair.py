"""CHAIR: which things does a description mention that are not in the picture?

Rohrbach et al. 2018, arXiv 1809.02156. Things are the 80 of COCO. The paper's list of other
words for them is not ours to ship: name its file as `synonyms` for numbers that can be
compared; without it, a short list of our own is used and the score says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from mmlm.errors import ConfigError, MissingExtraError
from mmlm.evaluation.scorers.base import Mark, Row, ScorerConfig, Target, scorers
from mmlm.evaluation.statistics import Floats

_OURS = """
person, man, woman, child, boy, girl, lady, guy, kid, baby, people, player, rider, skier, surfer
bicycle, bike
car, automobile, sedan
motorcycle, motorbike, scooter
airplane, plane, aircraft, jet
bus
train, locomotive
truck, lorry
boat, ship, sailboat, canoe
traffic light, stoplight
fire hydrant, hydrant
stop sign
parking meter
bench
bird, duck, goose, seagull, pigeon, owl, parrot
cat, kitten, kitty
dog, puppy
horse, pony, foal
sheep, lamb
cow, cattle, bull, calf
elephant
bear, panda
zebra
giraffe
backpack, rucksack
umbrella, parasol
handbag, purse
tie, necktie
suitcase, luggage
frisbee
skis, ski
snowboard
sports ball, ball
kite
baseball bat
baseball glove
skateboard
surfboard
tennis racket, racket, racquet
bottle
wine glass
cup, mug
fork
knife
spoon
bowl
banana
apple
sandwich, burger
orange
broccoli
carrot
hot dog
pizza
donut, doughnut
cake, cupcake
chair, stool
couch, sofa
potted plant, houseplant
bed
dining table, table, desk
toilet
tv, television
laptop
mouse
remote, remote control
keyboard
cell phone, phone, cellphone, smartphone
microwave
oven, stove
toaster
sink
refrigerator, fridge
book
clock
vase
scissors
teddy bear, teddy
hair drier, hairdryer, hair dryer
toothbrush
"""
# Two words that are another thing than the second of them.
_PAIRS = {"toilet seat": "toilet", "bow tie": "tie", "train track": "", "orange juice": ""}
_YOUNG = ("baby", "adult")
_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")


@lru_cache(maxsize=8)
def synonyms_of(path: str = "") -> Mapping[str, str]:
    """Return what each word or pair of words means, by its singular.

    Args:
        path: A file with a thing a line, its other words after it, separated by commas.

    Raises:
        ConfigError: if the file is not there or is another thing.
    """
    text = _OURS
    if path:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"scorer.synonyms: {path} cannot be read: {error}.") from None
    known: dict[str, str] = {}
    for line in text.strip().splitlines():
        words = [word.strip() for word in line.split(",") if word.strip()]
        known.update({word: words[0] for word in words if word not in known})
    if len(set(known.values())) < 2:
        raise ConfigError(
            f"scorer.synonyms: {path} must hold a thing a line, its other words after commas."
        )
    return known


def singular(word: str) -> str:
    """Return the singular of a noun.

    Raises:
        MissingExtraError: if textblob is not installed.
    """
    try:
        from textblob.en.inflect import singularize
    except ImportError:
        raise MissingExtraError(
            "textblob", needed_for="the singular of nouns", extra="eval"
        ) from None
    return str(singularize(word))


def things_in(text: str, synonyms: Mapping[str, str] | None = None) -> list[str]:
    """The things that a text mentions, in order, as often as it does.

    >>> things_in("A man riding a horse next to two dogs")
    ['person', 'horse', 'dog']
    >>> things_in("a baby elephant and an adult cat"), things_in("a toilet seat")
    (['elephant', 'cat'], ['toilet'])
    >>> things_in("glasses on a dining table, and a wine glass")
    ['dining table', 'wine glass']
    """
    known = synonyms_of() if synonyms is None else synonyms
    words = [_known_form(word, known) for word in _WORD.findall(text.lower())]
    things: list[str] = []
    place = 0
    while place < len(words):
        pair = " ".join(words[place : place + 2])
        if pair in _PAIRS or pair in known:
            thing = _PAIRS[pair] if pair in _PAIRS else known[pair]
            things += [thing] if thing else []
            place += 2
            continue
        young = words[place] in _YOUNG and place + 1 < len(words) and words[place + 1] in known
        if words[place] in known and not young:
            things.append(known[words[place]])
        place += 1
    return things


def _known_form(word: str, known: Mapping[str, str]) -> str:
    whole = word in known or word in _parts(tuple(known))
    return word if whole else singular(word)


@lru_cache(maxsize=8)
def _parts(names: tuple[str, ...]) -> frozenset[str]:
    """Return the words of which names of several words are made."""
    return frozenset(word for name in names if " " in name for word in name.split())


@scorers.register("chair")
class ChairConfig(ScorerConfig):
    """CHAIRi: the share of mentions of things that are not there; lower is better.

    A row's references are its five descriptions; its things stand in the column `objects`, or
    another that the setting names.
    """

    metric = "CHAIRi"
    lower_is_better = True
    is_share = False
    file_fields = ("synonyms",)

    objects: str = "objects"
    """The column that lists the things in the picture."""

    synonyms: str = ""
    """The paper's `synonyms.txt`; a short list of our own where it is left out."""

    def ready(self) -> None:
        """Fail if the words cannot be had."""
        synonyms_of(self.synonyms)
        singular("dogs")

    @property
    def label(self) -> str:
        """Name, list of words and version, for logs."""
        return f"{super().label}/{'paper' if self.synonyms else 'own'}-words"

    def mark(self, answer: str, target: Target) -> Mark:
        """1 if nothing is mentioned that is not there; the reading is what was mentioned."""
        said = things_in(answer, synonyms_of(self.synonyms))
        there = self._there(target)
        text = ", ".join(thing if thing in there else f"{thing} (not there)" for thing in said)
        nothing = "no thing" if answer.strip() else None
        wrong = any(thing not in there for thing in said)
        return Mark(float(bool(answer.strip()) and not wrong), text or nothing)

    def _there(self, target: Target) -> set[str]:
        known = synonyms_of(self.synonyms)
        listed = target.facts.get(self.objects) or ()
        there = {known.get(str(name).lower(), str(name).lower()) for name in listed}
        return there.union(*(things_in(text, known) for text in target.references))

    def fault(self, target: Target) -> str | None:
        """Refuse a row that does not say what is in the picture."""
        if not target.references and not target.facts.get(self.objects):
            return f"it has neither descriptions nor the column {self.objects!r}"
        return None

    def tallies(self, rows: Sequence[Row]) -> Floats:
        """For each row: mentions of what is not there, mentions."""
        return np.array([self._counts(row) for row in rows], dtype=np.float64)

    def _counts(self, row: Row) -> tuple[float, float]:
        read = row.mark.reading
        if read is None or read == "no thing":
            return 0.0, 0.0
        said = read.split(", ")
        return float(sum(thing.endswith(" (not there)") for thing in said)), float(len(said))

    def also(self, rows: Sequence[Row]) -> dict[str, float]:
        """CHAIRs (the share of descriptions with such a mention), and mentions a description."""
        counts = self.tallies(rows)
        return {
            "CHAIRs": float((counts[:, 0] > 0).mean()),
            "mentions_per_description": float(counts[:, 1].mean()),
        }
