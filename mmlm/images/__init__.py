"""From any picture to the tiles that an encoder gets.

    file, bytes, array ──► decode ──► RGB picture ──► plan (policy) ──► resize.cut ──► vision

`frames` opens clips, and a video policy says which of their frames are taken (`video`).
`decode` opens pictures that strangers send, and with `readers` those of a domain; an image policy
maps a *size* to tiles, without pixels; `resize` cuts the tiles out and normalises them. Only
`resize` needs torch, and it is imported when it is first asked for. To add a policy, write one
module here, register its config, and import it below; `tests/contracts/test_images.py` finds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmlm.images.base import ImagePlan as ImagePlan
from mmlm.images.base import ImagePolicyConfig as ImagePolicyConfig
from mmlm.images.base import Tile as Tile
from mmlm.images.base import image_policies as image_policies
from mmlm.images.blend import Blend as Blend
from mmlm.images.crop import CropConfig as CropConfig
from mmlm.images.decode import ImageSource as ImageSource
from mmlm.images.decode import open_image as open_image
from mmlm.images.decode import read_size as read_size
from mmlm.images.frames import ClipFacts as ClipFacts
from mmlm.images.frames import clip_facts as clip_facts
from mmlm.images.frames import open_frames as open_frames
from mmlm.images.letterbox import LetterboxConfig as LetterboxConfig
from mmlm.images.native import NativeConfig as NativeConfig
from mmlm.images.planes import Planes as Planes
from mmlm.images.planes import open_planes as open_planes
from mmlm.images.readers import Readers as Readers
from mmlm.images.readers import all_readers as all_readers
from mmlm.images.readers import picture_readers as picture_readers
from mmlm.images.readers import split_reference as split_reference
from mmlm.images.squash import SquashConfig as SquashConfig
from mmlm.images.tiles import TilesConfig as TilesConfig
from mmlm.images.video import FramesConfig as FramesConfig
from mmlm.images.video import evenly as evenly
from mmlm.images.video import video_policies as video_policies

if TYPE_CHECKING:
    from mmlm.images.resize import cut as cut
    from mmlm.images.resize import cut_all as cut_all
    from mmlm.images.resize import cut_each as cut_each
    from mmlm.images.resize import mean_fill as mean_fill
    from mmlm.images.resize import normalise as normalise


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name in ("cut", "cut_all", "cut_each", "mean_fill", "normalise"):
        from mmlm.images import resize

        return getattr(resize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
