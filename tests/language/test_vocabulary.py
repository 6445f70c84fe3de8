"""The image token and the pad token: one row each, in the right place."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig

from mmlm.language import add_image_token
from tests.language.families import FAMILIES

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def tokenizer_without_image(name: str = "chatml"):
    """A family's tokenizer before the image token is added."""
    from transformers import PreTrainedTokenizerFast

    from tests.language.families import _trained

    family = next(one for one in FAMILIES if one.name == name)
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(family.kind)), eos_token=family.eos
    )
    tokenizer.add_tokens(list(family.tokens), special_tokens=True)
    tokenizer.chat_template = family.template
    return tokenizer


def model_with(rows: int, *, tied: bool):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, vocab_size=rows, tie_word_embeddings=tied, pad_token_id=None)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_full_vocabulary_grows_by_mean_rows(tied):
    tokenizer = tokenizer_without_image()
    used = len(tokenizer)
    model = model_with(used, tied=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    head_before = model.get_output_embeddings().weight.detach().clone()
    number = add_image_token(tokenizer, model)
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert number == used
    assert inputs.shape[0] == model.config.vocab_size == used + 1
    assert (inputs is head) == tied
    assert torch.equal(inputs[:used], before)
    # A sum of 500 rows in float32: the order of additions moves the last bits.
    torch.testing.assert_close(inputs[number], before.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(head[number], head_before.mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_free_row_of_a_padded_vocabulary_is_used(tied):
    tokenizer = tokenizer_without_image()
    used = len(tokenizer)
    model = model_with(used + 40, tied=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    number = add_image_token(tokenizer, model)
    after = model.get_input_embeddings().weight
    assert after.shape[0] == used + 40
    assert number == used
    torch.testing.assert_close(after[number], before[:used].mean(0), rtol=1e-5, atol=1e-7)
    assert torch.equal(after[number + 1 :], before[number + 1 :])


def test_a_vocabulary_in_sixty_fours_stays_one():
    tokenizer = tokenizer_without_image()
    rows = -(-len(tokenizer) // 64) * 64
    tokenizer.add_tokens([f"<filler{number}>" for number in range(rows - len(tokenizer))])
    model = model_with(rows, tied=True)
    number = add_image_token(tokenizer, model)
    assert number == rows
    assert model.get_input_embeddings().weight.shape[0] == rows + 64


def test_the_bias_of_a_head_grows_too():
    tokenizer = tokenizer_without_image()
    model = AutoModelForCausalLM.from_config(PhiConfig(**SMALL, vocab_size=len(tokenizer)))
    torch.nn.init.normal_(model.lm_head.bias)
    before = model.lm_head.bias.detach().clone()
    number = add_image_token(tokenizer, model)
    torch.testing.assert_close(model.lm_head.bias[number], before.mean(), rtol=1e-5, atol=1e-7)


def test_adding_twice_is_adding_once():
    tokenizer = tokenizer_without_image()
    model = model_with(len(tokenizer), tied=True)
    number = add_image_token(tokenizer, model)
    weight = model.get_input_embeddings().weight.detach().clone()
    with torch.no_grad():
        model.get_input_embeddings().weight[number] = 7.0
    assert add_image_token(tokenizer, model) == number
    assert model.get_input_embeddings().weight.shape == weight.shape
    assert torch.equal(model.get_input_embeddings().weight[number], torch.full((16,), 7.0))


def test_text_keeps_its_logits():
    tokenizer = tokenizer_without_image()
    model = model_with(len(tokenizer), tied=True).eval()
    ids = torch.tensor([tokenizer("What is it?")["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
        add_image_token(tokenizer, model)
        assert torch.equal(model(ids).logits[..., : before.shape[-1]], before)


@pytest.mark.parametrize(
    ("name", "pad"),
    [
        ("chatml", "<|endoftext|>"),  # eos is <|im_end|>
        ("llama-2", "<unk>"),
        ("llama-3", "<|finetune_right_pad_id|>"),
        ("olmo-2", "<|pad|>"),  # nothing to take: one is added
    ],
)
@pytest.mark.parametrize("as_eos", [True, False], ids=["pad was eos", "no pad"])
def test_the_pad_token_is_never_the_end_of_a_turn(name, pad, as_eos):
    tokenizer = tokenizer_without_image(name)
    if as_eos:
        tokenizer.pad_token = tokenizer.eos_token
    model = model_with(len(tokenizer), tied=True)
    add_image_token(tokenizer, model)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] > tokenizer.pad_token_id


def test_a_pad_token_that_is_not_eos_stays():
    tokenizer = tokenizer_without_image("llama-3")
    tokenizer.pad_token = "<|begin_of_text|>"
    add_image_token(tokenizer, model_with(len(tokenizer), tied=True))
    assert tokenizer.pad_token == "<|begin_of_text|>"
