"""The language model: any causal LM of transformers, its tokenizer, template and adapters.

    loader      from a folder, a Hub id or a GGUF file to a model and a tokenizer
    vocabulary  the image token and the pad token
    head        from hidden states to logits: the rule, proven by a probe
    template    chat templates that know about images
    fuyu        the form of a conversation that Fuyu's processor writes
    skeleton    what a template writes around the words, proven for each shape
    chat        from a conversation to ids and labels: the only tokeniser call
    traits      what a model can do (pack, pad left, crop its cache), proven by a probe
    adapters    LoRA, DoRA and QLoRA through PEFT

Importing this room loads neither torch nor transformers.
"""

from mmlm.language.base import LanguageConfig as LanguageConfig
from mmlm.language.base import languages as languages
from mmlm.language.chat import ChatFormat as ChatFormat
from mmlm.language.chat import Encoded as Encoded
from mmlm.language.head import HeadRule as HeadRule
from mmlm.language.head import decoder_of as decoder_of
from mmlm.language.head import head_of as head_of
from mmlm.language.head import head_rule_of as head_rule_of
from mmlm.language.loader import CausalLMConfig as CausalLMConfig
from mmlm.language.loader import load_language as load_language
from mmlm.language.template import IMAGE_TOKEN as IMAGE_TOKEN
from mmlm.language.template import wrap_template as wrap_template
from mmlm.language.traits import LanguageTraits as LanguageTraits
from mmlm.language.traits import traits_of as traits_of
from mmlm.language.vocabulary import add_image_token as add_image_token
