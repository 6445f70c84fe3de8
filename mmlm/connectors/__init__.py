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
from mmlm.connectors.base import Remembering as Remembering
from mmlm.connectors.base import connectors as connectors
from mmlm.connectors.bridge import BridgeConnector as BridgeConnector
from mmlm.connectors.bridge import BridgeConnectorConfig as BridgeConnectorConfig
from mmlm.connectors.c_abstractor import CAbstractorConnector as CAbstractorConnector
from mmlm.connectors.c_abstractor import CAbstractorConnectorConfig as CAbstractorConnectorConfig
from mmlm.connectors.cross_attention import CrossAttentionConnector as CrossAttentionConnector
from mmlm.connectors.cross_attention import (
    CrossAttentionConnectorConfig as CrossAttentionConnectorConfig,
)
from mmlm.connectors.deepstack import DeepStackConnector as DeepStackConnector
from mmlm.connectors.deepstack import DeepStackConnectorConfig as DeepStackConnectorConfig
from mmlm.connectors.dual_projector import DualProjectorConnector as DualProjectorConnector
from mmlm.connectors.dual_projector import (
    DualProjectorConnectorConfig as DualProjectorConnectorConfig,
)
from mmlm.connectors.ep_alm import EPALMConnector as EPALMConnector
from mmlm.connectors.ep_alm import EPALMConnectorConfig as EPALMConnectorConfig
from mmlm.connectors.fiber import FiberConnector as FiberConnector
from mmlm.connectors.fiber import FiberConnectorConfig as FiberConnectorConfig
from mmlm.connectors.frozen_block import FrozenBlockConnector as FrozenBlockConnector
from mmlm.connectors.frozen_block import (
    FrozenBlockConnectorConfig as FrozenBlockConnectorConfig,
)
from mmlm.connectors.gated_mlp import GatedMLPConnector as GatedMLPConnector
from mmlm.connectors.gated_mlp import GatedMLPConnectorConfig as GatedMLPConnectorConfig
from mmlm.connectors.grounded_qformer import (
    GroundedQFormerConnector as GroundedQFormerConnector,
)
from mmlm.connectors.grounded_qformer import (
    GroundedQFormerConnectorConfig as GroundedQFormerConnectorConfig,
)
from mmlm.connectors.injection import Injecting as Injecting
from mmlm.connectors.injection import Picture as Picture
from mmlm.connectors.injection import Seen as Seen
from mmlm.connectors.language_conditioned import (
    LanguageConditionedConnector as LanguageConditionedConnector,
)
from mmlm.connectors.language_conditioned import (
    LanguageConditionedConnectorConfig as LanguageConditionedConnectorConfig,
)
from mmlm.connectors.ldp import LDPConnector as LDPConnector
from mmlm.connectors.ldp import LDPConnectorConfig as LDPConnectorConfig
from mmlm.connectors.ldpv2 import LDPv2Connector as LDPv2Connector
from mmlm.connectors.ldpv2 import LDPv2ConnectorConfig as LDPv2ConnectorConfig
from mmlm.connectors.level_merge import LevelMergeConnector as LevelMergeConnector
from mmlm.connectors.level_merge import LevelMergeConnectorConfig as LevelMergeConnectorConfig
from mmlm.connectors.linear import LinearConnector as LinearConnector
from mmlm.connectors.linear import LinearConnectorConfig as LinearConnectorConfig
from mmlm.connectors.mlp import MLPConnector as MLPConnector
from mmlm.connectors.mlp import MLPConnectorConfig as MLPConnectorConfig
from mmlm.connectors.mov_adapter import MoVAdapterConnector as MoVAdapterConnector
from mmlm.connectors.mov_adapter import MoVAdapterConnectorConfig as MoVAdapterConnectorConfig
from mmlm.connectors.norm_mlp import NormMLPConnector as NormMLPConnector
from mmlm.connectors.norm_mlp import NormMLPConnectorConfig as NormMLPConnectorConfig
from mmlm.connectors.ordered_queries import OrderedQueriesConnector as OrderedQueriesConnector
from mmlm.connectors.ordered_queries import (
    OrderedQueriesConnectorConfig as OrderedQueriesConnectorConfig,
)
from mmlm.connectors.patch_merger import PatchMergerConnector as PatchMergerConnector
from mmlm.connectors.patch_merger import PatchMergerConnectorConfig as PatchMergerConnectorConfig
from mmlm.connectors.perceiver import PerceiverConnector as PerceiverConnector
from mmlm.connectors.perceiver import PerceiverConnectorConfig as PerceiverConnectorConfig
from mmlm.connectors.prefix import check_visual_tokens as check_visual_tokens
from mmlm.connectors.prefix import num_shown as num_shown
from mmlm.connectors.prefix import visual_tokens as visual_tokens
from mmlm.connectors.proto_memory import ProtoMemoryConnector as ProtoMemoryConnector
from mmlm.connectors.proto_memory import (
    ProtoMemoryConnectorConfig as ProtoMemoryConnectorConfig,
)
from mmlm.connectors.qformer import QFormerConnector as QFormerConnector
from mmlm.connectors.qformer import QFormerConnectorConfig as QFormerConnectorConfig
from mmlm.connectors.qladder import QLadderConnector as QLadderConnector
from mmlm.connectors.qladder import QLadderConnectorConfig as QLadderConnectorConfig
from mmlm.connectors.question import Conditioning as Conditioning
from mmlm.connectors.question import QuestionConfig as QuestionConfig
from mmlm.connectors.question import Words as Words
from mmlm.connectors.reassemble import ReassembleConnector as ReassembleConnector
from mmlm.connectors.reassemble import ReassembleConnectorConfig as ReassembleConnectorConfig
from mmlm.connectors.semantic_tokens import SemanticTokensConnector as SemanticTokensConnector
from mmlm.connectors.semantic_tokens import (
    SemanticTokensConnectorConfig as SemanticTokensConnectorConfig,
)
from mmlm.connectors.temporal import TemporalAlignConnector as TemporalAlignConnector
from mmlm.connectors.temporal import (
    TemporalAlignConnectorConfig as TemporalAlignConnectorConfig,
)
from mmlm.connectors.text_memory import TextMemoryConnector as TextMemoryConnector
from mmlm.connectors.text_memory import TextMemoryConnectorConfig as TextMemoryConnectorConfig
from mmlm.connectors.token_packer import TokenPackerConnector as TokenPackerConnector
from mmlm.connectors.token_packer import TokenPackerConnectorConfig as TokenPackerConnectorConfig
from mmlm.connectors.xformer import XFormerConnector as XFormerConnector
from mmlm.connectors.xformer import XFormerConnectorConfig as XFormerConnectorConfig
