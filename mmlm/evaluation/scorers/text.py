"""Words: how a scorer brings an answer and a reference into one form.

Only what more than one scorer needs. The rules of a published benchmark stand with its
scorer, because their quirks are part of their definition.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

_ARTICLES = frozenset({"a", "an", "the"})
_NOT_A_WORD = re.compile(r"[^\w%$€£+#°.,/-]+|(?<!\d)[.,/-]|[.,/-](?!\d)|_")
_SIBILANT = re.compile(r"(?:s|x|z|ch|sh)es$")


def words_of(text: str) -> list[str]:
    """Split into lower-case words without punctuation and articles; numbers stay whole.

    An article that stands alone is no article but a letter or a name.

    >>> words_of("A photo of the RED panda, isn't it?")
    ['photo', 'of', 'red', 'panda', "isn't", 'it']
    >>> words_of("It costs $1,000.50 (a t-shirt).")
    ['it', 'costs', '$1,000.50', 't', 'shirt']
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold()
    text = text.replace("'", "\0")
    words = _NOT_A_WORD.sub(" ", text.replace("\0", "\u02bc")).replace("\u02bc", "'").split()
    words = [bare for word in words if (bare := word.strip("'"))]
    return [word for word in words if word not in _ARTICLES] or words


def singular(word: str) -> str:
    """Cut the plural off a word by rule; both sides of a comparison go through it.

    >>> [singular(word) for word in ("dogs", "buses", "berries", "glass", "is", "tomatoes")]
    ['dog', 'bus', 'berry', 'glass', 'is', 'tomato']
    """
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and (_SIBILANT.search(word) or word.endswith("oes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is", "'s")):
        return word[:-1]
    return word


def stems_of(text: str) -> list[str]:
    """Return the words of a text in the singular."""
    return [singular(word) for word in words_of(text)]


def plain(text: str) -> str:
    """Bring a text to one form: case, punctuation, articles and spaces do not matter.

    >>> plain("  The Red Panda. ") == plain("red panda")
    True
    """
    return " ".join(words_of(text))


def find(stems: list[str], name: list[str]) -> list[tuple[int, int]]:
    """Find where a name stands in a text, as whole words; ``icecream`` finds ``ice cream``.

    Returns:
        ``(start, end)`` in words, for every place.

    >>> find(stems_of("two ice creams"), stems_of("icecream"))
    [(1, 3)]
    >>> find(stems_of("a category"), stems_of("cat"))
    []
    """
    return [(start, end) for start, end, _ in windows(stems, {"".join(name)})]


def windows(stems: list[str], wanted: Iterable[str]) -> list[tuple[int, int, str]]:
    """Find every run of words that, written together, is one of the wanted; one pass for all.

    >>> windows(["red", "panda", "bear"], {"redpanda", "panda"})
    [(0, 2, 'redpanda'), (1, 2, 'panda')]
    """
    names = {name for name in wanted if name}
    longest = max(map(len, names), default=0)
    places: list[tuple[int, int, str]] = []
    for start in range(len(stems)):
        joined = ""
        for end in range(start, len(stems)):
            joined += stems[end]
            if len(joined) > longest:
                break
            if joined in names:
                places.append((start, end + 1, joined))
    return places


@lru_cache(maxsize=1 << 16)
def joined_stems(text: str) -> str:
    """Return the words of a text in the singular, written together."""
    return "".join(stems_of(text))
