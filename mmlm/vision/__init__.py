"""Vision encoders: from pixels to features.

    images ──► vision ──► reducers ──► connectors ──► modeling
               you are here

`hf` takes any image tower of transformers and `hf_clips` those of clips, `timm` any model of timm,
`open_clip` that of its checkpoints, `patches` none at all; `mixture` takes several, `scales` one at
several sizes, `extended` adds to one; `florence2` reads under prompts,
`embedding` gives the one vector that a CLIP compares with texts.
An encoder gives packed `VisionFeatures`; how many tokens a picture becomes follows from its
`VisionFacts` without the weights. To add an encoder, write one module here, register its
config, and import it below; `tests/contracts/test_vision.py` finds it.
"""

from mmlm.vision.base import VisionConfig as VisionConfig
from mmlm.vision.base import VisionEncoder as VisionEncoder
from mmlm.vision.base import VisionFacts as VisionFacts
from mmlm.vision.base import encoders as encoders
from mmlm.vision.base import in_order as in_order
from mmlm.vision.blocks import rolling as rolling
from mmlm.vision.embedding import EmbeddingEncoder as EmbeddingEncoder
from mmlm.vision.embedding import EmbeddingVisionConfig as EmbeddingVisionConfig
from mmlm.vision.extended import ExtendedConfig as ExtendedConfig
from mmlm.vision.extended import ExtendedEncoder as ExtendedEncoder
from mmlm.vision.florence2 import FlorenceEncoder as FlorenceEncoder
from mmlm.vision.florence2 import FlorenceVisionConfig as FlorenceVisionConfig
from mmlm.vision.hf import HFVisionConfig as HFVisionConfig
from mmlm.vision.hf import HFVisionEncoder as HFVisionEncoder
from mmlm.vision.hf_clips import HFClipsConfig as HFClipsConfig
from mmlm.vision.hf_clips import HFClipsEncoder as HFClipsEncoder
from mmlm.vision.mixture import MixtureConfig as MixtureConfig
from mmlm.vision.mixture import MixtureEncoder as MixtureEncoder
from mmlm.vision.open_clip import OpenClipVisionConfig as OpenClipVisionConfig
from mmlm.vision.open_clip import OpenClipVisionEncoder as OpenClipVisionEncoder
from mmlm.vision.patches import PatchesConfig as PatchesConfig
from mmlm.vision.patches import PatchesEncoder as PatchesEncoder
from mmlm.vision.scales import ScalesConfig as ScalesConfig
from mmlm.vision.scales import ScalesEncoder as ScalesEncoder
from mmlm.vision.timm import TimmVisionConfig as TimmVisionConfig
from mmlm.vision.timm import TimmVisionEncoder as TimmVisionEncoder
