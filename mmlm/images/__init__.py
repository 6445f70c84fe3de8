"""From any picture to the tiles that an encoder gets.

    file, bytes, array ──► decode ──► RGB picture ──► plan (image policy) ──► resize.cut ──► uint8 tiles
                                                                                             └──► vision

`decode` opens pictures that strangers send; an image policy maps a *size* to tiles, without
pixels; `resize` cuts one tile. Normalising needs the encoder's facts and belongs to
`mmlm.processing`. To add a policy, write one module here, register its config, and import it
below; `tests/contracts/test_images.py` finds it.
"""

from mmlm.images.base import ImagePlan as ImagePlan
from mmlm.images.base import ImagePolicyConfig as ImagePolicyConfig
from mmlm.images.base import Tile as Tile
from mmlm.images.base import image_policies as image_policies
from mmlm.images.crop import CropConfig as CropConfig
from mmlm.images.letterbox import LetterboxConfig as LetterboxConfig
from mmlm.images.squash import SquashConfig as SquashConfig
