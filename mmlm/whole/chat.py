"""A conversation as a stock processor would tokenise it, with the labels of the loss.

A stock processor writes text where a picture stands: 576 placeholders, or rows and columns of
tiles with marks between them. That text is put in before anything is tokenised, so that the ids
are those of the stock processor to the last one; who wrote what, and what is learnt of it, is
found out as everywhere (`mmlm.language.chat`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmlm.errors import AlignmentError, ConfigError, TemplateError
from mmlm.features import Size
from mmlm.language import ChatFormat
from mmlm.language.chat import Encoded
from mmlm.language.script import Atom
from mmlm.messages import Message

Expand = Callable[[Size, int], str]
"""From the size of a picture, and the number of pictures beside it, to its text."""


class SizedCount(int):
    """How many tokens a picture takes when it is alone, and its size."""

    size: Size

    @classmethod
    def of(cls, count: int, size: Size) -> SizedCount:
        """Return a count that remembers the size."""
        counted = cls(count)
        counted.size = size
        return counted


class WholeChat(ChatFormat):
    """The chat format of a stock processor.

    Args:
        tokenizer: Its tokenizer.
        template: Its chat template; that of the tokenizer when left out.
        placeholder: What the template writes for a picture.
        expand: What the processor makes of it.
    """

    def __init__(
        self, tokenizer: Any, template: str | None, *, placeholder: str, expand: Expand
    ) -> None:
        super().__init__(tokenizer, template, image_token=placeholder)
        self._expand = expand

    def encode(
        self,
        messages: Sequence[Message],
        *,
        image_tokens: Sequence[int] = (),
        add_generation_prompt: bool = False,
        with_labels: bool = False,
    ) -> Encoded:
        """Encode a conversation; each of `image_tokens` is a `SizedCount`.

        Raises:
            AlignmentError: if the numbers of images differ.
            TemplateError: if the template refuses the conversation, or labels are asked for and
                cannot be proven.
        """
        if not image_tokens:
            return super().encode(
                messages, add_generation_prompt=add_generation_prompt, with_labels=with_labels
            )
        num_images = sum(len(message.images) for message in messages)
        if num_images != len(image_tokens):
            raise AlignmentError(
                f"The conversation holds {num_images} images, and sizes of {len(image_tokens)} "
                f"were given. Give one for each image, in reading order."
            )
        sizes = [count.size for count in image_tokens if isinstance(count, SizedCount)]
        texts = [self._expand(size, num_images) for size in sizes]
        rendered = self.render(messages, add_generation_prompt=add_generation_prompt)
        collides = any(self._controls.search(message.text) for message in messages)
        if with_labels or collides:
            atoms = self._atoms(messages, rendered, add_generation_prompt, with_labels)
        else:
            atoms = [Atom(rendered, None, False)]
        atoms, places = _expanded(atoms, self.image_token, texts)
        text = "".join(atom.text for atom in atoms)
        ids, offsets = self._tokenise_plain(atoms) if collides else self._tokenise(text)
        labels = self._labels(ids, offsets, text, atoms, collides) if with_labels else None
        # Where somebody wrote control tokens, offsets are those of another text: spans are empty.
        spans = [(0, 0) if collides else _tokens_of(offsets, *place) for place in places]
        if not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)):
            num = len(self._prefix)
            ids = [*self._prefix, *ids]
            labels = labels and [*[-100] * num, *labels]
            spans = [(first + num, last + num) for first, last in spans]
        return Encoded(ids, labels, spans, rendered)


def _expanded(
    atoms: Sequence[Atom], placeholder: str, texts: Sequence[str]
) -> tuple[list[Atom], list[tuple[int, int]]]:
    """Put the text of each picture in the place of its placeholder; say where it stands.

    Raises:
        TemplateError: if the template wrote more places than there are pictures, or fewer.
    """
    waiting, found, places, length = list(texts), list[Atom](), list[tuple[int, int]](), 0
    for atom in atoms:
        pieces = [atom.text] if atom.author is not None else atom.text.split(placeholder)
        whole = pieces[0]
        for piece in pieces[1:]:
            text = waiting.pop(0) if waiting else ""
            places.append((length + len(whole), length + len(whole) + len(text)))
            whole += text + piece
        found.append(atom._replace(text=whole))
        length += len(whole)
    if len(places) != len(texts):
        raise TemplateError(
            f"The chat template writes {len(places)} image placeholders for {len(texts)} images. "
            f"Put the images where it keeps them, such as into user turns."
        )
    return found, places


def _tokens_of(offsets: Sequence[tuple[int, int]], first: int, last: int) -> tuple[int, int]:
    """Return which tokens lie in a stretch of characters."""
    inside = [i for i, (begin, end) in enumerate(offsets) if begin < last and end > first]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def placeholder_of(processor: Any, template: str | None) -> str:
    """Return what the template of a stock processor writes for a picture.

    Raises:
        ConfigError: if the processor names no such token.
    """
    names = [getattr(processor, name, None) for name in ("boi_token", "image_token")]
    names.append(getattr(processor.tokenizer, "image_token", None))
    known = [str(name) for name in names if name]
    if not known:
        raise ConfigError(
            f"{type(processor).__name__} names no image token, so MMLM cannot tell where its "
            f"pictures stand. Tune this model with the tools of its own authors."
        )
    written = [name for name in known if template and name in template]
    return (written or known)[0]
