"""MMMU's open questions: what an answer says, and whether a reference is in it.

The rules are those of the benchmark's `eval_utils.py` (Yue et al. 2024, arXiv 2311.16502),
quirks included: "reddish" holds "red".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Said = str | float

_SIGNALS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_EDGES = ":,.!?;'"


def read_mmmu_open(answer: str) -> list[Said]:
    """Everything that an open answer may be saying: texts, and numbers rounded to two places.

    >>> read_mmmu_open("x = 8.004")
    [8.0]
    """
    answer = answer.strip().strip(".").lower()
    if not answer:
        return []
    parts = re.split(r"\.\s(?=[A-Z])|\n", answer)
    said: list[str] = []
    for number, part in enumerate(parts):
        # Only the last part may also follow an equals sign.
        signals = (*_SIGNALS, "=") if number == len(parts) - 1 else _SIGNALS
        tails = [part.split(signal)[-1].strip() for signal in signals if signal in part]
        if tails and (shortest := min(tails, key=len)).strip(_EDGES + " "):
            said.append(shortest)
    said = said or [answer]
    texts = [*said, *(number for text in said for number in _numbers(text))]
    return sorted({form for text in texts for form in _forms(text)}, key=_order)


def mmmu_open_right(said: Sequence[Said], references: Sequence[str]) -> bool:
    """Whether a reference is said: as a part of a text, or as an equal number.

    >>> for answer, truth in (("x = 8.004", "8"), ("1,234", "1234"), ("reddish", "red")):
    ...     print(mmmu_open_right(read_mmmu_open(answer), [truth]))
    True
    True
    True
    >>> mmmu_open_right(read_mmmu_open("it is red"), ["red"])
    True
    >>> mmmu_open_right(read_mmmu_open("6"), ["5"])
    False
    """
    wanted = [form for reference in references for form in _forms(reference)]
    for each in said:
        if isinstance(each, str):
            if any(isinstance(form, str) and form in each for form in wanted):
                return True
        elif each in wanted:
            return True
    return False


def _numbers(text: str) -> list[str]:
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def _forms(text: str) -> list[Said]:
    """Return a text as it is compared: a number rounded, one letter with spaces around it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _order(form: Said) -> tuple[bool, str]:
    return isinstance(form, str), str(form)
