"""The stock classes that MMLM writes and reads, one module each.

To add one, write a module with a `StockClass`, register it, and import it below; the contract
tests find it through the registry. The order of the imports does not matter: a composition
equals at most one of them, or several that compute the same, of which the first by name is taken.
"""

from mmlm.hub.classes.deepseek_vl import DeepseekVL as DeepseekVL
from mmlm.hub.classes.fastvlm import FastVLM as FastVLM
from mmlm.hub.classes.fuyu import Fuyu as Fuyu
from mmlm.hub.classes.gated import AyaVision as AyaVision
from mmlm.hub.classes.gated import Cohere2Vision as Cohere2Vision
from mmlm.hub.classes.gemma import Gemma3 as Gemma3
from mmlm.hub.classes.gemma import PaliGemma as PaliGemma
from mmlm.hub.classes.hyperclovax import HyperCLOVAXVision as HyperCLOVAXVision
from mmlm.hub.classes.idefics3 import Idefics3 as Idefics3
from mmlm.hub.classes.idefics3 import SmolVLM as SmolVLM
from mmlm.hub.classes.internvl import InternVL as InternVL
from mmlm.hub.classes.lfm2_vl import Lfm2VL as Lfm2VL
from mmlm.hub.classes.llava import Llava as Llava
from mmlm.hub.classes.llava_next import LlavaNext as LlavaNext
from mmlm.hub.classes.llava_onevision import LlavaOneVision as LlavaOneVision
from mmlm.hub.classes.mistral3 import Mistral3 as Mistral3
from mmlm.hub.classes.perception_lm import PerceptionLM as PerceptionLM
