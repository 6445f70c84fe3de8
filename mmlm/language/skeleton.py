r"""What a chat template does to a conversation, found out once for each shape.

The template is rendered with an unguessable word in place of each text. What stands between
the words is the template's own: the skeleton. From it and from renderings of the shorter
conversations follows, turn by turn, which characters the loss may cover:

    <|im_start|>user\n ‹text› <|im_end|>\n<|im_start|>assistant\n ‹text› <|im_end|> \n
                                                                └────── learnt ─────┘

An assistant turn begins where the generation prompt ends (so that training continues
exactly what inference will see) and ends with its end-of-turn token. A turn for which this
cannot be shown carries the reason instead. Nothing here tokenises or sees a real text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmlm.errors import TemplateError
from mmlm.language.template import Renderer
from mmlm.messages import Message, Text

_LEFT_PAD, _RIGHT_PAD = "\n\x0b\n", "\n\x0c\n"
_LEFT_TRIMS = (("", _LEFT_PAD), ("\n", "\x0b\n"), (None, ""))
_RIGHT_TRIMS = (("", _RIGHT_PAD), ("\n", "\n\x0c"), (None, ""))


class Slot(NamedTuple):
    """The place of one text: its message and part, and which white space the template trims.

    A trim is the characters that are removed: nothing (``""``), newlines, or (None) all white
    space.
    """

    message: int
    part: int
    left: str | None = ""
    right: str | None = ""

    def fill(self, text: str) -> str:
        """Return `text` as the template writes it here."""
        text = text if self.left == "" else text.lstrip(self.left)
        return text if self.right == "" else text.rstrip(self.right)


class Place(NamedTuple):
    """A place in a skeleton: so many characters into one of its literals."""

    literal: int
    offset: int


class Turn(NamedTuple):
    """What is known about one turn of a shape.

    Args:
        start: Where the words begin: the end of the generation prompt for an assistant turn,
            None where only the texts themselves count.
        stop: The end of its end-of-turn token, or None.
        end_of_turn: That token.
        doubt: Why the turn cannot be learnt, or None.
    """

    start: Place | None
    stop: Place | None
    end_of_turn: str | None
    doubt: str | None


@dataclass(frozen=True)
class Skeleton:
    """What the template writes around the texts of one shape of conversation.

    ``literals[k]`` stands before ``slots[k]``, and the last literal after the last slot.
    """

    literals: tuple[str, ...]
    slots: tuple[Slot, ...]
    turns: tuple[Turn, ...]


class SkeletonMaker:
    """Finds the skeletons of one template.

    Args:
        renderer: Renders the template.
        controls: Finds the tokens that may end a turn.
    """

    def __init__(self, renderer: Renderer, controls: re.Pattern[str]) -> None:
        self._render = renderer
        self._controls = controls
        self._nonce = secrets.token_hex(6)
        self._word = re.compile(rf"x{self._nonce}-(\d+)-(\d+)x")

    def word(self, message: int, part: int) -> str:
        """Return the word that stands for one text."""
        return f"x{self._nonce}-{message}-{part}x"

    def words(self, messages: Sequence[Message], left: str = "", right: str = "") -> list[Message]:
        """Return the conversation with a word in place of each text."""
        return [
            Message(
                message.role,
                tuple(
                    Text(f"{left}{self.word(number, index)}{right}")
                    if isinstance(part, Text)
                    else part
                    for index, part in enumerate(message.content)
                ),
            )
            for number, message in enumerate(messages)
        ]

    def make(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Skeleton:
        """Find the skeleton of the shape that `messages` have.

        Raises:
            TemplateError: if the template refuses the shape, or drops or repeats a turn.
        """
        words = self.words(messages)
        text = self._render(words, add_generation_prompt=add_generation_prompt)
        literals, slots = self._split(text)
        self._check_all_there(messages, slots)
        slots = self._trims(messages, literals, slots, add_generation_prompt)
        spans = self._render.with_markers(words)[1] if self._render.has_markers else None
        survey = _Survey(self._render, self._controls, words, text, literals, slots, self._word)
        turns = [survey.turn(number, spans) for number in range(len(messages))]
        return Skeleton(tuple(literals), tuple(slots), tuple(turns))

    def _split(self, text: str) -> tuple[list[str], list[Slot]]:
        pieces = self._word.split(text)
        slots = [
            Slot(int(message), int(part))
            for message, part in zip(pieces[1::3], pieces[2::3], strict=True)
        ]
        return pieces[0::3], slots

    def _check_all_there(self, messages: Sequence[Message], slots: Sequence[Slot]) -> None:
        for number, message in enumerate(messages):
            for index, part in enumerate(message.content):
                times = slots.count(Slot(number, index))
                if isinstance(part, Text) and times != 1:
                    does = "leaves out" if times == 0 else f"writes {times} times"
                    raise TemplateError(
                        f"The chat template {does} the text of turn {number} ({message.role}). "
                        f"Every text must stand once. "
                        f"Put the words elsewhere, such as into a user turn, or give another "
                        f"template."
                    )

    def _trims(
        self,
        messages: Sequence[Message],
        literals: Sequence[str],
        slots: Sequence[Slot],
        add_generation_prompt: bool,
    ) -> list[Slot]:
        """Find which white space the template trims, by rendering texts that have some."""
        try:
            padded = self._render(
                self.words(messages, _LEFT_PAD, _RIGHT_PAD),
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError:
            return list(slots)
        around, others = self._split(padded)
        if [slot[:2] for slot in others] != [slot[:2] for slot in slots]:
            return list(slots)
        lefts: list[str | None] = [""] * len(slots)
        rights: list[str | None] = [""] * len(slots)
        for index, literal in enumerate(literals):
            for right, kept in _RIGHT_TRIMS if index > 0 else (("", ""),):
                for left, held in _LEFT_TRIMS if index < len(slots) else (("", ""),):
                    if around[index] == kept + literal + held:
                        if index > 0:
                            rights[index - 1] = right
                        if index < len(slots):
                            lefts[index] = left
        return [
            slot._replace(left=left, right=right)
            for slot, left, right in zip(slots, lefts, rights, strict=True)
        ]


class _Survey:
    """Finds out, turn by turn, what of one shape may be learnt."""

    def __init__(
        self,
        render: Renderer,
        controls: re.Pattern[str],
        words: Sequence[Message],
        text: str,
        literals: Sequence[str],
        slots: Sequence[Slot],
        word: re.Pattern[str],
    ) -> None:
        self._marked = render.has_markers
        self._render, self._controls, self._word = render, controls, word
        self._words, self._text = words, text
        self._literals = literals
        self._slots = [slot[:2] for slot in slots]
        self._bounds = [match.span() for match in word.finditer(text)]

    def turn(self, number: int, spans: Sequence[tuple[int, int]] | None) -> Turn:
        """Survey one turn; `spans` are the template's own generation markers, if it has any."""
        message = self._words[number]
        own = [index for index, slot in enumerate(self._slots) if slot[0] == number]
        if not own:
            return Turn(None, None, None, "it holds no text")
        try:
            stop, end_of_turn = self._stop(number, own[-1])
            if message.role != "assistant":
                return Turn(None, stop, end_of_turn, None)
            if stop is None:
                return Turn(None, None, None, self._no_stop(own[-1]))
            start = self._start(number, own[0], spans)
        except TemplateError as error:
            return Turn(None, None, None, str(error))
        return Turn(start, stop, end_of_turn, None)

    def _start(self, number: int, slot: int, spans: Sequence[tuple[int, int]] | None) -> Place:
        """Find where an assistant turn begins: at its marker, or after the generation prompt."""
        before = self._bounds[slot][0]
        if spans is not None:
            for begin, end in spans:
                if begin <= before < end:
                    return self._place(self._with_blank(number, begin))
            raise TemplateError("the template's generation markers leave it out")
        if number == 0:
            return Place(slot, len(self._literals[slot]))
        earlier = self._words[:number]
        prompt = self._render(earlier, add_generation_prompt=True)
        if not self._text.startswith(prompt) or len(prompt) > before:
            raise TemplateError(
                "the template writes the turns before it differently once it has been answered "
                f"(the prompt for it ends in {prompt[-40:]!r}, the whole conversation reads "
                f"{self._text[max(0, before - 40) : before]!r} there), so training would not "
                "show the model what it sees when it answers"
            )
        gap = self._text[len(prompt) : before]
        if gap.strip() and prompt == self._render(earlier):
            raise TemplateError(
                f"the template writes {gap!r} before an answer and not when "
                f"`add_generation_prompt` is set, so the model would have to write it itself"
            )
        return self._place(len(prompt))

    def _with_blank(self, number: int, begin: int) -> int:
        """Move a marked beginning to the end of the generation prompt, over white space alone.

        ``ASSISTANT:`` prompts and the marker stands after a space: that space shares a token with
        the first word, which the model writes.
        """
        try:
            prompt = self._render(self._words[:number], add_generation_prompt=True)
        except TemplateError:
            return begin
        end = len(prompt)
        follows = self._text.startswith(prompt) and end <= begin
        return end if follows and not self._text[end:begin].strip() else begin

    def _stop(self, number: int, slot: int) -> tuple[Place | None, str | None]:
        """Find the end-of-turn token: a control token right after the words of the turn."""
        after = self._literals[slot + 1]
        tail, cut, ends = after, None, 0
        if number < len(self._words) - 1:
            try:
                cut = self._render(self._words[: number + 1])
            except TemplateError:
                pass
            else:
                own = [match for match in self._word.finditer(cut) if int(match[1]) == number]
                ends = own[-1].end() if own else len(cut)
                tail = self._word.split(cut[ends:])[0] if own else after
        blank = len(tail) - len(tail.lstrip())
        token = self._controls.match(tail, blank)
        if token is None:
            return None, None
        if not after.startswith(tail[: token.end()]):
            raise TemplateError(
                f"the template ends it with {tail[: token.end()]!r} when it is the last turn, and "
                f"with {after[: token.end() + 20]!r} when it is not"
            )
        if cut is not None and self._words[number].role == "assistant" and not self._marked:
            self._check_stays(cut[: ends + token.end()])
        return Place(slot + 1, token.end()), token.group()

    def _check_stays(self, alone: str) -> None:
        """Refuse a turn that reads otherwise once others follow it."""
        if self._text.startswith(alone):
            return
        pairs = enumerate(zip(alone, self._text, strict=False))
        same = next((index for index, (one, other) in pairs if one != other), 0)
        raise TemplateError(
            f"the template writes it differently when other turns follow: "
            f"{alone[max(0, same - 20) : same + 30]!r} becomes "
            f"{self._text[max(0, same - 20) : same + 30]!r}, so training would not show the model "
            f"what it sees when it answers"
        )

    def _no_stop(self, slot: int) -> str:
        return (
            f"the template writes {self._literals[slot + 1][:40]!r} after it, which does not begin "
            f"with a token of the tokenizer that ends a turn, so the model would never learn to "
            f"stop"
        )

    def _place(self, position: int) -> Place:
        """Turn a position in the rendered skeleton into a place in its literals."""
        begin = 0
        for index, (left, right) in enumerate(self._bounds):
            if position <= left:
                return Place(index, position - begin)
            begin = right
        return Place(len(self._bounds), position - begin)
