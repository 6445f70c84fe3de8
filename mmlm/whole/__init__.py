"""A vision-language model that transformers has as one class, taken as it is.

    hub ──► AutoModelForImageTextToText, AutoProcessor ──► WholeModel, WholeProcessor
                                                           you are here

Where MMLM can read a folder as a composition, it does. Every other class is wrapped here, so
that recipes, previews, resuming and evaluation treat it like a composition: its modules get the
public names vision, connector, language and head, and its processor is asked what it makes of
a picture instead of being rebuilt. Reading and writing folders is `mmlm.hub.whole`.
"""

from mmlm.whole.model import WholeModel as WholeModel
from mmlm.whole.processor import WholeProcessor as WholeProcessor
