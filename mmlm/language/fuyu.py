"""The form of a conversation that Fuyu's processor writes (Adept, 2023), and nothing of its model.

    <image><s>question<0x04>answer</s>

All pictures stand before all words, a mark stands behind each row of a picture, and another one
before each answer. The processor of transformers has this form written into its code, so that
only a model which has learnt it can be written as Fuyu (`mmlm.hub.classes.fuyu`).
"""

from __future__ import annotations

from typing import Any

from mmlm.errors import ConfigError
from mmlm.language.template import IMAGE_TOKEN

BEGIN, ANSWER, NEWLINE, SPEAKER = "<s>", "<0x04>", "|NEWLINE|", "|SPEAKER|"
"""Before the words, before an answer, behind a row of a picture, and Fuyu's placeholder."""

FUYU_TEMPLATE = f"""\
{{%- set shown = namespace(pictures='') -%}}
{{%- for message in messages if message['content'] is not string -%}}
    {{%- for part in message['content'] if part['type'] != 'text' -%}}
        {{%- set shown.pictures = shown.pictures + '{IMAGE_TOKEN}' -%}}
    {{%- endfor -%}}
{{%- endfor -%}}
{{{{- shown.pictures + '{BEGIN}' -}}}}
{{%- for message in messages -%}}
    {{%- set said = namespace(words='') -%}}
    {{%- if message['content'] is string -%}}
        {{%- set said.words = message['content'] -%}}
    {{%- else -%}}
        {{%- for part in message['content'] if part['type'] == 'text' -%}}
            {{%- set said.words = said.words + part['text'] -%}}
        {{%- endfor -%}}
    {{%- endif -%}}
    {{%- if message['role'] == 'assistant' -%}}
        {{{{- '{ANSWER}' + said.words + eos_token -}}}}
    {{%- elif message['role'] == 'system' -%}}
        {{{{- said.words + '\\n' -}}}}
    {{%- else -%}}
        {{{{- said.words -}}}}
    {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
    {{{{- '{ANSWER}' -}}}}
{{%- endif -%}}"""
"""The chat template of that form."""


def speak_as_fuyu(tokenizer: Any) -> None:
    """Give a tokenizer Fuyu's marks and its form of a conversation.

    Args:
        tokenizer: A fast tokenizer, changed in place.

    Raises:
        ConfigError: if Fuyu's processor would read words otherwise with this tokenizer.
    """
    wanted = "model.language.format: fuyu wants another tokenizer"
    first = tokenizer.convert_ids_to_tokens(0)
    if first not in tokenizer.all_special_tokens:
        raise ConfigError(
            f"{wanted}: Fuyu's processor pads with token 0, which is {first!r} here and would be "
            f"cut out of answers. Take a language model whose token 0 is a special one (<unk>), "
            f"or leave `format` out."
        )
    tokenizer.add_tokens([BEGIN, ANSWER, NEWLINE], special_tokens=True)
    backend = tokenizer.backend_tokenizer
    words, marks = "a b", f"{SPEAKER}{NEWLINE}"
    apart = [tokenizer.convert_tokens_to_ids(BEGIN), *_ids(backend, words)]
    normalised = marks if backend.normalizer is None else backend.normalizer.normalize_str(marks)
    if _ids(backend, BEGIN + words) != apart or normalised != marks:
        raise ConfigError(
            f"{wanted}: this one writes a space before a text (or changes marks), so that words "
            f"behind a mark are other tokens than words alone. Fuyu's processor tokenises both "
            f"apart. Take a byte-level tokenizer without `add_prefix_space`, or leave `format` out."
        )
    backend.post_processor = None  # the form has its own beginning, behind the pictures
    tokenizer.chat_template = FUYU_TEMPLATE


def _ids(backend: Any, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)
