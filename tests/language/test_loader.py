"""Loading: folders, GGUF files once, files of packages, and clear refusals."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mmlm.errors import CheckpointError, ConfigError
from mmlm.language import ChatFormat, languages, load_language, loader
from mmlm.messages import assistant, system, user
from tests.language.families import CHATML
from tests.language.families import FAMILIES as TEMPLATES

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    tokenizer = TEMPLATES[0].tokenizer()
    path = tmp_path / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


def write_gguf(path):
    """Write a tiny Llama with a byte-level tokenizer as GGUF, as llama.cpp's converter does."""
    gguf = pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|im_start|>", "<|im_end|>", *letters, "Ċ1", "Ġ1"]
    tokens += [f"<|spare{number}|>" for number in range(CONFIG.vocab_size - len(tokens))]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [3 if token.startswith("<|") else 1 for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ċ 1", "Ġ 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHATML)
    random = np.random.default_rng(0)

    def tensor(name, *shape):
        values = random.normal(scale=0.2, size=shape)
        writer.add_tensor(name, (values if len(shape) > 1 else 1 + values).astype(np.float32))

    tensor("token_embd.weight", CONFIG.vocab_size, 32)
    tensor("output_norm.weight", 32)
    for layer in range(2):
        for name, shape in {
            "attn_norm": (32,),
            "ffn_norm": (32,),
            "attn_q": (32, 32),
            "attn_k": (16, 32),
            "attn_v": (16, 32),
            "attn_output": (32, 32),
            "ffn_gate": (48, 32),
            "ffn_up": (48, 32),
            "ffn_down": (32, 48),
        }.items():
            tensor(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder_loads_with_its_tokenizer(folder):
    model, tokenizer = load_language(str(folder))
    assert model.config.model_type == "llama"
    assert not model.training
    assert ChatFormat(tokenizer).stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_the_precision_can_be_chosen(folder):
    model, _ = load_language(str(folder), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_a_recipe_names_a_language_model(folder):
    part = languages.read({"use": "causal_lm", "checkpoint": str(folder)}, origin="model.language")
    assert part.to_dict() == {
        "use": "causal_lm",
        "checkpoint": str(folder),
        "revision": None,
        "template": {},
        "system": None,
    }
    assert languages.read(part.to_dict(), origin="again") == part
    model, _ = part.load()
    assert model.num_parameters() > 0


def test_a_recipe_can_fix_the_variables_of_a_template(folder):
    qwen3 = next(family for family in TEMPLATES if family.name == "qwen3").template
    (folder / "chat_template.jinja").write_text(qwen3)
    settings = {"checkpoint": str(folder), "template": {"enable_thinking": False}}
    _, tokenizer = languages.read({"use": "causal_lm", **settings}, origin="x").load()
    text = ChatFormat(tokenizer).render([user("a")], add_generation_prompt=True)
    assert text.endswith("<think>\n\n</think>\n\n")


def test_a_recipe_can_replace_the_default_system_turn(folder):
    settings = {"checkpoint": str(folder), "system": "Be brief."}
    _, tokenizer = languages.read({"use": "causal_lm", **settings}, origin="x").load()
    form = ChatFormat(tokenizer)
    assert form.render([user("a")]) == form.render([system("Be brief."), user("a")])


def test_a_gguf_file_is_converted_once(gguf_file, capfd):
    model, tokenizer = load_language(str(gguf_file))
    assert "Converting tiny.gguf to safetensors, once" in capfd.readouterr().err
    again, _ = load_language(str(gguf_file))
    assert "Converting" not in capfd.readouterr().err
    ids = torch.tensor([tokenizer("a cat")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert not hasattr(model.config, "quantization_config")
    assert ChatFormat(tokenizer).encode([user("a"), assistant("b")], with_labels=True).labels


def test_a_full_disk_while_a_gguf_file_is_converted_is_said_and_leaves_nothing(
    gguf_file, monkeypatch
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*MMLM_CACHE"):
        load_language(str(gguf_file))
    monkeypatch.undo()
    model, _ = load_language(str(gguf_file))
    assert model.get_input_embeddings().weight.isfinite().all()


def test_a_gguf_file_keeps_its_weights(gguf_file):
    gguf = pytest.importorskip("gguf")
    model, _ = load_language(str(gguf_file))
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(gguf_file)).tensors}
    weight = model.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(weight, stored["token_embd.weight"])


def test_a_changed_gguf_file_is_converted_again(gguf_file, capfd):
    load_language(str(gguf_file))
    content = bytearray(gguf_file.read_bytes())
    content[-2] ^= 1
    gguf_file.write_bytes(content)
    capfd.readouterr()
    load_language(str(gguf_file))
    assert "Converting" in capfd.readouterr().err


def test_digits_are_parted_first_where_the_gguf_file_says_so(gguf_file):
    assert loader._pre_tokenizer_of(gguf_file) == "smollm"
    _, tokenizer = load_language(str(gguf_file))
    # The merges Ċ+1 and Ġ+1 exist, and must not be used: a digit stands alone.
    assert tokenizer.tokenize("a 1\n1") == ["a", "Ġ", "1", "Ċ", "1"]


def test_a_file_of_a_package_is_found(tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_weights_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    write_gguf(package / "tiny.gguf")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    model, _ = load_language("package:tiny_weights_package/tiny.gguf")
    assert model.config.hidden_size == 32


def test_an_interrupted_conversion_leaves_nothing_behind(gguf_file, monkeypatch):
    def fail(model):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loader, "_plain", fail)
        with pytest.raises(CheckpointError, match="No space"):
            load_language(str(gguf_file))
    model, _ = load_language(str(gguf_file))
    assert model.config.hidden_size == 32
    assert len(list((loader.cache_folder("gguf")).iterdir())) == 1


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [
        ("missing.gguf", "there is no file"),
        ("package:no_such_package_here/x.gguf", "not installed"),
        ("./no-such-folder", "cannot be loaded as a causal language model"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_key(checkpoint, reason):
    with pytest.raises(ConfigError, match=f"checkpoint.*{reason}|{reason}"):
        load_language(checkpoint)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("not a model at all, only words")
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        load_language(str(path))


def test_a_folder_without_safetensors_is_refused_and_never_unpickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_language(str(folder))
