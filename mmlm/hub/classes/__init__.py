"""The stock classes that MMLM writes and reads, one module each.

To add one, write a module with a `StockClass`, register it, and import it below; the contract
tests find it through the registry. The order of the imports does not matter: a composition
equals at most one of them, or several that compute the same, of which the first by name is taken.
"""

from mmlm.hub.classes.deepseek_vl import DeepseekVL as DeepseekVL
from mmlm.hub.classes.fastvlm import FastVLM as FastVLM
from mmlm.hub.classes.llava import Llava as Llava
