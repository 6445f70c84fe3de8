"""Connectors turn image features into vectors that the language model reads as tokens.

    vision ──► reducers ──► connectors ──► modeling
                            you are here

A connector changes the width of a feature; changing how many there are is the work of
`mmlm.reducers`, and a part that must do both, such as a resampler, stands here and says so in
its `out_grid`. To add one, write one module here, register its config, and import it below;
`tests/contracts/test_connectors.py` finds it.
"""

from mmlm.connectors.base import Connector as Connector
from mmlm.connectors.base import ConnectorConfig as ConnectorConfig
from mmlm.connectors.base import connectors as connectors
from mmlm.connectors.linear import LinearConnector as LinearConnector
from mmlm.connectors.linear import LinearConnectorConfig as LinearConnectorConfig
from mmlm.connectors.mlp import MLPConnector as MLPConnector
from mmlm.connectors.mlp import MLPConnectorConfig as MLPConnectorConfig
from mmlm.connectors.scale import match_scale as match_scale
