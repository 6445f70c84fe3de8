"""From messages and pictures to the tensors that the model reads.

    messages, pictures ──► processing ──► input_ids, labels, pixel_values ──► modeling
                           you are here

The processor owns the tokenizer object, the chat format, and an image processor made of an
image policy and what was probed of the encoder. Placeholders are counted from image sizes
alone, without weights. It stands in a model folder as `processor_config.json` beside the
tokenizer, and is called like any transformers processor; `encode_chat` is what training,
generation and serving use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils.hub import cached_file

from mmlm.connectors import connectors
from mmlm.errors import AlignmentError, CheckpointError
from mmlm.features import ClipSize, Size
from mmlm.images import (
    Tile,
    clip_facts,
    cut_each,
    evenly,
    image_policies,
    normalise,
    open_frames,
    open_image,
    open_planes,
    read_size,
    video_policies,
)
from mmlm.language import IMAGE_TOKEN, ChatFormat
from mmlm.messages import Clip, Message, images_of
from mmlm.modeling.config import MMLMConfig, TokenCounter
from mmlm.reducers import reducers
from mmlm.vision import VisionFacts

FILE = "processor_config.json"
_RGB = 3


class MMLMImageProcessor(BaseImageProcessor):
    """Cuts pictures into tiles and normalises them for the encoder.

    Args:
        image: The image policy, as in a recipe.
        vision_facts: What was probed of the encoder.
        reducer: The reducer, as in a recipe, or None.
        connector: The connector, as in a recipe.
        video: The video policy, as in a recipe, or None.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        image: dict[str, Any] | None = None,
        vision_facts: dict[str, Any] | None = None,
        reducer: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        video: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image, self.vision_facts = image, vision_facts
        self.reducer, self.connector, self.video = reducer, connector, video

    @classmethod
    def from_config(cls, config: MMLMConfig) -> MMLMImageProcessor:
        """Make the image processor that belongs to a model's config."""
        parts = config.image, config.vision_facts, config.reducer, config.connector
        return cls(*parts, video=config.video)

    @property
    def counter(self) -> TokenCounter:
        """What counts the tokens of a picture from its size."""
        held = self.__dict__.get("_counter")
        if held is None:
            held = TokenCounter(
                image_policies.read(self.image, origin=f"{FILE}: image"),
                VisionFacts.from_dict(self.vision_facts or {}, origin=f"{FILE}: vision_facts"),
                None if self.reducer is None else reducers.read(self.reducer, origin=FILE),
                connectors.read(self.connector, origin=f"{FILE}: connector"),
                None if self.video is None else video_policies.read(self.video, origin=FILE),
            )
            self.__dict__["_counter"] = held
        return held

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `processor_config.json`."""
        return {
            "image_processor_type": type(self).__name__,
            "image": self.image,
            "vision_facts": self.vision_facts,
            "reducer": self.reducer,
            "connector": self.connector,
            **({} if self.video is None else {"video": self.video}),
        }

    def count_tokens(self, size: Size | ClipSize) -> int:
        """The number of placeholders of a picture or clip of this size."""
        return self.counter.count(size)

    def size_of(self, picture: Any) -> Size | ClipSize:
        """The size of a picture from its header; of a clip, with its tokens where some are dropped.

        Raises:
            ImageError: if it cannot be opened.
        """
        if isinstance(picture, Size | ClipSize):
            return picture
        counter = self.counter
        if not isinstance(picture, Clip):
            return read_size(picture, readers=counter.policy.readers)
        size, chosen = self._frames_of(picture)
        if not counter.num_mask(size):
            return size
        frames = open_frames(picture, chosen, readers=counter.policy.readers)
        return size._replace(kept=int(self._kept(frames, size).sum()))

    def _frames_of(self, clip: Clip) -> tuple[ClipSize, list[int]]:
        """Return the size of a clip, and which of its frames are taken."""
        facts, video = clip_facts(clip, readers=self.counter.policy.readers), self.counter.video
        count = self.counter.facts.frames
        if video is not None and count == 1:
            count = video.num_frames(facts.num_frames, facts.seconds)
        size = ClipSize(*facts.size, count)
        self.counter.plan(size)  # refuses clips for a model that takes none
        return size, evenly(facts.num_frames, count)

    def frames(self, clip: Clip) -> tuple[list[Any], ClipSize]:
        """Open the frames of a clip that are taken; returns them and the size of the clip."""
        size, chosen = self._frames_of(clip)
        return open_frames(clip, chosen, readers=self.counter.policy.readers), size

    def _look_at_clip(self, clip: Clip) -> tuple[Tensor, ClipSize]:
        """Open the frames of a clip that are taken; see `look`."""
        counter = self.counter
        frames, size = self.frames(clip)
        views = [
            [self._cut(frame, [tile], facts, counter.frame_policy.fill)[0] for frame, tile in each]
            for each, facts in self._views(frames, size)
        ]
        numbers = [view.reshape(-1) for frame in zip(*views, strict=True) for view in frame]
        if not counter.num_mask(size):
            return torch.cat(numbers), size
        kept = self._kept(frames, size)
        return torch.cat([*numbers, kept.float()]), size._replace(kept=int(kept.sum()))

    def _views(
        self, frames: Sequence[Any], size: ClipSize
    ) -> list[tuple[list[tuple[Any, Tile]], VisionFacts]]:
        """Return each encoder's facts, and its tile of each frame."""
        tiles = self.counter.plan(size).tiles[:1] * len(frames)
        return [
            (list(zip(frames, own, strict=True)), facts)
            for facts, own in _by_encoder(tiles, self.counter.facts)
        ]

    def _kept(self, frames: Sequence[Any], size: ClipSize) -> Tensor:
        """Say which tokens of a clip differ from those of the frame before; see `like_before`."""
        counter, video = self.counter, self.counter.video
        assert video is not None
        assert video.drop is not None
        each, facts = self._views(frames, size)[0]
        fill: Any = (0,) * facts.channels
        cut = [
            cut_each(frame, [tile], resample=facts.resample, fill=fill)[0] for frame, tile in each
        ]
        grid = counter.grid_of_clip(size)
        return new_places(torch.stack(list(cut)), (grid.rows, grid.columns), video.drop).flatten()

    def pixels(self, picture: Any) -> Tensor:
        """Open one picture, cut it into tiles and normalise them; see `look`."""
        return self.look(picture)[0]

    def look(self, picture: Any) -> tuple[Tensor, Size | ClipSize]:
        """Open one picture or clip, cut it into tiles and normalise them.

        Returns:
            ``(tiles, channels, height, width)``, or one row of numbers where tiles have sizes of
            their own, several encoders see them, or clips may be among them; and the size.

        Raises:
            ImageError: if the picture cannot be opened.
        """
        if isinstance(picture, Clip):
            return self._look_at_clip(picture)
        counter = self.counter
        channels = counter.facts.channels
        if channels == _RGB:
            image = open_image(picture, readers=counter.policy.readers)
        else:
            image = open_planes(picture, channels=channels)
        size = Size(image.height, image.width)
        tiles = counter.plan(size).tiles
        if not counter.is_flat:
            cut = self._cut(image, tiles, counter.facts)
            return (torch.stack(cut) if len(cut) > 1 else cut[0][None]), size
        views = [self._cut(image, own, facts) for facts, own in _by_encoder(tiles, counter.facts)]
        times = counter.facts.frames  # an encoder of clips sees a picture standing still
        tiled = [view.reshape(-1) for tile in zip(*views, strict=True) for view in tile]
        return torch.cat([view.repeat(times) for view in tiled] if times > 1 else tiled), size

    def _cut(
        self, image: Any, tiles: Sequence[Tile], facts: VisionFacts, outside: str | None = None
    ) -> list[Tensor]:
        """Cut tiles for one encoder, normalised as it wants them."""
        colour = outside or self.counter.policy.fill
        fill: Any = (int(colour == "near_black"),) * facts.channels
        if colour == "mean":
            # Cut off and not rounded, as LlavaImageProcessor does: padding is most of some
            # pictures.
            fill = tuple(int(value * 255) for value in facts.mean)
        return [
            normalise(tile, facts.mean, facts.std)
            for tile in cut_each(image, tiles, resample=facts.resample, fill=fill)
        ]

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Any, return_tensors: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Turn one picture, a list, or a list of lists into what the model takes."""
        return BatchFeature(self.together([self.look(picture) for picture in _flat(images)]))

    def together(self, looks: Sequence[tuple[Tensor, Size | ClipSize]]) -> dict[str, Tensor]:
        """Return what the model takes for pictures in reading order, given what `look` gave.

        ``pixel_values``, and ``image_sizes`` where the image policy needs them.
        """
        if not looks:
            return {}
        values = {"pixel_values": torch.cat([pixels for pixels, _ in looks])}
        return values | self.sizes([size for _, size in looks])

    def sizes(self, sizes: Sequence[Size | ClipSize]) -> dict[str, Tensor]:
        """Return ``image_sizes`` if the model needs them: ``(n, 2)``, or ``(n, 4)`` with clips."""
        if not sizes or not self.counter.needs_sizes:
            return {}
        rows = [list(size) for size in sizes]
        if self.counter.video is not None:
            rows = [row + [0] * (len(ClipSize._fields) - len(row)) for row in rows]
        return {"image_sizes": torch.tensor(rows)}


@dataclass(frozen=True)
class Encoded:
    """One conversation, ready for the model.

    Shapes:
        ids: ``tokens`` numbers, placeholders expanded
        labels: as many numbers, not shifted, -100 where nothing is learnt; None if not asked for
        pixel_values: ``(tiles, channels, height, width)``, or None without images
        image_spans: where the placeholders of each image begin and end
        image_sizes: heights and widths of the images
    """

    ids: list[int]
    labels: list[int] | None
    pixel_values: Tensor | None
    image_spans: list[tuple[int, int]]
    text: str
    image_sizes: tuple[Size | ClipSize, ...] = ()


class MMLMProcessor(ProcessorMixin):
    """Tokenizer, chat format and image processor of one model.

    Args:
        image_processor: Makes tiles and counts tokens.
        tokenizer: The language model's tokenizer, which knows ``<image>``.
        chat_template: Turns messages into a prompt; accepts text and image parts.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012
    image_processor_class = "MMLMImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: MMLMImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.chat = ChatFormat(tokenizer, chat_template)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=self.chat.template)

    def count_tokens(self, picture: Any) -> int:
        """The number of placeholders of a picture, clip or size; pixels are read only to drop."""
        return self.image_processor.count_tokens(self.size_of(picture))

    def size_of(self, picture: Any) -> Size | ClipSize:
        """The size of a picture or clip (or a size as it is)."""
        return self.image_processor.size_of(picture)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        with_labels: bool = False,
        add_generation_prompt: bool = False,
        with_pixels: bool = True,
    ) -> Encoded:
        """Turn a conversation into ids, labels and pixels.

        Raises:
            ImageError: if a picture cannot be opened.
            TemplateError: if labels were asked for and the loss mask cannot be proven.
        """
        pictures = images_of(messages)
        sizes = tuple(self.size_of(picture) for picture in pictures)
        encoded = self.chat.encode(
            messages,
            image_tokens=[self.image_processor.count_tokens(size) for size in sizes],
            add_generation_prompt=add_generation_prompt,
            with_labels=with_labels,
        )
        pixels = None
        if pictures and with_pixels:
            pixels = torch.cat([self.image_processor.pixels(picture) for picture in pictures])
        return Encoded(
            encoded.ids, encoded.labels, pixels, encoded.image_spans, encoded.text, sizes
        )

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare rendered prompts, as transformers' processors do: one ``<image>`` per image.

        Raises:
            AlignmentError: if the prompts name more or fewer images than were passed.
        """
        kwargs = {**kwargs.pop("text_kwargs", {}), **kwargs}
        for name in ("images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs", "videos"):
            kwargs.pop(name, None)
        pictures = _flat(images)
        data: dict[str, Any] = {}
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            counts = [self.count_tokens(picture) for picture in pictures]
            prompts = _expand(prompts, counts)
            data = dict(self.tokenizer(prompts, return_tensors=return_tensors, **kwargs))
        if pictures:
            data |= self.image_processor.preprocess(pictures)
        return BatchFeature(data, tensor_type=return_tensors if text is not None else None)

    @property
    def model_input_names(self) -> list[str]:
        """The names of the tensors that a call returns."""
        sizes = ["image_sizes"] if self.image_processor.counter.needs_sizes else []
        return [*self.tokenizer.model_input_names, "pixel_values", *sizes]

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Count placeholders by size; the name is transformers', whose backends ask for it."""
        sizes = [Size(*size) for size in image_sizes or ()]
        counter = self.image_processor.counter
        return {
            "num_image_tokens": [counter.count(size) for size in sizes],
            "num_image_patches": [len(counter.plan(size).tiles) for size in sizes],
        }

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: Any, **kwargs: Any
    ) -> list[str]:
        """Write tokenizer, chat template and `processor_config.json` into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        values = {
            "processor_class": type(self).__name__,
            "image_token": self.image_token,
            "image_processor": self.image_processor.to_dict(),
        }
        (folder / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(self.chat.template, encoding="utf-8")
        return [str(folder / FILE)]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> MMLMProcessor:
        """Read a processor from a folder or from the Hub.

        Raises:
            CheckpointError: if the folder holds no readable `processor_config.json`.
        """
        places = {
            key: kwargs[key]
            for key in ("revision", "subfolder", "cache_dir", "token", "local_files_only")
            if kwargs.get(key) is not None
        }
        name = str(pretrained_model_name_or_path)
        values = json.loads(_read_file(name, FILE, places) or "null")
        if not isinstance(values, dict) or "image_processor" not in values:
            raise CheckpointError(
                f"{name} has no {FILE} with an `image_processor`; an MMLM processor was expected. "
                f"Save the folder again with `Assistant.save`, or load it with `mmlm.load`."
            )
        settings = {k: v for k, v in values["image_processor"].items() if not k.endswith("_type")}
        tokenizer = AutoTokenizer.from_pretrained(name, **places)
        template = _read_file(name, "chat_template.jinja", places)
        return cls(MMLMImageProcessor(**settings), tokenizer, chat_template=template)


def _by_encoder(tiles: Sequence[Tile], facts: VisionFacts) -> list[tuple[VisionFacts, list[Tile]]]:
    """Return the tiles as each encoder sees them: the same boxes, at its own size."""
    views = [facts.views(tile.size) for tile in tiles]
    return [
        (view[0], [_at_size(tile, own[number][1]) for tile, own in zip(tiles, views, strict=True)])
        for number, view in enumerate(views[0])
    ]


def _at_size(tile: Tile, size: Size) -> Tile:
    """Return a tile for an encoder that takes another size; a window keeps its share."""
    if size == tile.size:
        return tile
    if tile.scaled is None:
        return Tile(tile.box, size)
    down, across = size.height / tile.size.height, size.width / tile.size.width
    scaled = Size(round(tile.scaled.height * down), round(tile.scaled.width * across))
    at = (round(tile.at[0] * down), round(tile.at[1] * across))
    return Tile(tile.box, size, Size(max(1, scaled.height), max(1, scaled.width)), at)


def new_places(tiles: Tensor, grid: tuple[int, int], least: float) -> Tensor:
    """Say where frames differ from those before them (VideoLLaMA 3, arXiv 2501.13106).

    The first frame is new everywhere, and every frame in one place at least.

    Shapes:
        tiles: ``(frames, channels, height, width)``, from 0 to 255
        returns: ``(frames, rows, columns)``, True where the mean difference is above `least`
    """
    moved = tiles.float().diff(dim=0).abs().mean(1, keepdim=True)
    change = torch.nn.functional.adaptive_avg_pool2d(moved, grid)[:, 0].flatten(1)
    new = change > least
    if len(new):
        new[torch.arange(len(new)), change.argmax(1)] = True
    return torch.cat([new.new_ones(1, new.shape[1]), new]).view(len(tiles), *grid)


def _read_file(name: str, file: str, places: dict[str, Any]) -> str | None:
    path = cached_file(
        name, file, **places, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if path is None else Path(path).read_text(encoding="utf-8")


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, list | tuple) and not isinstance(images, Size | ClipSize):
        return [picture for entry in images for picture in _flat(entry)]
    return [images]


def _expand(prompts: list[str], counts: list[int]) -> list[str]:
    """Repeat every ``<image>`` as often as its picture has tokens."""
    named = sum(prompt.count(IMAGE_TOKEN) for prompt in prompts)
    if named != len(counts):
        raise AlignmentError(
            f"The text names {named} images ({IMAGE_TOKEN}) but {len(counts)} were passed. "
            f"Write one {IMAGE_TOKEN} for each image, in the order of the images."
        )
    numbers = iter(counts)
    expanded: list[str] = []
    for prompt in prompts:
        first, *rest = prompt.split(IMAGE_TOKEN)
        expanded.append(first + "".join(IMAGE_TOKEN * next(numbers) + piece for piece in rest))
    return expanded
