"""Opening any picture as a person would expect to see it, or saying why it cannot be opened.

Handled: EXIF rotation, CMYK, palettes, transparency (over white), 16-bit and float grey,
animations (a frame), arrays; and, for whoever passes `readers`, DICOM, GeoTIFF and PDF. Refused
with the reason: files that are truncated, empty or no picture, and pictures with more pixels
than allowed, which is known from the header before anything is decoded. Without `readers`,
vector and script formats are never handed to an interpreter.

Obtaining bytes from somewhere else is not done here (see `mmlm.serving`), nor is resizing.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import contextmanager
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmlm.errors import ImageError, MMLMError
from mmlm.features import Size
from mmlm.images.planes import planes_size
from mmlm.images.readers import PictureConfig, PictureFile, ReaderConfig, Readers, split_reference
from mmlm.images.readers.base import refuse_number
from mmlm.images.readers.window import grey_bytes

if TYPE_CHECKING:
    from collections.abc import Generator

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any]"
"""What can be opened: a file, its bytes, or a picture that is in memory already."""

MAX_PIXELS = 89_478_485
"""Most pixels of a picture: a quarter of a gigabyte as RGB, the limit that Pillow warns at."""

MAX_SIDE_PX = 65_535
"""Longest side of a picture, that of JPEG: a strip beyond it is no picture for an encoder."""

FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP",
)  # fmt: skip
"""The formats that are opened. Formats that run code, such as EPS, are not among them."""

_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)
_WHITE = (255, 255, 255, 255)
_MISTAKES = (
    AssertionError, AttributeError, ImportError, NameError, NotImplementedError, TypeError,
)  # fmt: skip
# On damaged bytes these libraries raise such errors too, and only they do.
_DECODERS = frozenset({"PIL", "pydicom", "pypdfium2", "rasterio"})


def open_image(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, readers: Readers | None = None
) -> Image.Image:
    """Open a picture, upright and in RGB.

    Args:
        source: A file name, the bytes of a file, a PIL picture, or an array
            ``(height, width[, 1 | 3 | 4])`` of uint8, uint16, bool, or floats from 0 to 1.
            ``film.gif#frame=2`` and ``paper.pdf#page=3`` name a part of a file.
        max_pixels: Refuse larger pictures, before decoding them.
        readers: Readers of further kinds of files; None opens plain pictures alone, which is
            right for what strangers send.

    Raises:
        ImageError: if the picture cannot be opened, or is too large.
        MissingExtraError: if its reader needs a library that is not installed.
    """
    with _explained(source):
        file, reader = _reader_of(source, readers)
        if reader is not None and file is not None:
            _refuse_size(reader.size(file), source, max_pixels)
            return reader.image(file)
        with _header(source, max_pixels) as image:
            image.load()
            picture = _to_rgb(_upright(image), _grey_window(readers))
            return picture.copy() if picture is source else picture


def read_size(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, readers: Readers | None = None
) -> Size:
    """Read height and width, as `open_image` would return it, from the header alone.

    Raises:
        ImageError: if the header cannot be read, or promises a picture that is too large.
        MissingExtraError: if its reader needs a library that is not installed.
    """
    with _explained(source):
        array_size = planes_size(source)
        if array_size is not None:
            _refuse_size(array_size, source, max_pixels)
            return array_size
        file, reader = _reader_of(source, readers)
        if reader is not None and file is not None:
            size = reader.size(file)
            _refuse_size(size, source, max_pixels)
            return size
        with _header(source, max_pixels) as image:
            width, height = image.size
            return Size(width, height) if _orientation(image) in _LYING else Size(height, width)


def _reader_of(
    source: ImageSource, readers: Readers | None
) -> tuple[PictureFile | None, ReaderConfig | None]:
    """Return the file and the reader that knows its bytes, or None for Pillow."""
    if readers is None or not isinstance(source, str | os.PathLike | bytes):
        return None, None
    _stream(source)
    file = (
        PictureFile(source) if isinstance(source, bytes) else PictureFile(*split_reference(source))
    )
    return file, readers.reader_of(file)


def _grey_window(readers: Readers | None) -> str | tuple[float, float]:
    """Return how grey becomes bytes."""
    settings = None if readers is None else readers.by_name.get("picture")
    return settings.window if isinstance(settings, PictureConfig) else "full"


@contextmanager
def _header(source: ImageSource, max_pixels: int) -> Generator[Image.Image]:
    """Open a picture up to its header, and refuse one that is too large."""
    if isinstance(source, Image.Image):
        _refuse_size(_size_of(source), source, max_pixels)
        yield source
        return
    if isinstance(source, np.ndarray):
        image = _from_array(source)
        _refuse_size(_size_of(image), source, max_pixels)
        yield image
        return
    with Image.open(_stream(source), formats=FORMATS) as image:
        # The first frame is checked too: a later one is found by going through those before it.
        _refuse_size(_size_of(image), source, max_pixels)
        number = 0 if isinstance(source, bytes) else split_reference(source)[1]
        if number:
            refuse_number(number, getattr(image, "n_frames", 1), "frame")
            image.seek(number)
            _refuse_size(_size_of(image), source, max_pixels)
        yield image


def _size_of(image: Image.Image) -> Size:
    return Size(image.height, image.width)


def _stream(source: str | os.PathLike[str] | bytes) -> Any:
    """Return what Pillow opens, after the mistakes that Pillow would explain badly."""
    if isinstance(source, bytes):
        if not source:
            raise ImageError("The picture is empty: 0 bytes. Send the whole file.")
        return io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"A {type(source).__name__} cannot be opened as a picture. Give a file name, the "
            f"bytes of a file, a PIL picture or a numpy array."
        )
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        raise ImageError(
            f"{_name(source)} is an address, and addresses are not fetched here. Download the "
            f"picture and give its path or bytes."
        )
    path, _ = split_reference(source)
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(f"There is no picture at {path}. Check the path.") from None
    if S_ISDIR(facts.st_mode):
        raise ImageError(f"{path} is a folder. Name one picture in it.")
    if facts.st_size == 0:
        raise ImageError(f"{path} is empty: 0 bytes. Fetch the file again.")
    return path


def _refuse_size(size: Size, source: ImageSource, max_pixels: int) -> None:
    """Raise if a picture has no pixels, too many, or too many in a row."""
    height, width = size
    if not width or not height:
        raise ImageError(f"{_name(source)} has no pixels: {width} x {height}.")
    if width * height > max_pixels:
        raise ImageError(
            f"{_name(source)} has {width} x {height} pixels, more than the {max_pixels:,} that "
            f"are allowed. Shrink it first, or raise `max_pixels`."
        )
    if max(width, height) > MAX_SIDE_PX:
        raise ImageError(
            f"{_name(source)} has {width} x {height} pixels; the longest side that is opened is "
            f"{MAX_SIDE_PX:,}. Cut the strip into pieces first."
        )


@contextmanager
def _explained(source: ImageSource) -> Generator[None]:
    """Turn what a decoder raises on broken bytes into an `ImageError` with the cause.

    A mistake in the code of MMLM or of a reader is no damaged picture: it goes on as it is.
    """
    try:
        yield
    except MMLMError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{_name(source)} would unpack to more pixels than are safe ({error}). Shrink it first."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{_name(source)} is not a picture that can be opened. Known formats: "
            f"{', '.join(FORMATS)}. {_hint(source)}"
        ) from error
    except Exception as error:  # decoders raise anything at all on broken bytes
        if isinstance(error, _MISTAKES) and not _raised_in_a_decoder(error):
            raise
        raise ImageError(
            f"{_name(source)} is damaged or truncated: {_plain(error)}. Fetch the file again."
        ) from error


def _raised_in_a_decoder(error: Exception) -> bool:
    """Whether the innermost frame of an error is code of a library that decodes pictures."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in _DECODERS


def _hint(source: ImageSource) -> str:
    """Say what a file that is no picture seems to be."""
    if isinstance(source, bytes):
        start = source[:512]
    elif isinstance(source, str | os.PathLike):
        with split_reference(source)[0].open("rb") as file:
            start = file.read(512)
    else:
        return ""
    lower = start.lstrip().lower()
    if b"<svg" in lower:
        return "It is an SVG drawing; render it to PNG first."
    if lower.startswith((b"<!doctype", b"<html")):
        return "It is a web page: most often what a server sent in place of the picture."
    if b"ftypheic" in lower or b"ftypmif1" in lower or b"ftypheix" in lower:
        return "It is HEIC, as phones write it; convert it to JPEG first."
    if lower.startswith(b"%pdf"):
        return "It is a PDF; render its pages first."
    if start[128:132] == b"DICM":
        return "It is a DICOM file, which is not opened here; convert it to PNG first."
    return _beginning(start[:16])


def _beginning(start: bytes) -> str:
    """Show how a file begins, as text where it is text.

    >>> _beginning(b"hello"), _beginning(bytes(2))
    ('It begins with the text "hello".', 'It begins with the bytes 00 00.')
    """
    text = start.decode("utf-8", errors="replace").strip()
    if text and text.isprintable() and "\ufffd" not in text:
        return f'It begins with the text "{text}".'
    return f"It begins with the bytes {start.hex(' ')}."


def _plain(error: Exception) -> str:
    r"""Return a decoder's words without Python's way to write bytes.

    >>> _plain(SyntaxError("broken PNG file (chunk b'\\x00ID')"))
    "broken PNG file (chunk '\\x00ID')"
    """
    return re.sub(r"\bb(?=['\"])", "", str(error)) or type(error).__name__


def _name(source: ImageSource) -> str:
    """Name a source for a message."""
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        return text if len(text) <= 200 else text[:200] + "…"
    if isinstance(source, bytes):
        return f"The picture ({len(source):,} bytes)"
    return f"The picture ({type(source).__name__})"


def _orientation(image: Image.Image) -> int:
    """Read how the camera was held; broken EXIF counts as upright, as viewers do it."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata must not cost the picture
        return 1


def _upright(image: Image.Image) -> Image.Image:
    """Turn the picture as its EXIF says."""
    if _orientation(image) in range(2, 9):
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image, window: str | tuple[float, float] = "full") -> Image.Image:
    """Convert any mode to RGB; transparency is laid over white, as on a page."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    is_bytes = image.mode == "L" and "transparency" not in image.info
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or (is_bytes and window != "full"):
        return Image.fromarray(grey_bytes(np.asarray(image), window)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        picture = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        page = Image.new("RGBA", picture.size, _WHITE)
        return Image.alpha_composite(page, picture).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    """Make a picture of an array ``(height, width[, channels])``."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    flat = array.ndim == 2
    if array.size == 0 or not (flat or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"An array of shape {array.shape} is not a picture. Expected (height, width) or "
            f"(height, width, 3 or 4), channels last."
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.round(array / 257.0).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ImageError(
                f"A picture of floats must lie between 0 and 1 (got {array.min()} to "
                f"{array.max()}). Divide by 255, or give uint8."
            )
        array = np.round(array * 255.0).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(
            f"A picture cannot be made of {array.dtype}. Give uint8, uint16, bool, or floats "
            f"between 0 and 1."
        )
    return Image.fromarray(np.ascontiguousarray(array))
