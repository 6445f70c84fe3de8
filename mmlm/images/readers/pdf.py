"""The reader `pdf`: one page of a PDF, drawn on white by PDFium.

PDFium comes with pypdfium2 (Apache-2.0 or BSD-3-Clause), built without a script engine. It may be
called by one thread at a time, so a lock stands around it. What is embedded in a page is
unpacked without a limit that could be known beforehand: for files from people you trust.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, BinaryIO

from PIL import Image
from pydantic import Field

from mmlm.features import Size
from mmlm.images.readers.base import (
    PictureFile,
    ReaderConfig,
    picture_readers,
    refuse_number,
    require,
)

_POINTS_PER_INCH = 72
_HEADER_BYTES = 1024
_ONE_AT_A_TIME = threading.Lock()


@picture_readers.register("pdf")
class PdfConfig(ReaderConfig):
    """A page of a PDF; `paper.pdf#page=3` names the third, a plain path the first."""

    dpi: int = Field(default=150, ge=18, le=1200)
    """Pixels per inch of the page."""

    def claims(self, file: BinaryIO) -> bool:
        """Look for the mark of a PDF, which may stand behind a few other bytes."""
        return b"%PDF-" in file.read(_HEADER_BYTES)

    def size(self, file: PictureFile) -> Size:
        """Return the size of the page in pixels, turned as the page is."""
        with self._page(file) as page:
            width, height = page.get_size()
        scale = self.dpi / _POINTS_PER_INCH
        return Size(math.ceil(height * scale), math.ceil(width * scale))

    def image(self, file: PictureFile) -> Image.Image:
        """Draw the page."""
        with self._page(file) as page:
            bitmap = page.render(scale=self.dpi / _POINTS_PER_INCH)
            image: Image.Image = bitmap.to_pil().convert("RGB").copy()
            bitmap.close()
        return image

    @contextmanager
    def _page(self, file: PictureFile) -> Generator[Any]:
        pdfium = require("pypdfium2", needed_for="Opening a PDF", extra="pdf")
        with _ONE_AT_A_TIME:
            document = pdfium.PdfDocument(file.content)
            try:
                refuse_number(file.number, len(document), "page")
                page = document[file.number]
                try:
                    yield page
                finally:
                    page.close()
            finally:
                document.close()
