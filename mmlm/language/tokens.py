"""Special tokens in text that people wrote: how they are kept plain text.

A tokenizer turns the characters ``<|im_end|>`` into a control token wherever they stand. For
conversations in which somebody wrote such characters, this module makes a twin of the
tokenizer in which every control token answers to an unguessable name instead. What the
template writes is renamed before the twin reads it; what people write is not, and is
tokenised together with its neighbours as the ordinary text that it is. Nothing here knows
templates or labels.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterable
from typing import Any

from mmlm.errors import ConfigError


def control_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of `tokens`, the longest first; none if there are none."""
    longest_first = sorted(set(tokens) - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class PlainTwin:
    """A twin of a tokenizer in which control tokens have unguessable names.

    Args:
        tokenizer: A fast tokenizer.
        controls: The tokens to rename.
    """

    def __init__(self, tokenizer: Any, controls: Collection[str]) -> None:
        from tokenizers import Tokenizer

        nonce = secrets.token_hex(8)
        ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in controls}
        self.names = {token: f"<{nonce}:{number}>" for token, number in ids.items()}
        source = json.loads(tokenizer.backend_tokenizer.to_str())
        # A character without a token becomes the unknown token: that is no forgery.
        self._controls = frozenset(ids.values()) - {_unknown_id(source["model"], ids)}
        self._twin = Tokenizer.from_str(json.dumps(_renamed(source, self.names)))
        self._original = {
            self._twin.token_to_id(name): ids[token] for token, name in self.names.items()
        }

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenise text whose control tokens have been renamed.

        Args:
            text: Text in which the template's control tokens stand under `names`.

        Returns:
            Token ids of the original tokenizer, and the characters that each covers.

        Raises:
            ConfigError: if the tokenizer makes a control token out of plain text.
        """
        encoding = self._twin.encode(text, add_special_tokens=False)
        ids = [self._original.get(token, token) for token in encoding.ids]
        found = sum(token in self._controls for token in ids)
        meant = sum(
            text.count(name)
            for name in self.names.values()
            if self._original[self._twin.token_to_id(name)] in self._controls
        )
        if found != meant:
            raise ConfigError(
                f"The tokenizer made {found} control tokens of a text that holds {meant}: "
                f"it builds some of them out of plain text, so text that people wrote cannot be "
                f"kept plain. Remove special tokens from the text, or use another tokenizer."
            )
        return ids, list(encoding.offsets)


def _renamed(source: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Rename control tokens in a serialised tokenizer; nothing else about it changes."""
    model = dict(source["model"])
    merged = {"".join(_pair(merge)) for merge in model.get("merges", ())}
    rename = {token: name for token, name in names.items() if token not in merged}
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {rename.get(token, token): number for token, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[rename.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in rename:
        model["unk_token"] = rename[model["unk_token"]]
    added = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in source["added_tokens"]
    ]
    return {
        **source,
        "model": model,
        "added_tokens": added,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _unknown_id(model: dict[str, Any], ids: dict[str, int]) -> int | None:
    """Return the id of the unknown token of a serialised model, if it has one."""
    number = model.get("unk_id")
    return int(number) if number is not None else ids.get(model.get("unk_token") or "")


def _pair(merge: str | list[str]) -> list[str]:
    """Read a merge rule in either of the two forms that tokenizer files hold."""
    return merge.split(" ") if isinstance(merge, str) else merge
