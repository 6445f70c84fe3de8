"""Conversations that can be opened again by an address, for some hours.

    chat_ui ──► Links.put ──► ?talk=NAME ──► Links.get ──► a copy to go on from
                you are here

Nothing is written to disk: the words are kept in memory, the pictures are the visitor's uploads,
which the page deletes after the same time. Whoever has the address can read the conversation;
its name cannot be guessed.
"""

from __future__ import annotations

import copy
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from mmlm.serving.turns import ShownTurn, files_of

KEPT_SECONDS = 6 * 3600
"""How long uploads and links are kept."""

Talks = list[list[ShownTurn]]


class Links:
    """Keeps copies of conversations under names that nobody guesses.

    Args:
        most: Most conversations; the oldest leaves first.
        seconds: How long each is kept.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self, most: int = 200, seconds: float = KEPT_SECONDS, clock: Callable[[], float] = time.time
    ) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._guard = threading.Lock()
        self._kept: OrderedDict[str, tuple[float, Talks]] = OrderedDict()

    def put(self, talks: Sequence[Sequence[ShownTurn]]) -> str:
        """Keep a copy of a conversation with each model; returns its name."""
        name = secrets.token_urlsafe(16)
        with self._guard:
            self._kept[name] = (self._clock(), [copy.deepcopy(list(talk)) for talk in talks])
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> Talks | None:
        """Return a copy of a conversation; None if it, or a picture of it, is no longer kept."""
        with self._guard:
            made, talks = self._kept.get(name, (0.0, None))
            if talks is None or self._clock() - made > self._seconds:
                self._kept.pop(name, None)
                return None
            found = copy.deepcopy(talks)
        shown = [path for talk in found for turn in talk for path in files_of(turn)]
        return found if all(os.path.isfile(path) for path in shown) else None
