"""What every stock class promises: a composition that equals it is saved as it, and comes back.

`EXAMPLES` holds the words of a tiny composition for each class of the registry; a class that is
not named there fails the first test. That logits and greedy text are equal is asserted while
saving (`mmlm.hub.parity`).
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from mmlm import hub
from mmlm.assistant import load
from mmlm.errors import CheckpointError
from mmlm.hub import is_only_whole, match, stock_classes
from tests.hub.stranger import as_a_stranger
from tests.tiny import compose_tiny, picture, save_vision

TIMM = {"use": "timm", "pretrained": False, "feature": "final"}
SHUFFLE = {"use": "pixel_shuffle", "factor": 2}
GATE = {"use": "gated_mlp", "hidden_width": 24, "bias": True}
RMS = {"use": "norm_mlp", "depth": 1, "norm": "rms", "bias": False, "eps": 1e-6}

NAFLEX = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
    "num_patches": 16,
}

PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "patch_size": 8,
    "image_size": 64,
}

QWEN_VIT = {
    "model_type": "qwen2_5_vl_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 8,
    "window_size": 32,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 24,
}

EXAMPLES = {
    "llava": {"vision": "clip"},
    "llava_next": {
        "vision": "clip",
        "image": {"use": "tiles", "rule": "anyres", "grids": [[1, 2], [2, 1]]},
    },
    "llava_onevision": {
        "vision": "siglip",
        "image": {
            "use": "tiles",
            "rule": "anyres",
            "grids": [[1, 2], [2, 1], [2, 2]],
            "shrink_above": 1,
        },
        "language": "qwen2",
    },
    "mistral3": {
        "eye": {"use": "hf", "config": PIXTRAL, "layer": "last"},
        "image": {"use": "native", "rule": "long_side", "long_side_px": 48, "max_tokens": 9},
        "connector": {"use": "patch_merger", "eps": 1e-6},
    },
    "hyperclovax_vision": {
        "eye": {"use": "hf", "config": QWEN_VIT, "layer": "last"},
        "image": {"use": "native", "min_tokens": 2, "max_tokens": 12},
        "connector": {"use": "linear"},
        "language": "qwen2",
    },
    "fast_vlm": {"eye": {**TIMM, "checkpoint": "test_efficientnet", "side_px": 64}},
    "perception_lm": {"eye": {**TIMM, "checkpoint": "test_vit", "side_px": 64}},
    "deepseek_vl": {"vision": "siglip", "layer": "last"},
    "fuyu": {
        "vision": "patches",
        "eye": {"use": "patches", "patch_px": 8, "side_px": 32, "resample": "bilinear"},
        "image": {"use": "native", "rule": "padded", "box_px": [32, 64], "layout": "row_ends"},
        "connector": {"use": "linear"},
        "language": "persimmon",
        "talk": {"format": "fuyu"},
    },
    "idefics3": {
        "vision": "siglip",
        "layer": "last",
        "reducer": SHUFFLE,
        "connector": {"use": "linear", "bias": False},
    },
    "smolvlm": {
        "vision": "siglip",
        "layer": "last",
        "reducer": SHUFFLE,
        "connector": {"use": "linear", "bias": False},
    },
    "internvl": {
        "vision": "internvl",
        "layer": "last",
        "reducer": SHUFFLE,
        "connector": {"use": "norm_mlp"},
    },
    "lfm2_vl": {
        "eye": {"use": "hf", "config": NAFLEX, "layer": "last"},
        "image": {"use": "native", "min_tokens": 2, "max_tokens": 12},
        "reducer": SHUFFLE,
        "connector": {"use": "norm_mlp", "hidden_widths": [24]},
        "language": "qwen2",
    },
    "aya_vision": {"vision": "clip", "reducer": SHUFFLE, "connector": {**GATE, "norm": True}},
    "cohere2_vision": {
        "vision": "siglip",
        "layer": "last",
        "reducer": SHUFFLE,
        "connector": GATE,
        "language": "qwen2",
    },
    "paligemma": {
        "vision": "siglip",
        "layer": "last",
        "connector": {"use": "linear"},
        "language": "gemma",
    },
    "gemma3": {
        "vision": "siglip",
        "layer": "last",
        "reducer": {"use": "average_pool", "factor": 2},
        "connector": RMS,
        "language": "gemma3",
    },
}


TWINS = {"smolvlm": "idefics3"}
"""Classes that compute what another one computes, which is written where none is named."""


def composed(folder: Path, name: str):
    """Return the tiny assistant of a class, and the words it was made of."""
    words = dict(EXAMPLES[name])
    layer = words.pop("layer", -2)
    if "eye" not in words:
        kind = words["vision"]
        checkpoint = str(save_vision(folder / "eye", kind))
        words["eye"] = {"use": "hf", "checkpoint": checkpoint, "layer": layer}
        words["eye"] |= {"mean": [0.5] * 3, "std": [0.5] * 3} if kind == "internvl" else {}
    # Each with words of its own, so that one class' answer is not another's.
    assistant = compose_tiny(folder, seed=10 * sorted(EXAMPLES).index(name), **words)
    # Where embeddings are tied, a tiny model else only says its last token again: a line break.
    assistant.model.get_input_embeddings().weight.data.mul_(0.1)
    return assistant


def ask(assistant, questions=("What is it?",), count: int = 1):
    pictures = [picture(seed) for seed in range(3, 3 + count)]
    return [assistant.answer(each, pictures, max_new_tokens=8) for each in questions]


def test_every_class_has_an_example():
    assert set(EXAMPLES) == set(stock_classes)


@pytest.fixture(scope="module")
def made_of(tmp_path_factory):
    """Return what composes and saves the example of a class, once."""

    @cache
    def make(name):
        if name == "hyperclovax_vision" and "qwen2_5_vl_vision" not in MODEL_MAPPING_NAMES:
            pytest.skip("this transformers builds no such tower beside a language model")
        folder = tmp_path_factory.mktemp(name)
        assistant = composed(folder, name)
        if name not in TWINS:
            return assistant, folder, assistant.save(folder / "model")
        target = stock_classes[name]()
        hub.save_stock(assistant.model, assistant.processor, folder / "model", target=target)
        return assistant, folder, []

    return make


@pytest.mark.parametrize("name", sorted(EXAMPLES))
class TestEveryClass:
    @pytest.fixture
    def made(self, name, made_of):
        return made_of(name)

    def test_it_is_foretold_and_written(self, name, made):
        assistant, folder, reasons = made
        assert reasons == []
        found = match(assistant.model.config)
        assert found.target is not None
        assert found.target.use == TWINS.get(name, name)
        config = json.loads((folder / "model/config.json").read_text())
        assert config["architectures"] == [stock_classes[name].class_name]
        assert config["model_type"] == stock_classes[name].model_type
        rows = {row.tool: row for row in hub.opens_in(assistant.model.config)}
        assert rows["transformers"].verdict == "yes"
        assert found.target.class_name in rows["transformers"].reason

    @pytest.mark.parametrize("noted", [True, False], ids=["as noted", "as read"])
    def test_it_comes_back(self, name, made, noted, tmp_path):
        assistant, folder, _ = made
        (tmp_path / "copy").symlink_to(folder / "model")
        if not noted:
            (tmp_path / "copy").unlink()
            (tmp_path / "copy").mkdir()
            for path in (folder / "model").iterdir():
                if path.name != "mmlm.json":
                    (tmp_path / "copy" / path.name).symlink_to(path)
        again = load(tmp_path / "copy", device="cpu")
        ours, theirs = assistant.model.config, again.model.config
        assert theirs.image_policy == ours.image_policy
        for key in ("grid", "side", "num_prefix", "kept_prefix", "mean", "std"):
            assert theirs.vision_facts[key] == ours.vision_facts[key], key
        assert ask(again) == ask(assistant)
        assert ask(again, count=2) == ask(assistant, count=2)
        assert match(theirs).target.use == TWINS.get(name, name)

    @pytest.mark.slow
    def test_a_folder_that_transformers_writes_again_is_read(self, name, made, tmp_path):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        assistant, folder, _ = made
        stock = AutoModelForImageTextToText.from_pretrained(folder / "model")
        stock.save_pretrained(tmp_path / "theirs")
        AutoProcessor.from_pretrained(folder / "model").save_pretrained(tmp_path / "theirs")
        assert ask(load(tmp_path / "theirs", device="cpu")) == ask(assistant)


@pytest.mark.slow
def test_strangers_without_mmlm_get_the_same_answers(made_of, tmp_path):
    made = {name: made_of(name) for name in sorted(EXAMPLES)}
    heard = as_a_stranger([folder / "model" for _, folder, _ in made.values()], tmp_path)
    answers = {name: ask(assistant)[0] for name, (assistant, *_) in made.items()}
    assert [answer.strip() for _, _, answer, _ in heard] == list(answers.values())
    assert [piped for *_, piped in heard] == [answer for _, _, answer, _ in heard]
    assert [row[0] for row in heard] == [stock_classes[name].class_name for name in made]
    # Empty answers would equal one another whatever was read, and so would those of one folder.
    assert all(answers.values())
    assert len(set(answers.values())) > len(answers) / 2


@pytest.mark.parametrize("name", ["mistral3", "hyperclovax_vision"])
def test_a_folder_with_the_marks_of_its_family_is_taken_whole(made_of, tmp_path, name):
    _, folder, _ = made_of(name)
    shutil.copytree(folder / "model", tmp_path / "model")
    assert not is_only_whole(tmp_path / "model")
    file, old, new = {
        "mistral3": ("processor_config.json", '"image_end_token": ""', '"image_end_token": "[E]"'),
        "hyperclovax_vision": ("tokenizer.json", '"content": "<image>"', '"content": "<|pad|>"'),
    }[name]
    text = (tmp_path / "model" / file).read_text()
    assert old in text
    (tmp_path / "model" / file).write_text(text.replace(old, new))
    assert is_only_whole(tmp_path / "model")


def test_the_processor_of_a_family_is_refused_with_its_name(made_of, tmp_path):
    _, folder, _ = made_of("internvl")
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model/processor_config.json"
    values = json.loads(path.read_text()) | {"processor_class": "InternVLProcessor"}
    path.write_text(json.dumps(values))
    (tmp_path / "model/mmlm.json").unlink()
    with pytest.raises(CheckpointError, match="InternVLProcessor, which writes its own marks"):
        load(tmp_path / "model", device="cpu")
