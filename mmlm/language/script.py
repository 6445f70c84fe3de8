"""Who wrote which stretch of a rendered conversation, and what of it is learnt.

`parted` fills a skeleton with the texts of one conversation and cuts the result into atoms:
stretches with one author each. Joined, they are the rendered text; that they are is checked by
whoever calls. Nothing here renders or tokenises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mmlm.errors import TemplateError
from mmlm.language.skeleton import Skeleton, Slot
from mmlm.messages import ImagePart, Message, Role, Text


class Atom(NamedTuple):
    """A stretch of rendered text: who wrote it (None: the template) and whether it is learnt."""

    text: str
    author: Role | None
    learnt: bool


def without_blank_parts(messages: Sequence[Message]) -> list[Message]:
    """Leave out texts of nothing but white space that stand beside other parts."""
    return [
        Message(
            message.role,
            tuple(p for p in message.content if isinstance(p, ImagePart) or p.text.strip())
            or message.content[:1],
            message.learn,
        )
        for message in messages
    ]


def text_at(messages: Sequence[Message], slot: Slot) -> str:
    """Return the text that belongs at a slot."""
    part = messages[slot.message].content[slot.part]
    assert isinstance(part, Text)
    return part.text


def joined(skeleton: Skeleton, bodies: Sequence[tuple[str, int]]) -> str:
    """Join literals and bodies; each body comes with what it takes from the literal before."""
    pieces = []
    for literal, (body, cut) in zip(skeleton.literals, bodies, strict=False):
        pieces += [literal[: len(literal) - cut], body]
    return "".join([*pieces, skeleton.literals[-1]])


def parted(
    skeleton: Skeleton,
    messages: Sequence[Message],
    bodies: Sequence[tuple[str, int]],
    learn: bool,
) -> list[Atom]:
    """Part a filled skeleton into stretches of one author, learnt or not.

    Raises:
        TemplateError: if a turn is to be learnt and cannot be.
    """
    heads: dict[int, int] = {}  # of each literal, how many characters at its head are learnt
    tails: dict[int, int] = {}  # and from which character on its tail is
    slots: set[int] = set()
    for number, message in enumerate(messages):
        if not (learn and message.learns):
            continue
        turn = skeleton.turns[number]
        if turn.doubt is not None:
            raise TemplateError(
                f"Turn {number} ({message.role}) cannot be learnt with this chat template: "
                f"{turn.doubt}. Mark the turn `learn: false`, make one sample for each answer, or "
                f"give another template."
            )
        own = [index for index, slot in enumerate(skeleton.slots) if slot.message == number]
        slots.update(own)
        if turn.start is not None:
            tails[turn.start.literal] = turn.start.offset
            heads |= {index: len(skeleton.literals[index]) for index in own[1:]}
        if turn.stop is not None:
            heads[turn.stop.literal] = turn.stop.offset
    atoms: list[Atom] = []
    for index, literal in enumerate(skeleton.literals):
        body, cut = bodies[index] if index < len(bodies) else ("", 0)
        literal = literal[: len(literal) - cut]
        head = heads.get(index, 0)
        tail = max(head, tails.get(index, len(literal)))
        for piece, learnt in (
            (literal[:head], True),
            (literal[head:tail], False),
            (literal[tail:], True),
        ):
            if piece:
                atoms.append(Atom(piece, None, learnt))
        if index < len(bodies):
            author = messages[skeleton.slots[index].message].role
            atoms.append(Atom(body, author, index in slots))
    return atoms
