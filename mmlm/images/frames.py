"""Opening clips: films by PyAV, animations by Pillow, and lists of pictures, frame by frame.

Only the frames that are wanted are kept. Where a clip comes from and who may name it is decided
elsewhere; a page or an API that strangers use hands no films on to this module.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from mmlm.errors import ImageError, MissingExtraError, MMLMError
from mmlm.features import Size
from mmlm.images.decode import MAX_PIXELS, open_image, read_size
from mmlm.images.readers import Readers
from mmlm.messages import Clip

if TYPE_CHECKING:
    from collections.abc import Generator

ANIMATIONS = (".gif", ".webp", ".png", ".apng", ".avif")
"""Films that Pillow opens, by the ends of their names."""


@dataclass(frozen=True)
class ClipFacts:
    """What is known of a clip before its frames are chosen."""

    size: Size
    """Height and width of its frames, upright."""

    num_frames: int
    """Frames that it has."""

    seconds: float | None = None
    """How long it is, if it says so."""


def clip_facts(clip: Clip, *, readers: Readers | None = None) -> ClipFacts:
    """Find out how many frames a clip has, how large, and how long it is.

    Raises:
        ImageError: if it cannot be opened, or its frames differ in size.
        MissingExtraError: if it is a film and PyAV is not installed.
    """
    source = clip.source
    if not isinstance(source, str | os.PathLike):
        frames = _listed(source)
        sizes = {read_size(frame, readers=readers) for frame in frames}
        if len(sizes) != 1:
            shown = ", ".join(f"{size.height} x {size.width}" for size in sorted(sizes)[:3])
            raise ImageError(
                f"The {len(frames)} frames of a clip have different sizes ({shown}). Frames of one "
                f"clip must be alike; give pictures of their own as pictures."
            )
        return ClipFacts(sizes.pop(), len(frames))
    with _explained(source):
        if os.fspath(source).lower().endswith(ANIMATIONS):
            with Image.open(source) as film:
                size = read_size(source, readers=readers)
                return ClipFacts(size, int(getattr(film, "n_frames", 1)))
        return _film_facts(os.fspath(source))


def open_frames(
    clip: Clip, chosen: Sequence[int], *, readers: Readers | None = None
) -> list[Image.Image]:
    """Open some frames of a clip, in RGB.

    Args:
        clip: The clip.
        chosen: Numbers of frames, growing, from 0.
        readers: Readers of further kinds of pictures, for lists of frames.

    Raises:
        ImageError: if it cannot be opened, or has fewer frames.
        MissingExtraError: if it is a film and PyAV is not installed.
    """
    source = clip.source
    if not isinstance(source, str | os.PathLike):
        frames = _listed(source)
        return [open_image(frames[number], readers=readers) for number in chosen]
    with _explained(source):
        if os.fspath(source).lower().endswith(ANIMATIONS):
            return [open_image(f"{os.fspath(source)}#frame={number}") for number in chosen]
        return _film_frames(os.fspath(source), chosen)


def _listed(source: Any) -> list[Any]:
    """Return the frames of a clip that is a list or an array of them."""
    frames = list(source)
    if not frames:
        raise ImageError("A clip has no frames. Name a film, or one picture or more.")
    return frames


def _film_facts(path: str) -> ClipFacts:
    av = _av()
    with av.open(path) as film:
        stream = _stream(film, path)
        first = next(film.decode(stream), None)
        if first is None:
            raise ImageError(f"{path} has no frame that can be decoded.")
        height, width = first.height, first.width
        if int(getattr(first, "rotation", 0) or 0) % 180:
            height, width = width, height
        if height * width > MAX_PIXELS:
            raise ImageError(f"A frame of {path} has {height * width:,} pixels; {MAX_PIXELS:,} may")
        seconds = None
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        elif film.duration:
            seconds = film.duration / av.time_base
    # Headers may say too much or nothing: the packets are counted, which decodes none of them.
    with av.open(path) as film:
        packets = film.demux(_stream(film, path))
        count = sum(1 for packet in packets if packet.size)
    return ClipFacts(Size(height, width), max(1, count), seconds)


def _film_frames(path: str, chosen: Sequence[int]) -> list[Image.Image]:
    wanted, found, last = set(chosen), dict[int, Image.Image](), -1
    with _av().open(path) as film:
        for number, frame in enumerate(film.decode(_stream(film, path))):
            last = number
            if number in wanted:
                turned = int(getattr(frame, "rotation", 0) or 0)
                picture = frame.to_image()
                found[number] = picture.rotate(turned, expand=True) if turned else picture
            if len(found) == len(wanted):
                break
    if not found:
        raise ImageError(f"{path} has {last + 1} frames that can be decoded; {list(chosen)} asked.")
    # A film cut off at its end has fewer frames than packets: the last one there stands for them.
    there = sorted(found)
    return [found.get(number, found[there[-1]]) for number in chosen]


def _stream(film: Any, path: str) -> Any:
    if not film.streams.video:
        raise ImageError(f"{path} holds no moving picture.")
    stream = film.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", needed_for="Opening a film", extra="video") from None
    return av


@contextmanager
def _explained(source: Any) -> Generator[None]:
    """Turn whatever a film raises into an error that names it."""
    try:
        yield
    except MMLMError:
        raise
    except Exception as error:  # PyAV and Pillow have many; a film that cannot be opened is one
        raise ImageError(f"The film {os.fspath(source)} cannot be opened: {error}") from error
