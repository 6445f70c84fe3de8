"""Names of tensors: from the layout of MMLM in memory to published layouts, and back.

A map is a list of prefix pairs, read both ways, so that what is written can always be read
again. A key that no pair covers is an error: a tensor is never dropped in silence. This module
knows strings and no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from mmlm.errors import CheckpointError

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class KeyMap:
    """Pairs of prefixes: ours on the left, theirs on the right. The first that fits is taken.

    Args:
        pairs: ``(ours, theirs)``; a prefix ends with a dot or is a whole key.
        optional: Prefixes of theirs that older or newer files put after the right side, such
            as ``vision_model.``; they are skipped while reading.
    """

    pairs: tuple[tuple[str, str], ...]
    optional: tuple[str, ...] = ()

    def to_theirs(self, state: Mapping[str, ValueT], *, origin: str) -> dict[str, ValueT]:
        """Rename our keys to theirs.

        Raises:
            CheckpointError: naming the keys that no pair covers.
        """
        return _rename(state, [(ours, theirs) for ours, theirs in self.pairs], origin)

    def to_ours(self, state: Mapping[str, ValueT], *, origin: str) -> dict[str, ValueT]:
        """Rename their keys to ours.

        Raises:
            CheckpointError: naming the keys that no pair covers.
        """
        pairs: list[tuple[str, str]] = []
        for ours, theirs in self.pairs:
            pairs.append((theirs, ours))
            for extra in self.optional:
                if theirs.endswith("." + extra):
                    pairs.append((theirs.removesuffix(extra), ours))
        return _rename(state, pairs, origin)


def _rename(
    state: Mapping[str, ValueT], pairs: Iterable[tuple[str, str]], origin: str
) -> dict[str, ValueT]:
    rules = list(pairs)
    renamed: dict[str, ValueT] = {}
    unknown: list[str] = []
    for key, value in state.items():
        for old, new in rules:
            if key.startswith(old):
                name = new + key.removeprefix(old)
                break
        else:
            unknown.append(key)
            continue
        if name in renamed:
            raise CheckpointError(
                f"{origin}: two tensors would both be called {name!r}; the second is {key!r}. "
                f"The folder mixes two layouts: download or save it again."
            )
        renamed[name] = value
    if unknown:
        raise CheckpointError(
            f"{origin}: {len(unknown)} of {len(state)} tensors have no place in the model: "
            f"{', '.join(sorted(unknown)[:5])}{' …' if len(unknown) > 5 else ''}. Nothing is "
            f"dropped in silence: take them out of the file, or load the folder with the class "
            f"that its config.json names."
        )
    return renamed


def compare_keys(
    given: Iterable[str], wanted: Iterable[str], *, origin: str, may_lack: Iterable[str] = ()
) -> None:
    """Refuse weights that lack a tensor or have one too many.

    Args:
        given: The keys that were read.
        wanted: The keys of the model.
        origin: The folder, for the message.
        may_lack: Keys that another tensor stands in for (tied weights).

    Raises:
        CheckpointError: naming some keys of each kind.
    """
    have, want = set(given), set(wanted)
    absent = sorted(want - have - set(may_lack))
    extra = sorted(have - want)
    if absent or extra:
        said = [
            f"{len(keys)} {kind}: {', '.join(keys[:4])}{' …' if len(keys) > 4 else ''}"
            for kind, keys in (("missing", absent), ("not known to the model", extra))
            if keys
        ]
        raise CheckpointError(
            f"{origin}: the tensors do not fit the model that config.json describes; "
            f"{'; '.join(said)}. Either config.json or the weights are from another model: "
            f"save or download the folder again."
        )
