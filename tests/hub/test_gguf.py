"""Folders for llama.cpp: what is refused, what the files hold, and what llama.cpp answers."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from mmlm.errors import ConfigError
from mmlm.hub.gguf import proof, save_gguf, why_no_gguf
from mmlm.hub.gguf.modelfile import go_template
from tests.tiny import CHATML, compose_tiny, save_vision

gguf = pytest.importorskip("gguf")
HAS_LLAMA = importlib.util.find_spec("xllamacpp") is not None


def composed(folder, vision="siglip", language="llama", layer=-2, **parts):
    eye = {"use": "hf", "checkpoint": str(save_vision(folder / vision, vision)), "layer": layer}
    return compose_tiny(folder, language=language, eye=eye, **parts)


@pytest.fixture
def unasked(monkeypatch):
    monkeypatch.setattr("mmlm.hub.gguf.export.can_prove", lambda: False)


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_the_files_hold_model_eye_and_template(tmp_path, unasked):
    assistant = composed(tmp_path, "clip", "smollm")
    assert save_gguf(assistant.model, assistant.processor, tmp_path / "out") is None
    text, eye = (fields(tmp_path / "out" / name) for name in ("model.gguf", "mmproj.gguf"))
    assert text["general.architecture"] == "llama"
    assert text["tokenizer.ggml.pre"] == "gpt-2"
    assert text["tokenizer.ggml.tokens"][assistant.processor.image_token_id] == "<image>"
    assert CHATML in text["tokenizer.chat_template"]
    assert eye["clip.projector_type"] == "mlp"
    assert eye["clip.vision.feature_layer"] == [2]  # hidden_states[-2] of three layers
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out/mmproj.gguf").tensors}
    assert {"v.class_embd", "v.blk.1.ffn_up.weight", "mm.0.weight", "mm.2.bias"} <= names
    assert not {name for name in names if name.startswith(("v.blk.2.", "v.post_ln"))}
    modelfile = (tmp_path / "out/Modelfile").read_text()
    assert modelfile.startswith("FROM ./model.gguf\nFROM ./mmproj.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "class token behind the patches" in (tmp_path / "out/README.md").read_text()


def test_weights_in_bfloat16_are_not_rounded(tmp_path, unasked):
    assistant = composed(tmp_path)
    assistant.model.cast(torch.bfloat16)
    save_gguf(assistant.model, assistant.processor, tmp_path / "out")
    for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors:
        if tensor.name == "blk.0.ffn_up.weight":
            assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
            read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            ours = assistant.model.model.language.layers[0].mlp.up_proj.weight
            assert torch.equal(torch.from_numpy(read.copy()), ours.float())


def test_ollama_writes_a_conversation_as_the_chat_template_does(tmp_path):
    assistant = composed(tmp_path)
    written = go_template(assistant.processor)
    assert written == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_start|>user\n{{ end }}{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
        "{{ .Response }}<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"connector": {"use": "linear"}}, "mlp of depth 2"),
        ({"connector": {"use": "mlp", "activation": "relu"}}, "'relu' and not gelu"),
        ({"reducer": {"use": "pixel_shuffle", "factor": 2}}, "reducer 'pixel_shuffle'"),
        ({"vision": "dinov2"}, "llama.cpp's LLaVA takes CLIP and SigLIP"),
        ({"language": "gemma"}, "this export writes llama, mistral, qwen2, qwen3"),
        ({"image": {"use": "tiles", "rule": "anyres", "grids": [[1, 2]]}}, "one square picture"),
    ],
)
def test_what_llama_cpp_has_no_graph_for_is_refused_with_the_condition(tmp_path, parts, said):
    assistant = composed(tmp_path, **parts)
    with pytest.raises(ConfigError, match=said):
        save_gguf(assistant.model, assistant.processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cuts_by_another_rule_is_refused(tmp_path):
    from tokenizers import pre_tokenizers

    assistant = composed(tmp_path)
    backend = assistant.processor.tokenizer.backend_tokenizer
    before = backend.pre_tokenizer
    try:
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        said = why_no_gguf(assistant.model.config, assistant.processor.tokenizer)
    finally:
        backend.pre_tokenizer = before
    assert "no name for the rule" in said[0]


@pytest.mark.skipif(not HAS_LLAMA, reason="needs xllamacpp")
@pytest.mark.slow
class TestLlamaCpp:
    @pytest.mark.parametrize("language", ["llama", "qwen2", "smollm"])
    @pytest.mark.parametrize("layer", [-2, -1, "last"])
    def test_siglip_gives_the_same_token_and_probability(self, tmp_path, language, layer):
        assistant = composed(tmp_path, "siglip", language, layer)
        said = save_gguf(assistant.model, assistant.processor, tmp_path / "out")
        assert said is not None
        assert not said.is_tie
        assert said.apart is None or said.apart < 0.01
        assert "is that of the model" in (tmp_path / "out/README.md").read_text()

    def test_clip_gives_the_same_token(self, tmp_path):
        assistant = composed(tmp_path, "clip", "qwen2", image={"use": "letterbox"})
        said = save_gguf(assistant.model, assistant.processor, tmp_path / "out")
        assert said is not None
        assert not said.is_tie

    def test_a_file_that_answers_otherwise_is_not_written(self, tmp_path, monkeypatch):
        from mmlm.errors import CheckpointError

        assistant = composed(tmp_path)
        monkeypatch.setattr(proof, "TIE", -1.0)
        with pytest.raises(CheckpointError, match="likeliest token"):
            save_gguf(assistant.model, assistant.processor, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_tokenizer_of_sentence_pieces_is_read_token_for_token(self, tmp_path):
        assistant = composed(tmp_path)
        swap_tokenizer(assistant, tmp_path)
        said = save_gguf(assistant.model, assistant.processor, tmp_path / "out")
        assert said is not None  # the number of prompt tokens was compared


def swap_tokenizer(assistant, folder):
    """Give an assistant a tokenizer after SentencePiece, with a few merges."""
    source = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
    }  # fmt: skip
    letters = "▁abcdefghijklmnopqrstuvwxyzWUAST?:"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(100)), *letters]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "p"), ("▁p", "i"),
              ("u", "r"), ("h", "a"), ("W", "ha")]  # fmt: skip
    pieces += ["".join(pair) for pair in merges]
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>"]
    pieces += specials[3:]
    source["model"] = {
        "type": "BPE", "vocab": {piece: number for number, piece in enumerate(pieces)},
        "merges": [list(pair) for pair in merges], "unk_token": "<unk>", "byte_fallback": True,
        "fuse_unk": True,
    }  # fmt: skip
    source["added_tokens"] = [
        {"id": pieces.index(token), "content": token, "special": True, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False} for token in specials
    ]  # fmt: skip
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from mmlm.processing import MMLMProcessor

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(source)),
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        unk_token="<unk>", chat_template=CHATML,
    )  # fmt: skip
    config = assistant.model.config
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    image_processor = assistant.processor.image_processor
    assistant.processor = MMLMProcessor(image_processor, tokenizer)
