"""The reader `dicom`: X-rays, CT, MR and other pictures of medicine, through pydicom.

Stored values go through the modality's scale (to Hounsfield units, for CT) and a window (DICOM
PS3.3, C.11.1 and C.11.2) and become grey; MONOCHROME1 is turned, so that white is white. Colour is
brought to RGB. Only files with the 128 bytes of preamble and the mark DICM are known.
Names and dates of patients are not read; text that is burnt into the pixels stays there.
"""

from __future__ import annotations

from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from mmlm.errors import ImageError
from mmlm.features import Size
from mmlm.images.readers.base import (
    PictureFile,
    ReaderConfig,
    picture_readers,
    refuse_number,
    require,
)
from mmlm.images.readers.window import Array, between

_PREAMBLE_BYTES = 128
_NEEDED_FOR = "Opening a DICOM file"


@picture_readers.register("dicom")
class DicomConfig(ReaderConfig):
    """DICOM; `scan.dcm#frame=3` names the fourth frame, a plain path the first."""

    window: Literal["file", "spread"] | tuple[float, float] = Field(default="file")
    """How grey becomes bytes: file takes the window that the file names first and spreads where
    there is none, spread goes from the least to the greatest value, [level, width] is in the
    units of the modality, such as [40, 400] for soft tissue in CT."""

    def claims(self, file: BinaryIO) -> bool:
        """Look for the mark behind the preamble."""
        return file.read(_PREAMBLE_BYTES + 4)[_PREAMBLE_BYTES:] == b"DICM"

    def size(self, file: PictureFile) -> Size:
        """Return rows and columns, without reading the pixels."""
        pydicom = require("pydicom", needed_for=_NEEDED_FOR, extra="dicom")
        with file.open() as opened:
            header = pydicom.dcmread(opened, stop_before_pixels=True)
        if not _says(header, "Rows") or not _says(header, "Columns"):
            raise ImageError(
                "The DICOM file holds no picture: it has no rows and columns. Leave it out."
            )
        refuse_number(file.number, _frames(header), "frame")
        return Size(int(_first(header, "Rows")), int(_first(header, "Columns")))

    def image(self, file: PictureFile) -> Image.Image:
        """Decode one frame."""
        require("pydicom", needed_for=_NEEDED_FOR, extra="dicom")
        from pydicom import dcmread
        from pydicom.pixels import apply_color_lut, pixel_array  # pyright: ignore[reportUnknownVariableType]

        with file.open() as opened:
            dataset: Any = dcmread(opened)
        refuse_number(file.number, _frames(dataset), "frame")
        values: Array = pixel_array(dataset, index=file.number)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            values = apply_color_lut(values, dataset)
        if values.ndim == 3:
            return Image.fromarray(_eight_bits(values)).convert("RGB")
        grey = _grey(values, dataset, self.window)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            grey = 255 - grey
        return Image.fromarray(grey).convert("RGB")


def _eight_bits(values: Array) -> Array:
    if values.dtype == np.uint16:
        return np.round(values / 257.0).astype(np.uint8)
    return np.ascontiguousarray(values.astype(np.uint8))


def _grey(stored: Array, dataset: Any, window: str | tuple[float, float]) -> Array:
    """Map stored values of one frame onto bytes."""
    from pydicom.pixels import apply_modality_lut  # pyright: ignore[reportUnknownVariableType]

    values: Array = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
    if isinstance(window, tuple):
        return _linear(values, *window)
    if window == "file" and dataset.get("VOILUTSequence"):
        return _by_table(values, dataset)
    if window == "file" and all(_says(dataset, name) for name in ("WindowCenter", "WindowWidth")):
        level, width = _first(dataset, "WindowCenter"), _first(dataset, "WindowWidth")
        return _shaped(values, level, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
    inside = values
    if _says(dataset, "PixelPaddingValue"):
        kept = values[stored != int(_first(dataset, "PixelPaddingValue"))]
        inside = kept if kept.size else values
    return between(values, float(inside.min()), float(inside.max()))


def _shaped(values: Array, level: float, width: float, shape: str) -> Array:
    """Apply a window in the shape that the file names (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    if shape == "SIGMOID":
        return np.round(255.0 / (1.0 + np.exp(-4.0 * (values - level) / width))).astype(np.uint8)
    if shape == "LINEAR_EXACT":
        return between(values, level - width / 2, level + width / 2)
    return _linear(values, level, width)


def _linear(values: Array, level: float, width: float) -> Array:
    """Apply DICOM's own window, whose ends lie half a unit aside."""
    low = level - 0.5 - (width - 1) / 2
    if width <= 1:
        return np.where(values > level - 0.5, 255, 0).astype(np.uint8)
    return between(values, low, low + width - 1)


def _by_table(values: Array, dataset: Any) -> Array:
    """Look grey up in the first table of the file."""
    from pydicom.pixels import apply_voi  # pyright: ignore[reportUnknownVariableType]

    looked_up: Array = apply_voi(values.astype(np.int64), dataset, index=0)
    bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
    return between(looked_up.astype(np.float64), 0.0, float(2**bits - 1))


def _frames(dataset: Any) -> int:
    return int(_first(dataset, "NumberOfFrames")) if _says(dataset, "NumberOfFrames") else 1


def _says(dataset: Any, name: str) -> bool:
    """Whether a file gives a value by this name; many leave it there and empty."""
    return dataset.get(name) not in (None, "")


def _first(dataset: Any, name: str) -> float:
    """Return the number that a file gives by this name, or the first of several."""
    value = dataset.get(name)
    is_one = hasattr(value, "__float__") or isinstance(value, str | bytes)
    several: list[Any] = [value] if is_one else list(value or ())
    if not several or several[0] is None:
        raise ImageError(f"The DICOM file is damaged: its {name} is empty. Fetch it again.")
    return float(several[0])
