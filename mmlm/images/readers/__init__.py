"""Readers of pictures that are no plain picture files: which one reads a file is seen in its bytes.

    bytes ──► claims ──► size (from the header) ──► image ──► decode ──► plan ──► …
              └───────────── you are here ─────────────┘

`picture` holds the settings of ordinary files, which `mmlm.images.decode` opens with Pillow;
`dicom`, `geotiff` and `pdf` need a library each and say so when it is missing. To add one,
write one module here, register its config, and import it below. A file from a stranger is
never given to these readers: whoever opens it has to ask for them.
"""

from mmlm.images.readers.base import PictureFile as PictureFile
from mmlm.images.readers.base import ReaderConfig as ReaderConfig
from mmlm.images.readers.base import Readers as Readers
from mmlm.images.readers.base import all_readers as all_readers
from mmlm.images.readers.base import picture_readers as picture_readers
from mmlm.images.readers.base import split_reference as split_reference
from mmlm.images.readers.dicom import DicomConfig as DicomConfig
from mmlm.images.readers.geotiff import GeoTiffConfig as GeoTiffConfig
from mmlm.images.readers.pdf import PdfConfig as PdfConfig
from mmlm.images.readers.picture import PictureConfig as PictureConfig
