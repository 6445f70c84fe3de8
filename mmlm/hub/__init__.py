"""In and out: model folders of MMLM, stock folders of transformers, deltas, cards, the Hub.

    modeling, processing ──► hub ──► assistant, training, cli
                             you are here

`save` writes a class of transformers where the composition equals one (`mmlm.hub.classes` says
which, `mmlm.hub.parity` asserts it), else MMLM's own; `save_delta` writes only what was learnt;
`load_parts` reads all of them back. Safetensors only: nothing is ever unpickled.
"""

from mmlm.hub.adapter import export_adapter as export_adapter
from mmlm.hub.adapter import put_adapter as put_adapter
from mmlm.hub.card import write_card as write_card
from mmlm.hub.classes import AyaVision as AyaVision
from mmlm.hub.classes import Cohere2Vision as Cohere2Vision
from mmlm.hub.classes import DeepseekVL as DeepseekVL
from mmlm.hub.classes import FastVLM as FastVLM
from mmlm.hub.classes import Gemma3 as Gemma3
from mmlm.hub.classes import HyperCLOVAXVision as HyperCLOVAXVision
from mmlm.hub.classes import Idefics3 as Idefics3
from mmlm.hub.classes import InternVL as InternVL
from mmlm.hub.classes import Lfm2VL as Lfm2VL
from mmlm.hub.classes import Llava as Llava
from mmlm.hub.classes import LlavaNext as LlavaNext
from mmlm.hub.classes import LlavaOneVision as LlavaOneVision
from mmlm.hub.classes import Mistral3 as Mistral3
from mmlm.hub.classes import PaliGemma as PaliGemma
from mmlm.hub.classes import PerceptionLM as PerceptionLM
from mmlm.hub.classes import SmolVLM as SmolVLM
from mmlm.hub.delta import save_delta as save_delta
from mmlm.hub.load import find as find
from mmlm.hub.load import load_parts as load_parts
from mmlm.hub.load import model_of_run as model_of_run
from mmlm.hub.opens import Opens as Opens
from mmlm.hub.opens import opens_in as opens_in
from mmlm.hub.push import push as push
from mmlm.hub.push import push_folder as push_folder
from mmlm.hub.save import save as save
from mmlm.hub.save import save_mmlm as save_mmlm
from mmlm.hub.save import save_stock as save_stock
from mmlm.hub.stock import Match as Match
from mmlm.hub.stock import StockClass as StockClass
from mmlm.hub.stock import match as match
from mmlm.hub.stock import stock_classes as stock_classes
from mmlm.hub.upgrade import Upgrade as Upgrade
from mmlm.hub.upgrade import upgrade as upgrade
from mmlm.hub.whole import is_only_whole as is_only_whole
from mmlm.hub.whole import load_whole as load_whole
from mmlm.hub.whole import save_whole as save_whole
