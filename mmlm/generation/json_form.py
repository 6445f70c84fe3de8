"""Answers that are one JSON object and nothing else, whatever the model would rather say.

`JsonText` reads JSON letter by letter and says whether what came so far can still become an
object. `JsonForm` asks it about tokens, so that the one that is chosen never breaks the form.
What the object holds is the model's own: a schema is not known here.
"""

from __future__ import annotations

from copy import copy
from typing import Any

_SPACE = " \t\n\r"
_MOST_SPACE = 24
"""Longest run of spaces between two signs: a model must not stall in them."""

_DIGITS = "0123456789"
_HEX = "0123456789abcdefABCDEF"
_ENDS_NUMBER = ("zero", "whole", "fraction", "exponent")
_UNFINISHED = "\ufffd"

# From the state inside a number, by sign, to the next one.
_NUMBER = {
    "minus": {"0": "zero", **dict.fromkeys("123456789", "whole")},
    "zero": {".": "point", "e": "e", "E": "e"},
    "whole": {**dict.fromkeys(_DIGITS, "whole"), ".": "point", "e": "e", "E": "e"},
    "point": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {**dict.fromkeys(_DIGITS, "fraction"), "e": "e", "E": "e"},
    "e": {**dict.fromkeys(_DIGITS, "exponent"), "+": "sign", "-": "sign"},
    "sign": dict.fromkeys(_DIGITS, "exponent"),
    "exponent": dict.fromkeys(_DIGITS, "exponent"),
}


class JsonText:
    """The beginning of a JSON object.

    >>> text = JsonText()
    >>> [text.add(part) for part in ('{"a": [1', ', tr', 'ue]}')], text.complete
    ([True, True, True], True)
    >>> JsonText().add("[1]"), JsonText().add('{"a" 1')
    (False, False)
    """

    def __init__(self) -> None:
        self._state = "begin"
        self._open: tuple[str, ...] = ()
        self._left = ""
        self._spaces = 0
        self._is_key = False

    @property
    def complete(self) -> bool:
        """Whether the object is closed."""
        return self._state == "done"

    @property
    def in_string(self) -> bool:
        """Whether the next letter would stand between quotes."""
        return self._state == "string"

    def add(self, text: str) -> bool:
        """Read on; False if this cannot stand here, after which the object is of no use."""
        return all(self._sign(sign) for sign in text)

    def would_take(self, text: str) -> bool:
        """Whether this could stand next."""
        return copy(self).add(text)

    def _sign(self, sign: str) -> bool:
        if self._state in ("string", "escape", "code"):
            return self._in_string(sign)
        if self._state == "word":
            return self._in_word(sign)
        if self._state in _NUMBER:
            step = _NUMBER[self._state].get(sign)
            if step is not None:
                self._state = step
                return True
            if self._state not in _ENDS_NUMBER:
                return False
            self._state = "after"
        if sign in _SPACE and self._state not in ("begin", "done"):
            self._spaces += 1
            return self._spaces <= _MOST_SPACE
        self._spaces = 0
        return self._between(sign)

    def _between(self, sign: str) -> bool:
        """Read a sign that is neither in a string, a word nor a number."""
        state = self._state
        if state == "begin":
            return sign == "{" and self._enter("{")
        if state == "colon":
            self._state = "value"
            return sign == ":"
        if state in ("key", "first key"):
            if sign == '"':
                self._state, self._is_key = "string", True
                return True
            return sign == "}" and state == "first key" and self._leave("{")
        if state == "after":
            if sign == ",":
                self._state = "key" if self._open[-1] == "{" else "value"
                return True
            return sign in "}]" and self._leave("{" if sign == "}" else "[")
        if state in ("value", "first value"):
            return self._value(sign, may_close=state == "first value")
        return False

    def _value(self, sign: str, *, may_close: bool) -> bool:
        if sign in "{[":
            return self._enter(sign)
        if sign == "]":
            return may_close and self._leave("[")
        if sign == '"':
            self._state, self._is_key = "string", False
            return True
        words = {"t": "rue", "f": "alse", "n": "ull"}
        if sign in words:
            self._state, self._left = "word", words[sign]
            return True
        step = "minus" if sign == "-" else _NUMBER["minus"].get(sign)
        self._state = step or self._state
        return step is not None

    def _in_word(self, sign: str) -> bool:
        fits, self._left = sign == self._left[0], self._left[1:]
        if not self._left:
            self._state = "after"
        return fits

    def _in_string(self, sign: str) -> bool:
        if self._state == "escape":
            self._state, self._left = ("code", "xxxx") if sign == "u" else ("string", "")
            return sign in '"\\/bfnrtu'
        if self._state == "code":
            self._left = self._left[1:]
            self._state = "code" if self._left else "string"
            return sign in _HEX
        if sign == '"':
            self._state = "colon" if self._is_key else "after"
        elif sign == "\\":
            self._state = "escape"
        return ord(sign) >= 32

    def _enter(self, bracket: str) -> bool:
        self._open = (*self._open, bracket)
        self._state = "first key" if bracket == "{" else "first value"
        return True

    def _leave(self, bracket: str) -> bool:
        if self._open[-1] != bracket:
            return False
        self._open = self._open[:-1]
        self._state = "after" if self._open else "done"
        return True


class JsonForm:
    """Says which tokens may come next, and takes the one that was chosen.

    Args:
        tokenizer: Turns ids into text.
        stop_ids: Tokens that end a turn; they may not come before the object is closed.
    """

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._text = JsonText()
        self._ids: list[int] = []
        # Text of ids[context:known] was read; it is decoded again with what follows, because
        # many tokenizers write a token differently at the beginning of a text.
        self._context = 0
        self._known = 0

    @property
    def complete(self) -> bool:
        """Whether the object is closed."""
        return self._text.complete

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        if token in self._stop_ids:
            return self.complete
        new = self._new_text(token)
        if new.endswith(_UNFINISHED):  # the beginning of a letter that takes several tokens
            ahead = copy(self._text)
            return ahead.add(new.rstrip(_UNFINISHED)) and ahead.in_string
        return bool(new) and self._text.would_take(new)

    def add(self, token: int) -> None:
        """Take the token that was chosen."""
        new = self._new_text(token)
        self._ids.append(token)
        if not new.endswith(_UNFINISHED):
            self._text.add(new)
            self._context, self._known = self._known, len(self._ids)

    def _new_text(self, token: int) -> str:
        tail = self._ids[self._context :]
        before = self._decode(tail[: self._known - self._context])
        return self._decode([*tail, token])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
