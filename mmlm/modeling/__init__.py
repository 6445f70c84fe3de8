"""The joined model: vision ──► reducer ──► connector ──► language model, as one transformers class.

    vision | connectors ──► modeling ──► processing ──► generation, training, hub
                            you are here

`config` says what the model is made of, `fusion` puts image features into the text, `head`
computes logits or the loss alone, `attention` keeps packed samples apart, `model` joins them.
Nothing here opens a picture or calls a tokenizer.
"""

from mmlm.modeling.attention import SEGMENTS as SEGMENTS
from mmlm.modeling.config import MMLMConfig as MMLMConfig
from mmlm.modeling.fusion import place_image_features as place_image_features
from mmlm.modeling.model import MMLMForConditionalGeneration as MMLMForConditionalGeneration
from mmlm.modeling.model import MMLMModel as MMLMModel
from mmlm.modeling.pictures import Place as Place
from mmlm.modeling.pictures import places_of_pictures as places_of_pictures
from mmlm.modeling.questions import question_of as question_of
from mmlm.modeling.questions import with_turns as with_turns
