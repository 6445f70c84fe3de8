"""From a conversation to token ids, labels and image places: the house's only tokeniser call.

    messages ──► template ──► text ──► tokenizer ──► ids, labels, image spans

The tokens are those of a stock processor, which renders the template and tokenises the
result. Where a person's text holds the characters of a control token (``<image>``,
``<|im_end|>``), those characters stay text. The labels cover what the loss may see, proven
on the template for each shape of conversation (`mmlm.language.skeleton`) and checked against
the rendered text of every conversation. Labels are not shifted. Nothing here pads, batches or
opens an image.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from operator import le
from typing import Any

from mmlm.errors import AlignmentError, ConfigError, DataError, TemplateError
from mmlm.language.script import Atom, joined, parted, text_at, without_blank_parts
from mmlm.language.skeleton import Skeleton, SkeletonMaker, Turn
from mmlm.language.template import (
    IMAGE_TOKEN,
    Renderer,
    takes_parts,
    template_of,
    wrap_template,
)
from mmlm.language.tokens import PlainTwin, control_pattern
from mmlm.messages import Message, Text, assistant, user

NOT_LEARNT = -100
"""The label of a position that the loss does not cover."""
_MOST_SHAPES = 4096


@dataclass
class Encoded:
    """A conversation as the model reads it.

    Args:
        ids: Token ids, every image with as many placeholders as it has features.
        labels: For each token its id, or -100 where the loss does not look; not shifted. None
            if no labels were asked for.
        image_spans: Begin and end of each image in `ids`, in reading order.
        text: The rendered text, with one placeholder for each image.
    """

    ids: list[int]
    labels: list[int] | None = None
    image_spans: list[tuple[int, int]] = field(default_factory=list)
    text: str = ""


class ChatFormat:
    """Encodes conversations with one tokenizer and one chat template.

    Args:
        tokenizer: A fast tokenizer of transformers; it must hold the image token if images are
            to be encoded.
        template: A chat template; by default that of the tokenizer, or a plain one if it has
            none. It is wrapped (see `wrap_template`) unless it handles image parts by itself.
        image_token: The placeholder of an image.
        allow: Control tokens that people may write, such as ``<|box_start|>``.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        *,
        image_token: str = IMAGE_TOKEN,
        allow: Collection[str] = (),
    ) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ConfigError(
                f"{type(tokenizer).__name__} is a tokenizer without character offsets, from which "
                f"the loss mask cannot be proven. Use a fast tokenizer: a folder with a "
                f"tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.image_token = image_token
        source = template_of(tokenizer) if template is None else template
        renderer = Renderer(tokenizer, source)
        if not takes_parts(renderer, image_token):
            renderer = Renderer(tokenizer, wrap_template(source, image_token=image_token))
        self.template = renderer.template
        self._renderer = renderer
        self._is_stock = _is_stock(tokenizer)
        self._find_controls(source, frozenset(allow))
        self._prefix = self._find_prefix()
        self._skeletons: dict[tuple[Any, ...], Skeleton] = {}
        self._twin: PlainTwin | None = None
        self._stop_ids: tuple[int, ...] | None = None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render a conversation as text, with one placeholder for each image.

        Raises:
            TemplateError: if the template refuses the conversation.
        """
        return self._renderer(_full(messages), add_generation_prompt=add_generation_prompt)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        image_tokens: Sequence[int] = (),
        add_generation_prompt: bool = False,
        with_labels: bool = False,
    ) -> Encoded:
        """Encode a conversation.

        Args:
            messages: The conversation.
            image_tokens: For each image, how many placeholders it gets.
            add_generation_prompt: Whether to end with the head of an assistant turn.
            with_labels: Whether to find out what the loss covers.

        Raises:
            AlignmentError: if the numbers of images differ.
            DataError: if a text is not valid Unicode.
            TemplateError: if the template refuses the conversation, or labels are asked for and
                cannot be proven.
        """
        messages = _full(messages)
        num_images = sum(len(message.images) for message in messages)
        if num_images != len(image_tokens):
            raise AlignmentError(
                f"The conversation holds {num_images} images, and token counts for "
                f"{len(image_tokens)} were given. Give one count for each image, in reading order."
            )
        if any(count < 1 for count in image_tokens):
            raise AlignmentError(
                f"Every image needs at least one token (got {list(image_tokens)}). "
                f"Lower `model.reducer`, or leave the image out."
            )
        for number, message in enumerate(messages):
            _check_unicode(message.text, number)
        text = self._renderer(messages, add_generation_prompt=add_generation_prompt)
        collides = any(self._controls.search(message.text) for message in messages)
        if with_labels or collides:
            atoms = self._atoms(messages, text, add_generation_prompt, with_labels)
        else:
            atoms = [Atom(text, None, False)]
        ids, offsets = self._tokenise_plain(atoms) if collides else self._tokenise(text)
        labels = self._labels(ids, offsets, text, atoms, collides) if with_labels else None
        if not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)):
            ids = [*self._prefix, *ids]
            labels = labels and [*[NOT_LEARNT] * len(self._prefix), *labels]
        return self._with_images(Encoded(ids, labels, text=text), image_tokens)

    @property
    def image_token_id(self) -> int:
        """The id of the image placeholder.

        Raises:
            ConfigError: if the tokenizer does not hold it.
        """
        number = self.tokenizer.convert_tokens_to_ids(self.image_token)
        if number is None or self.tokenizer.convert_ids_to_tokens(number) != self.image_token:
            raise ConfigError(
                f"The tokenizer does not hold the image token {self.image_token!r}. "
                f"Add it with mmlm.language.add_image_token(tokenizer, model)."
            )
        return int(number)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the end-of-turn token of the template, and eos."""
        if self._stop_ids is None:
            stops = []
            try:
                shape = [user("a"), assistant("b")]
                stops.append(self._skeleton(shape, False).turns[1].end_of_turn)
            except TemplateError:
                pass
            ids = [self.tokenizer.convert_tokens_to_ids(stop) for stop in stops if stop]
            ids.append(self.tokenizer.eos_token_id)
            self._stop_ids = tuple(dict.fromkeys(int(one) for one in ids if one is not None))
        return self._stop_ids

    # What people wrote, what the template wrote, and what is learnt of it

    def _atoms(
        self, messages: Sequence[Message], text: str, add_generation_prompt: bool, learn: bool
    ) -> list[Atom]:
        """Part the rendered text into stretches, proven by joining them again."""
        for fresh in (False, True):
            skeleton = self._skeleton(messages, add_generation_prompt, fresh=fresh)
            bodies = [(slot.fill(text_at(messages, slot)), 0) for slot in skeleton.slots]
            if joined(skeleton, bodies) == text:
                return parted(skeleton, messages, bodies, learn)
        solid = without_blank_parts(messages)
        if (
            solid != messages
            and self._renderer(solid, add_generation_prompt=add_generation_prompt) == text
        ):
            return self._atoms(solid, text, add_generation_prompt, learn)
        bodies = [
            self._body(messages, skeleton, index, add_generation_prompt, learn)
            for index in range(len(skeleton.slots))
        ]
        if joined(skeleton, bodies) == text:
            return parted(skeleton, messages, bodies, learn)
        raise TemplateError(
            "The chat template writes this conversation differently from others of the same shape, "
            "so what people wrote cannot be told from what the template wrote. "
            f"Give another template, or leave the conversation out. It begins: {text[:200]!r}"
        )

    def _body(
        self,
        messages: Sequence[Message],
        skeleton: Skeleton,
        index: int,
        add_generation_prompt: bool,
        learn: bool,
    ) -> tuple[str, int]:
        """Find what the template made of one text, and how much it took from what is before it."""
        slot = skeleton.slots[index]
        text = text_at(messages, slot)
        words = self._maker.words(messages)
        known = [self._maker.word(*other[:2]) for other in skeleton.slots]
        parts = list(words[slot.message].content)
        parts[slot.part] = Text(text)
        words[slot.message] = Message(words[slot.message].role, tuple(parts))
        rendered = self._renderer(words, add_generation_prompt=add_generation_prompt)
        pieces = [piece for pair in zip(skeleton.literals, known, strict=False) for piece in pair]
        before = "".join(pieces[: 2 * index + 1])
        after = "".join([*pieces[2 * index + 2 :], skeleton.literals[-1]])
        start = skeleton.turns[slot.message].start
        gap = 0
        if start is not None and start.literal == index:
            gap = len(skeleton.literals[index]) - start.offset
        # A template that writes an empty reasoning block takes it back if the text brings one.
        for cut in (0, gap):
            head = before[: len(before) - cut]
            fits = len(rendered) >= len(head) + len(after)
            if fits and rendered.startswith(head) and rendered.endswith(after):
                body = rendered[len(head) : len(rendered) - len(after)]
                whole = body.strip() == text.strip() and body in text
                if whole or (cut == gap and not (learn and messages[slot.message].learns)):
                    return body, cut
        raise TemplateError(
            f"The chat template drops or rewrites words of turn {slot.message} "
            f"({messages[slot.message].role}), such as the reasoning of an earlier turn: "
            f"{text[:80]!r}. Mark the turn `learn: false`, make one sample for each answer, or "
            f"give a template that keeps the words."
        )

    def _skeleton(
        self, messages: Sequence[Message], add_generation_prompt: bool, *, fresh: bool = False
    ) -> Skeleton:
        shape = (
            add_generation_prompt,
            *((m.role, tuple(isinstance(part, Text) for part in m.content)) for m in messages),
        )
        skeleton = None if fresh else self._skeletons.get(shape)
        if skeleton is None:
            skeleton = self._maker.make(messages, add_generation_prompt=add_generation_prompt)
            skeleton = self._proven_on_tokens(skeleton)
            if len(self._skeletons) >= _MOST_SHAPES:
                self._skeletons.clear()
            self._skeletons[shape] = skeleton
        return skeleton

    def _proven_on_tokens(self, skeleton: Skeleton) -> Skeleton:
        """Doubt the turns whose prompt is tokenised differently once an answer follows it."""
        words = [(self._maker.word(*slot[:2]), 0) for slot in skeleton.slots]
        whole = self._tokenise(joined(skeleton, words))[0]
        turns: list[Turn] = []
        for turn in skeleton.turns:
            if turn.start is not None:
                literal, offset = turn.start
                head = "".join(
                    a + b[0] for a, b in zip(skeleton.literals[:literal], words, strict=False)
                )
                prompt = head + skeleton.literals[literal][:offset]
                ids = self._tokenise(prompt)[0]
                if whole[: len(ids)] != ids:
                    turn = turn._replace(
                        doubt=f"the prompt for it ends in {prompt[-20:]!r}, which the tokenizer "
                        f"reads differently once an answer follows, so training would not show "
                        f"the model what it sees when it answers"
                    )
            turns.append(turn)
        return Skeleton(skeleton.literals, skeleton.slots, tuple(turns))

    # Tokens

    def _tokenise(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if self._is_stock:
            backend = self.tokenizer.backend_tokenizer
            # What a call of the tokenizer would set; others may have asked it to cut or to pad.
            if backend.truncation is backend.padding is None and not backend.encode_special_tokens:
                # The call for several texts lets other threads run meanwhile; the other does not.
                (encoded,) = backend.encode_batch([text], add_special_tokens=False)
                return encoded.ids, encoded.offsets
        encoding = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            split_special_tokens=False,
            verbose=False,
        )
        return list(encoding["input_ids"]), list(encoding["offset_mapping"])

    def _tokenise_plain(self, atoms: Sequence[Atom]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenise so that control tokens in what people wrote stay plain text."""
        return self._plain_twin().encode("".join(self._renamed(atoms)))

    def _renamed(self, atoms: Sequence[Atom]) -> list[str]:
        """Give the control tokens that the template wrote their unguessable names."""
        names = self._plain_twin().names
        patterns = {None: self._controls_of_template, "assistant": self._speakable}
        return [
            pattern.sub(lambda found: names[found.group()], atom.text)
            if (pattern := patterns.get(atom.author)) is not None
            else atom.text
            for atom in atoms
        ]

    def _plain_twin(self) -> PlainTwin:
        if self._twin is None:
            self._twin = PlainTwin(self.tokenizer, self._control_tokens)
        return self._twin

    def _labels(
        self,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        text: str,
        atoms: Sequence[Atom],
        collides: bool,
    ) -> list[int]:
        """Label the tokens whose characters are learnt.

        A token that begins in the prompt and ends in the words (an answer that begins with a
        newline may share a token with the template's) belongs to the prompt.
        """
        pieces = self._renamed(atoms) if collides else [atom.text for atom in atoms]
        spans: list[tuple[int, int]] = []
        position = 0
        for atom, piece in zip(atoms, pieces, strict=True):
            end = position + len(piece)
            if atom.learnt and piece:
                if spans and spans[-1][1] == position:
                    spans[-1] = (spans[-1][0], end)
                else:
                    spans.append((position, end))
            position = end
        labels = [NOT_LEARNT] * len(ids)
        starts = [start for start, _ in offsets]
        if all(start < end for start, end in offsets) and all(map(le, starts, starts[1:])):
            for begin, end in spans:
                learnt = slice(bisect_left(starts, begin), bisect_left(starts, end))
                labels[learnt] = ids[learnt]
            return labels
        current = 0
        previous_end = 0
        for index, (start, end) in enumerate(offsets):
            # A lone space has an empty span after it when the tokenizer trims offsets.
            start = min(start, previous_end) if start == end else start
            previous_end = end
            while current < len(spans) and start >= spans[current][1]:
                current += 1
            if current < len(spans) and start >= spans[current][0]:
                labels[index] = ids[index]
        return labels

    def _with_images(self, encoded: Encoded, image_tokens: Sequence[int]) -> Encoded:
        """Repeat each image placeholder as often as the image has features."""
        if not image_tokens:
            return encoded
        image_id = self.image_token_id
        places = [index for index, number in enumerate(encoded.ids) if number == image_id]
        if len(places) != len(image_tokens):
            raise TemplateError(
                f"The chat template writes {len(places)} image placeholders for "
                f"{len(image_tokens)} images. Put the images where it keeps them, such as into "
                f"user turns, or give another template. It reads: {encoded.text[:200]!r}"
            )
        ids: list[int] = []
        labels: list[int] = []
        spans: list[tuple[int, int]] = []
        done = 0
        for place, count in zip(places, image_tokens, strict=True):
            ids += encoded.ids[done:place]
            spans.append((len(ids), len(ids) + count))
            ids += [image_id] * count
            if encoded.labels is not None:
                labels += [*encoded.labels[done:place], *[NOT_LEARNT] * count]
            done = place + 1
        ids += encoded.ids[done:]
        if encoded.labels is not None:
            labels += encoded.labels[done:]
        return Encoded(ids, labels if encoded.labels is not None else None, spans, encoded.text)

    def _find_controls(self, source: str, allow: frozenset[str]) -> None:
        """Find which tokens steer the model, and which of them an assistant may write."""
        added = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        special = {content for content, token in added.items() if token.special}
        special |= {self.image_token} & added.keys()
        written = {content for content in added if content in source} - special
        self._control_tokens = (special | written) - allow
        self._controls = control_pattern(self._control_tokens | {self.image_token})
        self._controls_of_template = control_pattern(self._control_tokens)
        stops = control_pattern((special | written) - {self.image_token})
        self._maker = SkeletonMaker(self._renderer, stops)
        # A reasoning block is the assistant's to write; the marks between turns are not.
        headers = self._headers()
        self._speakable = control_pattern(
            {token for token in written - allow if token not in headers}
        )

    def _headers(self) -> str:
        words = self._maker.words([user("a"), assistant("b")])
        try:
            prompt = self._renderer(words[:1], add_generation_prompt=True)
            whole = self._renderer(words)
        except TemplateError:
            return self._renderer.template
        return prompt + "\0" + whole[whole.rfind(self._maker.word(1, 0)) :]

    def _find_prefix(self) -> list[int]:
        """Find what the tokenizer puts before a text, most often a bos token."""
        plain = list(self.tokenizer("x", add_special_tokens=False)["input_ids"])
        full = list(self.tokenizer("x")["input_ids"])
        for begin in range(len(full) - len(plain) + 1):
            if full[begin : begin + len(plain)] == plain:
                return full[:begin]
        return []


def _is_stock(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer does no more than its backend, which is twice as fast."""
    from transformers import PreTrainedTokenizerFast

    stock: Any = PreTrainedTokenizerFast
    names = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding")
    return all(getattr(type(tokenizer), n, None) is getattr(stock, n) for n in names)


def _check_unicode(text: str, number: int) -> None:
    """Refuse text that no tokenizer reads: half of a character that needs two."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"Turn {number} holds half a character ({text[error.start]!r} at {error.start}), which "
            f"is not valid Unicode. Read the file as UTF-8, or leave the row out."
        ) from None


def _full(messages: Sequence[Message]) -> list[Message]:
    """Give turns without any content an empty text, so that they have a place."""
    return [
        message if message.content else Message(message.role, (Text(""),), message.learn)
        for message in messages
    ]
