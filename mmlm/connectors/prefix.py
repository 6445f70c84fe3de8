"""How many ordered tokens of a picture are shown: chosen when asking, and not when training.

    with visual_tokens(16):      # counting and computing agree inside
        ...

A connector whose tokens are ordered (`ConnectorConfig.ordered`) gives as many first ones as are
asked for. The choice holds for one thread and whatever it calls, so that a server answers one
visitor with 16 tokens and another with 256 from the same weights.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from mmlm.errors import ConfigError

if TYPE_CHECKING:
    from mmlm.connectors.base import ConnectorConfig

_CHOSEN: ContextVar[int | None] = ContextVar("visual_tokens", default=None)


@contextmanager
def visual_tokens(count: int | None) -> Generator[None]:
    """Show the first `count` tokens of each picture inside the block; None shows all."""
    before = _CHOSEN.set(count)
    try:
        yield
    finally:
        _CHOSEN.reset(before)


def num_shown(tokens: int) -> int:
    """Return how many of a picture's tokens are shown now."""
    chosen = _CHOSEN.get()
    return tokens if chosen is None else min(chosen, tokens)


def check_visual_tokens(count: int | None, connector: ConnectorConfig | None) -> None:
    """Refuse a number of tokens that the connector cannot give.

    Raises:
        ConfigError: if the connector's tokens are not ordered, or it has fewer.
    """
    if count is None:
        return
    if connector is None or not connector.ordered:
        what = "a stock class taken whole" if connector is None else f"connector {connector.use!r}"
        raise ConfigError(
            f"visual_tokens is {count}: the image tokens of {what} are not ordered by weight, so "
            f"that their first ones say little. Leave it out, or train `ordered_queries`."
        )
    most = int(getattr(connector, "tokens", count))
    if count > most:
        raise ConfigError(
            f"visual_tokens is {count}, and the connector gives {most}. Ask for 1 to {most}."
        )
