"""From anybody's files to exact, packed batches.

    files ──► sources ──► mixture ──► planning ──► packing ──► pipeline ──► collate ──► training
              └───────────────────── you are here ─────────────────────┘

A source gives rows by number, a mixture says which row stands where, planning knows a
sample's length from headers alone, packing fills rows, the pipeline decodes ahead of the
trainer. What cannot be used is counted by cause in `quarantine`, and never replaced. No
module here computes with a model. A new source: one module, registered in `base.sources`.
"""

from mmlm.data.base import Source as Source
from mmlm.data.base import SourceConfig as SourceConfig
from mmlm.data.base import sources as sources
from mmlm.data.mixture import Mixture as Mixture
from mmlm.data.mixture import Share as Share
from mmlm.data.mixture import open_mixture as open_mixture
from mmlm.data.mixture import read_mixture as read_mixture
from mmlm.data.packing import Packer as Packer
from mmlm.data.packing import PackingConfig as PackingConfig
from mmlm.data.pairs import PairsConfig as PairsConfig
from mmlm.data.quarantine import Quarantine as Quarantine
from mmlm.data.schema import CAUSES as CAUSES
from mmlm.data.schema import BadRowError as BadRowError
from mmlm.data.schema import Drop as Drop
from mmlm.data.schema import Sample as Sample
from mmlm.data.sources_arrow import ArrowConfig as ArrowConfig
from mmlm.data.sources_arrow import ParquetConfig as ParquetConfig
from mmlm.data.sources_built import BuiltConfig as BuiltConfig
from mmlm.data.sources_files import FileSource as FileSource
from mmlm.data.sources_folder import FolderConfig as FolderConfig
from mmlm.data.streams import StreamSource as StreamSource
from mmlm.data.streams_hub import HubConfig as HubConfig
from mmlm.data.streams_tar import WebDatasetConfig as WebDatasetConfig
