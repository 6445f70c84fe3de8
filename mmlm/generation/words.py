"""Tokens one at a time into text that can be shown at once.

A token need not end with a letter: some scripts and emoji take several. And what might be the
beginning of a stop string must not be shown yet. `Words` holds both back until they are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that do not make a letter yet."""


class Words:
    """The text of an answer that is still growing.

    Args:
        tokenizer: Turns ids into text.
        stops: The text ends before the first of these strings.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.ended = False
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        # Text of ids[context:shown] is out already; it is decoded again with what follows,
        # because many tokenizers write a token differently at the beginning of a text.
        self._context = 0
        self._shown = 0
        self._held = ""

    def add(self, token: int) -> str:
        """Take one token; returns the text that is now sure, which may be empty."""
        if self.ended:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._shown])
        after = self._decode(self._ids[self._context :])
        if after.endswith(_UNFINISHED) or len(after) <= len(before):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return self._sure(after[len(before) :])

    def rest(self) -> str:
        """Return what was held back, at the end of the answer."""
        if self.ended:
            return ""
        before = self._decode(self._ids[self._context : self._shown])
        tail = self._decode(self._ids[self._context :])[len(before) :]
        self._context, self._shown = self._shown, len(self._ids)
        text = self._sure(tail)
        text, self._held = text + self._held, ""
        return text

    def _sure(self, text: str) -> str:
        """Hold back what may begin a stop string, and end at a whole one."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.ended = True
            sure, self._held = self._held[: min(places)], ""
            return sure
        doubtful = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - doubtful
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """How many last letters of `text` are first letters of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
