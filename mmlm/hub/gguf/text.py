"""The language model as a GGUF file: settings, vocabulary, tensors under llama.cpp's names.

llama.cpp turns neighbouring pairs in the rotary positions of its `llama` architecture, where
transformers turns halves: the rows of queries and keys are put in that order here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import CheckpointError
from mmlm.hub.gguf.fits import LANGUAGES, rope_of
from mmlm.hub.gguf.tensors import add_tensor
from mmlm.hub.gguf.vocabulary import vocabulary_of
from mmlm.hub.stock import HEAD, LANGUAGE
from mmlm.language.template import is_wrapped
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor


def write_text(
    file: Path,
    config: MMLMConfig,
    state: Mapping[str, Tensor],
    processor: MMLMProcessor,
    *,
    title: str,
) -> None:
    """Write the language model with its vocabulary and template.

    Raises:
        CheckpointError: if a tensor has no name in llama.cpp.
    """
    import gguf

    text = config.text_config
    kind = LANGUAGES[text.model_type]
    arch = getattr(gguf.MODEL_ARCH, kind)
    writer: Any = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type("model")
    writer.add_name(title)
    _add_settings(writer, text)
    _add_vocabulary(writer, processor, rows=int(text.vocab_size))
    names: Any = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    lost: list[str] = []
    for key, value in state.items():
        theirs = _published(key)
        if theirs is None:
            continue  # the eye's
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name is None:
            lost.append(theirs)
            continue
        if kind == "LLAMA":
            value = _in_pairs(theirs, value, text)
        add_tensor(writer, name, value)
    if lost:
        raise CheckpointError(
            f"llama.cpp has no place for {len(lost)} tensors of this {text.model_type}, such as "
            f"{lost[0]}. Nothing was written; export another form."
        )
    if (factors := _rope_factors(text)) is not None:
        add_tensor(writer, "rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _published(key: str) -> str | None:
    """Return the name that a tensor of the language model has in its own family."""
    if key.startswith(LANGUAGE):
        return "model." + key.removeprefix(LANGUAGE)
    return key if key.startswith(HEAD) else None


def _add_settings(writer: Any, text: Any) -> None:
    heads = int(text.num_attention_heads)
    head_width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    writer.add_context_length(int(text.max_position_embeddings))
    writer.add_embedding_length(int(text.hidden_size))
    writer.add_block_count(int(text.num_hidden_layers))
    writer.add_feed_forward_length(int(text.intermediate_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(getattr(text, "num_key_value_heads", None) or heads))
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)
    writer.add_layer_norm_rms_eps(float(text.rms_norm_eps))
    writer.add_vocab_size(int(text.vocab_size))
    rope = rope_of(text)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _add_vocabulary(writer: Any, processor: MMLMProcessor, *, rows: int) -> None:
    tokenizer = processor.tokenizer
    vocabulary = vocabulary_of(tokenizer, rows=rows)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.begins_with_space)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    stops = list(processor.chat.stop_ids)
    writer.add_eos_token_id(stops[0])
    if len(stops) > 1:
        writer.add_eot_token_id(stops[1])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(int(tokenizer.bos_token_id))
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(int(tokenizer.pad_token_id))
    writer.add_add_bos_token(begins_by_itself(processor))
    writer.add_chat_template(template_for_llama(processor.chat.template))


def begins_by_itself(processor: MMLMProcessor) -> bool:
    """Whether the tokenizer puts its begin token where the template has written none."""
    from mmlm.messages import user

    encoded = processor.encode_chat([user("A question")], add_generation_prompt=True)
    begin = processor.tokenizer.bos_token
    if begin is None or not encoded.ids or encoded.text.startswith(begin):
        return False
    return encoded.ids[0] == processor.tokenizer.bos_token_id


_PRELUDE = """\
{#- a picture stands on a line of its own, as in training -#}
{%- set told = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string and '<__media_' in message['content'] -%}
        {%- set pieces = message['content'].split('<__media_') -%}
        {%- set turn = namespace(text=pieces[0]) -%}
        {%- for piece in pieces[1:] -%}
            {%- set halves = piece.split('_>') -%}
            {%- set rest = halves[1:] | join('_>') -%}
            {%- set turn.text = turn.text + '<__media_' + halves[0] + '_>' -%}
            {%- set turn.text = turn.text + ('' if loop.last and not rest else '\\n') + rest -%}
        {%- endfor -%}
        {%- set told.messages = told.messages + [dict(message, content=turn.text)] -%}
    {%- else -%}
        {%- set told.messages = told.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = told.messages -%}
"""


def template_for_llama(template: str) -> str:
    """Return the chat template as llama.cpp is to render it.

    llama.cpp puts its mark for a picture, `<__media_…_>`, right before the text, without the
    line break that a wrapped template writes there. A template that handles parts by itself is
    left as it is.
    """
    return _PRELUDE + template if is_wrapped(template) else template


def _in_pairs(name: str, value: Tensor, text: Any) -> Tensor:
    """Put the rows of queries and keys from halves into neighbouring pairs."""
    if ".self_attn.q_proj." in name:
        heads = int(text.num_attention_heads)
    elif ".self_attn.k_proj." in name:
        heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    else:
        return value
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def _rope_factors(text: Any) -> Tensor | None:
    """Return by how much each frequency is divided, as Llama 3 stretches its positions."""
    rope = rope_of(text)
    if rope.get("rope_type") != "llama3":
        return None
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width
    waves = 2 * math.pi * float(rope["rope_theta"]) ** steps
    factor, old = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = (old / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(
        waves < old / high,
        torch.ones_like(waves),
        torch.where(waves > old / low, torch.full_like(waves, factor), between),
    )
