"""A stock processor behind the questions that MMLM asks of one.

How many tokens a picture takes is asked of the processor itself, on an empty picture of the
same size, once for each size: so rows are planned from headers alone, as everywhere. Pixels are
prepared picture by picture and joined for a batch. That both give what one call of the stock
processor gives is proven when the model is loaded (`mmlm.hub.whole`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from mmlm.errors import ConfigError, ImageError
from mmlm.features import Grid, Size
from mmlm.images import all_readers, open_image, read_size
from mmlm.messages import Message, images_of
from mmlm.processing import Encoded
from mmlm.whole.chat import SizedCount, WholeChat, placeholder_of

_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
_PER_SAMPLE = "batch_num_images"
"""LLaVA-OneVision shows a picture whole where it is not the only one of its sample."""

Look = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Tile:
    """One tile: as many patches as it has, in a row; where they lie is the processor's affair."""

    size: Size


@dataclass(frozen=True)
class _Plan:
    """The tiles of a picture."""

    tiles: tuple[_Tile, ...]


class _Policy:
    """What a stock processor opens."""

    readers = all_readers()


class _Facts:
    """What the encoder sees of a tile."""

    @staticmethod
    def out_grid(size: Size) -> Grid:
        """Return the patches of a `_Tile`."""
        return Grid(1, size.height, size.width)


class WholeImages:
    """What a stock processor makes of pictures.

    Args:
        stock: The stock processor.
        takes: The names that the model's forward pass takes.
    """

    def __init__(self, stock: Any, takes: frozenset[str]) -> None:
        self._stock, self._takes = stock, takes
        self._texts: dict[tuple[Size, int], tuple[str, _Plan]] = {}
        self.policy, self.facts = _Policy(), _Facts()
        self.placeholder = ""

    def to_json_string(self) -> str:
        """Return everything that says how pictures become pixels."""
        return str(self._stock.image_processor.to_json_string())

    @property
    def counter(self) -> WholeImages:
        """What counts the tokens of a picture from its size: the same object."""
        return self

    @property
    def needs_sizes(self) -> bool:
        """Whether the model must be told sizes beside what `look` gives: never."""
        return False

    def count(self, size: Size) -> SizedCount:
        """The number of tokens of a picture of this size."""
        text, _ = self._of_size(size, 1)
        ids = self._stock.tokenizer(text, add_special_tokens=False)["input_ids"]
        return SizedCount.of(len(ids), size)

    def plan(self, size: Size) -> _Plan:
        """The tiles of a picture of this size, as far as memory is concerned."""
        return self._of_size(size, 1)[1]

    def num_tiles(self, size: Size) -> int:
        """How many tiles a picture of this size costs."""
        return len(self.plan(size).tiles)

    def expand(self, size: Size, beside: int) -> str:
        """Return the text that stands for a picture, one of so many in its sample."""
        return self._of_size(size, beside)[0]

    def look(self, picture: Any) -> Look:
        """Open one picture and prepare it.

        Raises:
            ImageError: if the picture cannot be opened, or the processor refuses it.
        """
        image = open_image(picture, readers=self.policy.readers)
        try:
            return self._ask(image)[1]
        except (ValueError, ZeroDivisionError) as error:
            raise ImageError(
                f"The processor of this model does not take a picture of {image.width} by "
                f"{image.height} pixels: {error}"
            ) from None

    pixels = look

    def looks(self, pictures: Sequence[Any], alone: Sequence[Look] | None = None) -> list[Look]:
        """Return what the model takes for the pictures of one sample.

        Args:
            pictures: The pictures.
            alone: What `look` gave for each, if it was asked already.
        """
        found = [self.look(picture) for picture in pictures] if alone is None else list(alone)
        if len(pictures) < 2 or _PER_SAMPLE not in found[0]:
            return found
        opened = [open_image(picture, readers=self.policy.readers) for picture in pictures]
        return [self._ask(*opened)[1]]

    def join(self, looks: Sequence[Look], per_sample: Sequence[int]) -> dict[str, Tensor]:
        """Return what the model takes for the pictures of a batch, in reading order.

        Args:
            looks: What `look` gave for each picture.
            per_sample: How many pictures each sample has.
        """
        names = dict.fromkeys(name for look in looks for name in look)
        joined = {name: _cat([look[name] for look in looks]) for name in names}
        if _PER_SAMPLE in joined:
            joined[_PER_SAMPLE] = torch.tensor([count for count in per_sample if count])
        return joined

    def _of_size(self, size: Size, beside: int) -> tuple[str, _Plan]:
        """Return the text of a picture, and the tiles that it becomes."""
        key = (size, beside)
        if key not in self._texts:
            blank = Image.new("RGB", (size.width, size.height), (127, 127, 127))
            ids, look = self._ask(*[blank] * beside)
            text = self._stock.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            one = text[: len(text) // beside]
            if one * beside != text:
                raise ConfigError(
                    f"{type(self._stock).__name__} writes {beside} equal pictures differently "
                    f"({text[:80]!r}), so their tokens cannot be planned."
                )
            self._texts[key] = one, _plan_of(look.get("pixel_values"))
        return self._texts[key]

    def _ask(self, *pictures: Image.Image) -> tuple[list[int], Look]:
        """Let the stock processor prepare one sample of nothing but pictures."""
        # Nested, because some processors take a list of lists, and all take it.
        values: Any = self._stock(
            images=[list(pictures)], text=[self.placeholder * len(pictures)],
            add_special_tokens=False, return_tensors="pt",
        )  # fmt: skip
        look = {
            name: torch.as_tensor(value)
            for name, value in values.items()
            if name not in _OF_TEXT and name in self._takes
        }
        return values["input_ids"][0].tolist(), look


def _plan_of(pixels: Tensor | None) -> _Plan:
    """Read tiles and patches off what a processor made of a picture.

    Shapes:
        pixels: ``(…, tiles, channels, height, width)``, or ``(patches, numbers)``
    """
    if pixels is None or pixels.dim() < 4:
        patches = 1 if pixels is None else pixels.shape[0]
        return _Plan((_Tile(Size(1, int(patches))),))
    return _Plan((_Tile(Size(1, 1)),) * int(pixels.shape[-4]))


def _cat(values: Sequence[Tensor]) -> Tensor:
    """Join along the first axis; smaller ones are filled with zeros, as the processors do."""
    most = [max(value.shape[axis] for value in values) for axis in range(1, values[0].dim())]
    filled: list[Tensor] = []
    for value in values:
        lacking = [size - have for size, have in zip(most, value.shape[1:], strict=True)]
        padding = [number for lack in reversed(lacking) for number in (0, lack)]
        filled.append(pad(value, padding) if any(lacking) else value)
    return torch.cat(filled)


class WholeProcessor:
    """A stock processor, asked as MMLM's own is.

    Args:
        stock: A processor of `AutoProcessor`.
        takes: The names that the model's forward pass takes.
        image_token_id: What stands for one feature of a picture; asked of the processor when
            left out.

    Raises:
        ConfigError: if it names no image token, or has no fast tokenizer.
    """

    def __init__(
        self, stock: Any, *, takes: frozenset[str], image_token_id: int | None = None
    ) -> None:
        self.stock = stock
        self.tokenizer = stock.tokenizer
        self.image_processor = WholeImages(stock, takes)
        template = getattr(stock, "chat_template", None)
        placeholder = placeholder_of(stock, template)
        self.image_processor.placeholder = placeholder
        self.chat = WholeChat(
            self.tokenizer, template, placeholder=placeholder, expand=self.image_processor.expand
        )
        self.image_token = placeholder
        own = getattr(stock, "image_token_id", None) if image_token_id is None else image_token_id
        self.image_token_id = int(
            self.tokenizer.convert_tokens_to_ids(placeholder) if own is None else own
        )

    def size_of(self, picture: Any) -> Size:
        """The height and width of a picture (or of a `Size`), from its header."""
        readers = self.image_processor.policy.readers
        return picture if isinstance(picture, Size) else read_size(picture, readers=readers)

    def count_tokens(self, picture: Any) -> int:
        """The number of tokens of a picture (or of a `Size`), without reading pixels."""
        return self.image_processor.count(self.size_of(picture))

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        with_labels: bool = False,
        add_generation_prompt: bool = False,
        with_pixels: bool = True,
    ) -> Encoded:
        """Turn a conversation into ids, labels and what the model takes for its pictures.

        Raises:
            ImageError: if a picture cannot be opened.
            TemplateError: if labels were asked for and the loss mask cannot be proven.
        """
        pictures = images_of(messages)
        encoded = self.chat.encode(
            messages,
            image_tokens=[self.image_processor.count(self.size_of(one)) for one in pictures],
            add_generation_prompt=add_generation_prompt,
            with_labels=with_labels,
        )
        looks: Any = None
        if pictures and with_pixels:
            looks = self.image_processor.looks(pictures)
        return Encoded(encoded.ids, encoded.labels, looks, encoded.image_spans, encoded.text)

    def batch(self, prompts: Sequence[Encoded], model: Any) -> dict[str, Tensor]:
        """Pad prompts on the left, for generation.

        Shapes:
            input_ids, attention_mask: ``(prompts, longest)``
        """
        width = max(len(prompt.ids) for prompt in prompts)
        padding = self.tokenizer.pad_token_id
        padding = self.chat.stop_ids[0] if padding is None else padding
        ids = torch.tensor([[padding] * (width - len(p.ids)) + p.ids for p in prompts])
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts])
        inputs = {"input_ids": ids, "attention_mask": mask, **model.types(ids)}
        shown: list[Any] = [prompt.pixel_values or [] for prompt in prompts]
        looks = [look for one in shown for look in one]
        if looks:
            counts = [len(prompt.image_spans) for prompt in prompts]
            inputs |= self.image_processor.join(looks, counts)
        return {name: value.to(model.device) for name, value in inputs.items()}
