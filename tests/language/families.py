"""Small tokenizers, and the published chat templates of many families with masks by hand.

Templates are written down from the form in which their makers publish them, without the
branches for tools. In `asked` and `told` the learnt characters stand between ⟦ and ⟧.
"""

# ruff: noqa: E501  (templates are quoted as they are)

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = [
    "What is it? A cat. Which colour? Black and white. Be short. <image> The quick brown fox",
    "user assistant system model end of turn USER ASSISTANT: INST SYS jumps over the lazy dog",
    "You are a helpful assistant. created by Alibaba Cloud Hugging Face trained <think> </think>",
    "def f(x):\n    return x + 1\n\n\n2024-05-17 12:30  naïve café 你好世界 🙂 <|im_end|> </s> <s>",
] * 4


@dataclass(frozen=True)
class Family:
    """One family's template.

    Args:
        name: The family.
        template: Its published template.
        kind: The kind of its tokenizer: gpt2, bytes, metaspace or unigram.
        tokens: Its special tokens.
        bos, eos: Which of them are bos and eos.
        asked: Two turns about one image, rendered, with the learnt characters marked.
        told: The same after a system turn, or what the template's refusal says.
        words: Added tokens that are not special.
        adds_bos: Whether the tokenizer itself puts bos before a text.
    """

    name: str
    template: str
    kind: str
    tokens: tuple[str, ...]
    bos: str | None
    eos: str
    asked: str
    told: str
    words: tuple[str, ...] = ()
    adds_bos: bool = False

    def tokenizer(self) -> Any:
        """Return a fresh tokenizer with the family's special tokens and ``<image>``."""
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer.from_str(_trained(self.kind))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=self.bos,
            eos_token=self.eos,
            clean_up_tokenization_spaces=False,
        )
        tokenizer.add_tokens(list(self.tokens), special_tokens=True)
        tokenizer.add_tokens(
            [AddedToken(word, special=False, normalized=False) for word in self.words]
        )
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        if self.adds_bos:
            from tokenizers.processors import TemplateProcessing

            bos_id = tokenizer.convert_tokens_to_ids(self.bos)
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, bos_id)]
            )
        tokenizer.chat_template = self.template
        return tokenizer


@cache
def _trained(kind: str) -> str:
    """Train a tokenizer on a few lines: byte-level BPE, or SentencePiece-like with metaspace."""
    if kind in ("gpt2", "bytes"):
        tokenizer = Tokenizer(models.BPE())
        if kind == "gpt2":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        else:  # as Llama 3 and Qwen: newlines stay together
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
    elif kind == "metaspace":  # as Llama 2: no pre-tokenizer, a prefix space, bytes as fallback
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
            show_progress=False,
        )
        words = (word for line in CORPUS for word in line.split(" "))
        tokenizer.train_from_iterator(words, trainer)
        tokenizer = _without_added_bytes(tokenizer)
    else:  # unigram
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        trainer = trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "<s>", "</s>"],
            unk_token="<unk>",
            initial_alphabet=[chr(number) for number in range(32, 127)] + ["\n"],
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def _without_added_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Leave the byte tokens in the model's vocabulary alone, as SentencePiece does."""
    import json

    source = json.loads(tokenizer.to_str())
    source["added_tokens"] = [
        token for token in source["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(source))


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

FAMILIES = [
    Family(
        name="chatml",
        template=CHATML,
        kind="gpt2",
        tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos=None,
        eos="<|im_end|>",
        asked=(
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
            "<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n"
            "<|im_start|>user\nWhich colour?<|im_end|>\n"
            "<|im_start|>assistant\n⟦Black.<|im_end|>⟧\n"
        ),
        told=(
            "<|im_start|>system\nBe short.<|im_end|>\n"
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
            "<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n"
        ),
    ),
    Family(
        name="qwen2.5",
        template=(
            "{%- if messages[0]['role'] == 'system' %}\n"
            "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
            "{%- else %}\n"
            "    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful"
            " assistant.<|im_end|>\\n' }}\n"
            "{%- endif %}\n"
            "{%- for message in messages %}\n"
            '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or'
            ' (message.role == "assistant" and not message.tool_calls) %}\n'
            "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' +"
            " '\\n' }}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- if add_generation_prompt %}\n"
            "    {{- '<|im_start|>assistant\\n' }}\n"
            "{%- endif %}\n"
        ),
        kind="bytes",
        tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
        words=("<tool_call>", "</tool_call>"),
        bos=None,
        eos="<|im_end|>",
        asked=(
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
            "<|im_end|>\n"
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
            "<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n"
            "<|im_start|>user\nWhich colour?<|im_end|>\n"
            "<|im_start|>assistant\n⟦Black.<|im_end|>⟧\n"
        ),
        told=(
            "<|im_start|>system\nBe short.<|im_end|>\n"
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
            "<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n"
        ),
    ),
    Family(
        name="smollm2",
        template=(
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
            " Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' +"
            " message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
            "{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
        kind="gpt2",
        tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos="<|im_start|>",
        eos="<|im_end|>",
        asked=(
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
            "<|im_end|>\n"
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
            "<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n"
            "<|im_start|>user\nWhich colour?<|im_end|>\n"
            "<|im_start|>assistant\n⟦Black.<|im_end|>⟧\n"
        ),
        told=(
            "<|im_start|>system\nBe short.<|im_end|>\n"
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
            "<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n"
        ),
    ),
    Family(
        name="llama-2",
        template=(
            "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
            "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages ="
            " messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages"
            " %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...')"
            " }}{% endif %}{% if loop.index0 == 0 and system_message != false %}"
            "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content']"
            " %}{% else %}{% set content = message['content'] %}{% endif %}"
            "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() +"
            " ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' +"
            " eos_token }}{% endif %}{% endfor %}"
        ),
        kind="metaspace",
        tokens=("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        asked=(
            "<s>[INST] <image>\nWhat is it? [/INST]⟦ A cat. </s>⟧"
            "<s>[INST] Which colour? [/INST]⟦ Black. </s>⟧"
        ),
        told="<s>[INST] <<SYS>>\nBe short.\n<</SYS>>\n\n<image>\nWhat is it? [/INST]⟦ A cat. </s>⟧",
    ),
    Family(
        name="llama-3",
        template=(
            "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content ="
            " '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] |"
            " trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
            "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
            "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        kind="bytes",
        tokens=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|finetune_right_pad_id|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        adds_bos=True,
        asked=(
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦A cat.<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nWhich colour?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Black.<|eot_id|>⟧"
        ),
        told=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A cat.<|eot_id|>⟧"
        ),
    ),
    Family(
        name="mistral-v0.3",
        template=(
            '{%- if messages[0]["role"] == "system" %}\n'
            '    {%- set system_message = messages[0]["content"] %}\n'
            "    {%- set loop_messages = messages[1:] %}\n"
            "{%- else %}\n"
            "    {%- set loop_messages = messages %}\n"
            "{%- endif %}\n"
            "{%- set ns = namespace() %}\n"
            "{%- set ns.index = 0 %}\n"
            "{%- for message in loop_messages %}\n"
            '    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}\n'
            '        {{- raise_exception("After the optional system message, conversation roles must'
            ' alternate user/assistant/user/assistant/...") }}\n'
            "    {%- endif %}\n"
            "    {%- set ns.index = ns.index + 1 %}\n"
            "{%- endfor %}\n"
            "\n"
            "{{- bos_token }}\n"
            "{%- for message in loop_messages %}\n"
            '    {%- if message["role"] == "user" %}\n'
            "        {%- if loop.last and system_message is defined %}\n"
            '            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]"'
            " }}\n"
            "        {%- else %}\n"
            '            {{- "[INST] " + message["content"] + "[/INST]" }}\n'
            "        {%- endif %}\n"
            '    {%- elif message["role"] == "assistant" %}\n'
            '        {{- " " + message["content"]|trim + eos_token}}\n'
            "    {%- endif %}\n"
            "{%- endfor %}\n"
        ),
        kind="metaspace",
        tokens=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        asked=(
            "<s>[INST] <image>\nWhat is it?[/INST]⟦ A cat.</s>⟧"
            "[INST] Which colour?[/INST]⟦ Black.</s>⟧"
        ),
        told="leaves out the text of turn 0",
    ),
    Family(
        name="gemma",
        template=(
            "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}"
            "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0)"
            " %}{{ raise_exception('Conversation roles must alternate"
            " user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant')"
            " %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
            "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
        ),
        kind="unigram",
        tokens=("<pad>", "<eos>", "<bos>"),
        words=("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        adds_bos=True,
        asked=(
            "<bos><start_of_turn>user\n<image>\nWhat is it?<end_of_turn>\n"
            "<start_of_turn>model\n⟦A cat.<end_of_turn>⟧\n"
            "<start_of_turn>user\nWhich colour?<end_of_turn>\n"
            "<start_of_turn>model\n⟦Black.<end_of_turn>⟧\n"
        ),
        told="Put the words of the system turn at the head of the first user turn",
    ),
    Family(
        name="phi-3",
        template=(
            "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' +"
            " message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' +"
            " message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
            "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
            "{% endif %}"
        ),
        kind="metaspace",
        tokens=(
            "<unk>",
            "<s>",
            "</s>",
            "<|endoftext|>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|end|>",
        ),
        bos="<s>",
        eos="<|endoftext|>",
        asked=(
            "<|user|>\n<image>\nWhat is it?<|end|>\n<|assistant|>\n⟦A cat.<|end|>⟧\n"
            "<|user|>\nWhich colour?<|end|>\n<|assistant|>\n⟦Black.<|end|>⟧\n<|endoftext|>"
        ),
        told=(
            "<|system|>\nBe short.<|end|>\n<|user|>\n<image>\nWhat is it?<|end|>\n"
            "<|assistant|>\n⟦A cat.<|end|>⟧\n<|endoftext|>"
        ),
    ),
    Family(
        name="vicuna",
        template=(
            "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
            "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}"
            "{% endif %}{% for message in loop_messages %}{% if message['role'] == 'user' %}"
            "{{ 'USER: ' + message['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + message['content']"
            " + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}"
            "{% endif %}"
        ),
        kind="metaspace",
        tokens=("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        asked=(
            "USER: <image>\nWhat is it? ASSISTANT:⟦ A cat.</s>⟧USER: Which colour? "
            "ASSISTANT:⟦ Black.</s>⟧"
        ),
        told="Be short. USER: <image>\nWhat is it? ASSISTANT:⟦ A cat.</s>⟧",
    ),
    Family(
        name="zephyr",
        template=(
            "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' +"
            " message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
            "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] =="
            " 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
            "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
            "{% endfor %}"
        ),
        kind="metaspace",
        tokens=("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        asked=(
            "<|user|>\n<image>\nWhat is it?</s>\n<|assistant|>\n⟦A cat.</s>⟧\n"
            "<|user|>\nWhich colour?</s>\n<|assistant|>\n⟦Black.</s>⟧\n"
        ),
        told=(
            "<|system|>\nBe short.</s>\n<|user|>\n<image>\nWhat is it?</s>\n"
            "<|assistant|>\n⟦A cat.</s>⟧\n"
        ),
    ),
    Family(
        name="deepseek",
        template=(
            "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
            "{% endif %}{% set ns = namespace(is_first=false, system_prompt='') %}"
            "{%- for message in messages %}{%- if message['role'] == 'system' %}"
            "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
            "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
            "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
            "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
            "{% set content = message['content'] %}{% if '</think>' in content %}"
            "{% set content = content.split('</think>')[-1] %}{% endif %}"
            "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
            "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"
        ),
        kind="bytes",
        tokens=(
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
        ),
        words=("<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        adds_bos=True,
        asked=(
            "<｜begin▁of▁sentence｜><｜User｜><image>\nWhat is it?"
            "<｜Assistant｜>⟦A cat.<｜end▁of▁sentence｜>⟧<｜User｜>Which colour?"
            "<｜Assistant｜>⟦Black.<｜end▁of▁sentence｜>⟧"
        ),
        told=(
            "<｜begin▁of▁sentence｜>Be short.<｜User｜><image>\nWhat is it?"
            "<｜Assistant｜>⟦A cat.<｜end▁of▁sentence｜>⟧"
        ),
    ),
    Family(
        name="olmo-2",
        template=(
            "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
            "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
            "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
            "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}"
            "{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}"
            "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}"
            "{% endif %}{% endfor %}"
        ),
        kind="bytes",
        tokens=("<|endoftext|>",),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        asked=(
            "<|endoftext|><|user|>\n<image>\nWhat is it?\n<|assistant|>\n⟦A cat.<|endoftext|>⟧\n"
            "<|user|>\nWhich colour?\n<|assistant|>\n⟦Black.<|endoftext|>⟧"
        ),
        told=(
            "<|endoftext|><|system|>\nBe short.\n<|user|>\n<image>\nWhat is it?\n"
            "<|assistant|>\n⟦A cat.<|endoftext|>⟧"
        ),
    ),
    Family(
        name="qwen3",
        template=(
            "{%- if messages[0].role == 'system' %}\n"
            "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
            "{%- endif %}\n"
            "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
            "{%- for message in messages[::-1] %}\n"
            "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
            '    {%- if ns.multi_step_tool and message.role == "user" and message.content is string'
            " and not(message.content.startswith('<tool_response>') and"
            " message.content.endswith('</tool_response>')) %}\n"
            "        {%- set ns.multi_step_tool = false %}\n"
            "        {%- set ns.last_query_index = index %}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- for message in messages %}\n"
            "    {%- if message.content is string %}\n"
            "        {%- set content = message.content %}\n"
            "    {%- else %}\n"
            "        {%- set content = '' %}\n"
            "    {%- endif %}\n"
            '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}\n'
            "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
            '    {%- elif message.role == "assistant" %}\n'
            "        {%- set reasoning_content = '' %}\n"
            "        {%- if message.reasoning_content is string %}\n"
            "            {%- set reasoning_content = message.reasoning_content %}\n"
            "        {%- else %}\n"
            "            {%- if '</think>' in content %}\n"
            "                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n')"
            ".split('<think>')[-1].lstrip('\\n') %}\n"
            "                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
            "            {%- endif %}\n"
            "        {%- endif %}\n"
            "        {%- if loop.index0 > ns.last_query_index %}\n"
            "            {%- if loop.last or (not loop.last and reasoning_content) %}\n"
            "                {{- '<|im_start|>' + message.role + '\\n<think>\\n' +"
            " reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
            "            {%- else %}\n"
            "                {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
            "            {%- endif %}\n"
            "        {%- else %}\n"
            "            {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
            "        {%- endif %}\n"
            "        {{- '<|im_end|>\\n' }}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- if add_generation_prompt %}\n"
            "    {{- '<|im_start|>assistant\\n' }}\n"
            "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
            "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
            "    {%- endif %}\n"
            "{%- endif %}"
        ),
        kind="bytes",
        tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        words=("<think>", "</think>", "<tool_call>", "</tool_call>"),
        bos=None,
        eos="<|im_end|>",
        asked="cannot be learnt",
        told=(
            "<|im_start|>system\nBe short.<|im_end|>\n"
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nA cat.<|im_end|>⟧\n"
        ),
    ),
    Family(
        name="granite-3",
        template=(
            "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']"
            " %}{%- set loop_messages = messages[1:] %}{%- else %}{%- set system_message = \"Today's"
            ' assistant." %}{%- set loop_messages = messages %}{%- endif %}'
            "{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}"
            "{%- for message in loop_messages %}{{- '<|start_of_role|>' + message['role'] +"
            " '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}"
            "{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant"
            "<|end_of_role|>' }}{%- endif %}{%- endfor %}"
        ),
        kind="bytes",
        tokens=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        asked=(
            "<|start_of_role|>system<|end_of_role|>Today's assistant.<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|><image>\nWhat is it?<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>⟦A cat.<|end_of_text|>⟧\n"
            "<|start_of_role|>user<|end_of_role|>Which colour?<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>⟦Black.<|end_of_text|>⟧\n"
        ),
        told=(
            "<|start_of_role|>system<|end_of_role|>Be short.<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|><image>\nWhat is it?<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>⟦A cat.<|end_of_text|>⟧\n"
        ),
    ),
    Family(
        name="command-r",
        template=(
            "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages ="
            " messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}"
            "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
            "{% if system_message != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' +"
            " system_message + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% for message in loop_messages %}"
            "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...')"
            " }}{% endif %}{% set content = message['content'] %}{% if message['role'] == 'user' %}"
            "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
            "{% elif message['role'] == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  +"
            " content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
            "{% endif %}"
        ),
        kind="bytes",
        tokens=(
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        adds_bos=True,
        asked=(
            "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|><image>\nWhat is it?"
            "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦A cat."
            "<|END_OF_TURN_TOKEN|>⟧<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Which colour?"
            "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Black."
            "<|END_OF_TURN_TOKEN|>⟧"
        ),
        told=(
            "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be short.<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|><image>\nWhat is it?<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦A cat.<|END_OF_TURN_TOKEN|>⟧"
        ),
    ),
]
