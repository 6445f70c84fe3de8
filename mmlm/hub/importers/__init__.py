"""Checkpoints of other projects, by the names that they gave their tensors.

    folder ──► recognise ──► Foreign: parts, key map, notes ──► build ──► model, processor

Each module knows one project's config and names, and says what of it MMLM has no part for. A
tensor without a place is an error that lists it. Pickled files are opened with weights-only
loading, which runs no code.
"""

from mmlm.hub.importers.base import Foreign as Foreign
from mmlm.hub.importers.base import Layout as Layout
from mmlm.hub.importers.base import layout_of as layout_of
from mmlm.hub.importers.base import layouts as layouts
from mmlm.hub.importers.build import import_folder as import_folder
from mmlm.hub.importers.llava import LlavaFamily as LlavaFamily
from mmlm.hub.importers.nanovlm import NanoVLM as NanoVLM
from mmlm.hub.importers.prismatic import Prismatic as Prismatic
from mmlm.hub.importers.tinyllava import TinyLlava as TinyLlava
