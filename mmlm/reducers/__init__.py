"""Reducers turn many image features into fewer.

    vision ──► reducers ──► connectors ──► modeling
               you are here

A reducer changes how many features there are (and may make them wider by stacking
neighbours); what the language model reads is made by `mmlm.connectors`. To add one, write one
module here, register its config, and import it below; `tests/contracts/test_reducers.py`
finds it.
"""

from mmlm.reducers.average_pool import AveragePool as AveragePool
from mmlm.reducers.average_pool import AveragePoolConfig as AveragePoolConfig
from mmlm.reducers.base import Reducer as Reducer
from mmlm.reducers.base import ReducerConfig as ReducerConfig
from mmlm.reducers.base import reducers as reducers
from mmlm.reducers.interpolate import Interpolate as Interpolate
from mmlm.reducers.interpolate import InterpolateConfig as InterpolateConfig
from mmlm.reducers.pixel_shuffle import PixelShuffle as PixelShuffle
from mmlm.reducers.pixel_shuffle import PixelShuffleConfig as PixelShuffleConfig
from mmlm.reducers.pixel_shuffle import pixel_shuffle as pixel_shuffle
from mmlm.reducers.pool import Pool as Pool
from mmlm.reducers.pool import PoolConfig as PoolConfig
