"""Compositions that equal a class of transformers are saved as exactly that class."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from mmlm import hub
from mmlm.assistant import Assistant, load
from mmlm.errors import CheckpointError, ConfigError
from mmlm.hub import parity
from mmlm.messages import Text, user
from tests.hub.stranger import as_a_stranger
from tests.tiny import TEXT_KINDS, VISION_KINDS, compose_tiny, picture, save_vision

TIMM = {"use": "timm", "checkpoint": "test_efficientnet", "pretrained": False, "feature": "final"}
LLAVA, FASTVLM = "LlavaForConditionalGeneration", "FastVlmForConditionalGeneration"
DEEPSEEK = "DeepseekVLForConditionalGeneration"


def ask(assistant):
    return assistant.answer("What is it?", [picture(3)], max_new_tokens=8)


def test_a_stranger_without_mmlm_gets_the_same_answer(tmp_path):
    """The other classes are asked in `tests/contracts/test_stock_classes.py`."""
    assistant = compose_tiny(tmp_path, image={"use": "letterbox"})
    assert assistant.save(tmp_path / "model") == []
    wanted = ask(assistant)
    ((name, processor, answer, piped),) = as_a_stranger([tmp_path / "model"], tmp_path)
    assert (name, processor) == (LLAVA, "LlavaProcessor")
    assert answer == piped
    assert answer.strip() == wanted != ""


@pytest.mark.parametrize("vision", VISION_KINDS)
@pytest.mark.parametrize("language", TEXT_KINDS)
def test_every_tower_with_every_language_model_is_llava_and_comes_back(tmp_path, vision, language):
    eye = {"use": "hf", "checkpoint": str(save_vision(tmp_path / "v", vision)), "layer": -2}
    if vision == "dinov2_with_registers":
        eye["prefix"] = "drop_first"
    assistant = compose_tiny(tmp_path, language=language, eye=eye)
    assert assistant.save(tmp_path / "model") == []
    again = load(tmp_path / "model", device="cpu")
    assert again.model.config.vision_facts == assistant.model.config.vision_facts
    assert ask(again) == ask(assistant)


VARIANTS = {
    "linear": {"connector": {"use": "linear"}},
    "linear without bias": {"connector": {"use": "linear", "bias": False}},
    "mlp of depth 1": {"connector": {"use": "mlp", "depth": 1}},
    "relu without bias": {"connector": {"use": "mlp", "activation": "relu", "bias": False}},
    "letterbox": {"image": {"use": "letterbox"}},
    "crop": {"image": {"use": "crop"}},
    "crop with zoom": {"image": {"use": "crop", "zoom": 1.25}},
    "first layer": {"eye": {"layer": 1}},
    "CLS kept": {"eye": {"prefix": "keep_as_tokens"}},
    "other side": {"eye": {"side_px": 48}},
}


@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("noted", [True, False], ids=["as noted", "as read"])
def test_variants_of_llava_come_back_with_and_without_our_note(tmp_path, parts, noted):
    checkpoint = str(save_vision(tmp_path / "clip", "clip"))
    eye = {"use": "hf", "checkpoint": checkpoint, **parts.get("eye", {})}
    assistant = compose_tiny(tmp_path, **{**parts, "eye": eye})
    assert assistant.save(tmp_path / "model") == []
    assert json.loads((tmp_path / "model/config.json").read_text())["architectures"] == [LLAVA]
    if not noted:
        (tmp_path / "model/mmlm.json").unlink()
    again = load(tmp_path / "model", device="cpu")
    assert again.model.config.image == assistant.model.config.image
    for key in ("grid", "side", "num_prefix", "kept_prefix", "mean", "std"):
        assert again.model.config.vision_facts[key] == assistant.model.config.vision_facts[key]
    assert ask(again) == ask(assistant)


@pytest.mark.parametrize("vision", ["siglip", "dinov2_with_registers"])
@pytest.mark.parametrize("noted", [True, False], ids=["as noted", "as read"])
def test_the_output_after_the_last_norm_is_deepseek_vl(tmp_path, vision, noted):
    eye = {"use": "hf", "layer": "last", "prefix": "keep_as_tokens"}
    eye["checkpoint"] = str(save_vision(tmp_path / "v", vision))
    assistant = compose_tiny(tmp_path, eye=eye, language="qwen2")
    assert assistant.save(tmp_path / "model") == []
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["architectures"] == [DEEPSEEK]
    if not noted:
        (tmp_path / "model/mmlm.json").unlink()
    assert ask(load(tmp_path / "model", device="cpu")) == ask(assistant)


def test_a_stock_folder_written_by_transformers_is_read(tmp_path):
    """The layout that `save_pretrained` writes today, not ours, and nothing of ours beside it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assistant = compose_tiny(tmp_path, image={"use": "letterbox"})
    assistant.save(tmp_path / "model")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    stock.save_pretrained(tmp_path / "theirs")
    AutoProcessor.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "theirs")
    assert ask(load(tmp_path / "theirs", device="cpu")) == ask(assistant)


@pytest.mark.parametrize(
    ("vision", "prefix"),
    [("clip", "vision_model."), ("siglip", "vision_model."), ("dinov2", "")],
    ids=["clip", "siglip", "dinov2"],
)
def test_the_tower_stands_in_the_file_as_published(tmp_path, vision, prefix):
    """vLLM refuses `vision_tower.embeddings`, which transformers 5 writes by itself."""
    compose_tiny(tmp_path, vision).save(tmp_path / "model")
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert any(key.startswith(f"vision_tower.{prefix}embeddings.") for key in keys)
    assert "language_model.model.embed_tokens.weight" in keys
    assert "multi_modal_projector.linear_1.weight" in keys


def test_servers_can_count_the_tokens_of_a_size(tmp_path):
    """SigLIP's own image processor has no `crop_size`, from which LlavaProcessor counts."""
    from transformers import AutoProcessor

    compose_tiny(tmp_path, "siglip").save(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    counted = processor._get_num_multimodal_tokens([(50, 80), (10, 10)])
    assert counted.num_image_tokens == [16, 16]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"vision": "dinov2_with_registers"}, "4 prefix tokens .* are dropped"),
        ({"vision": "siglip", "eye": {"layer": "last"}, "connector": {"use": "linear"}}, "feature"),
        ({"reducer": {"use": "pixel_shuffle"}}, "reducer 'pixel_shuffle'"),
        ({"connector": {"use": "mlp", "depth": 3}}, "depth 3"),
    ],
    ids=["registers dropped", "after the norm, linear", "reducer", "three layers"],
)
def test_what_is_no_stock_class_is_saved_as_ours_and_says_why(tmp_path, parts, said):
    parts = dict(parts)
    vision = parts.pop("vision", "clip")
    eye = {"use": "hf", "checkpoint": str(save_vision(tmp_path / vision, vision))}
    assistant = compose_tiny(tmp_path, **{**parts, "eye": eye | parts.get("eye", {})})
    reasons = assistant.save(tmp_path / "model")
    assert any(__import__("re").search(said, reason) for reason in reasons), reasons
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["model_type"] == "mmlm"
    assert ask(load(tmp_path / "model", device="cpu")) == ask(assistant)
    with pytest.raises(ConfigError, match="not a class of transformers"):
        hub.save_stock(assistant.model, assistant.processor, tmp_path / "other")


def test_why_not_needs_no_weights_and_names_the_nearest_class(tmp_path):
    assistant = compose_tiny(tmp_path, connector={"use": "mlp", "depth": 3})
    found = hub.match(assistant.model.config)
    assert found.target is None
    assert found.nearest.class_name == LLAVA
    assert found.reasons == [
        f"not {LLAVA}: connector mlp has depth 3 (the projector has two layers)"
    ]


def test_what_a_stock_class_does_otherwise_with_several_pictures_is_said(tmp_path):
    tiles = {"use": "tiles", "rule": "anyres", "shrink_above": 9}
    config = compose_tiny(tmp_path, "siglip", image=tiles).model.config
    said = {row.tool: row.reason for row in hub.opens_in(config)}
    assert said["stock class"] == (
        "saved as LlavaOnevisionForConditionalGeneration; of several pictures in one conversation, "
        "the stock class shows each as a single tile"
    )


def test_an_internvl_has_no_other_tower_than_its_own(tmp_path):
    """The class would rebuild any other tower as its own, with random weights, when it is read."""
    words = {"reducer": {"use": "pixel_shuffle"}, "connector": {"use": "norm_mlp"}}
    eye = {"use": "hf", "checkpoint": str(save_vision(tmp_path / "clip", "clip")), "layer": "last"}
    config = compose_tiny(tmp_path, eye=eye, **words).model.config
    assert any("InternViT" in reason for reason in hub.InternVL().why_not(config))
    assert getattr(hub.match(config).target, "use", None) != "internvl"


@pytest.mark.parametrize("target", [hub.Idefics3, hub.AyaVision, hub.Cohere2Vision, hub.InternVL])
def test_an_odd_grid_is_no_stock_class_that_stacks_neighbours(tmp_path, target):
    """They do not fill it: the reshape fails there."""
    eye = {"use": "hf", "checkpoint": str(save_vision(tmp_path / "eye", "siglip"))}
    shuffle = {"use": "pixel_shuffle", "factor": 2, "pad": True}
    made = compose_tiny(tmp_path, eye=eye | {"layer": "last", "side_px": 24}, reducer=shuffle)
    said = target().why_not(made.model.config)
    assert any("grid of 3 x 3 is filled with zeros" in reason for reason in said), said


def test_mistral3_needs_the_eps_of_the_language_model(tmp_path):
    tower = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "patch_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8, "image_size": 64,
    }  # fmt: skip
    native = {"use": "native", "rule": "long_side", "long_side_px": 64, "max_tokens": 4}
    merger = {"use": "patch_merger", "eps": 1e-3}
    eye = {"use": "hf", "config": tower, "layer": "last"}
    config = compose_tiny(tmp_path, eye=eye, image=native, connector=merger).model.config
    reasons = hub.Mistral3().why_not(config)
    assert len(reasons) == 2
    assert "max_tokens 4 cuts below the 16" in reasons[0]
    assert "connector.eps is 0.001" in reasons[1]


def test_bfloat16_weights_are_written_as_they_are_and_stay_the_same_tensors(tmp_path):
    assistant = compose_tiny(tmp_path)
    model = assistant.model.cast(torch.bfloat16)
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    assert assistant.save(tmp_path / "model") == []
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
    again, _ = hub.load_parts(tmp_path / "model")
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_rounded_rotary_tables_are_refused_with_the_mend(tmp_path):
    """`to(dtype)` rounds what no checkpoint holds, so the folder would answer otherwise."""
    assistant = compose_tiny(tmp_path)
    assistant.model.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"inv_freq.*model\.cast\(dtype\)"):
        assistant.save(tmp_path / "model")


def test_saving_leaves_training_mode_and_gradients_alone(tmp_path):
    assistant = compose_tiny(tmp_path)
    assistant.model.train()
    weight = assistant.model.model.connector.last_linear().weight
    weight.grad = torch.ones_like(weight)
    assistant.save(tmp_path / "model")
    assert assistant.model.training
    assert weight.requires_grad
    assert bool((weight.grad == 1).all())


def test_a_folder_that_answers_otherwise_is_refused_and_the_earlier_one_stays(
    tmp_path, monkeypatch
):
    assistant = compose_tiny(tmp_path)
    assistant.save(tmp_path / "model")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    target = hub.match(assistant.model.config).target
    honest = type(target).to_stock

    def swapped(self, state, config):
        published = honest(self, state, config)
        key = "multi_modal_projector.linear_1.weight"
        return published | {key: published[key].flip(0)}

    monkeypatch.setattr(type(target), "to_stock", swapped)
    with pytest.raises(CheckpointError, match=r"logits differ by .* was not kept"):
        assistant.save(tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_missing_weights_are_found_while_saving(tmp_path, monkeypatch):
    assistant = compose_tiny(tmp_path)
    target = hub.match(assistant.model.config).target
    honest = type(target).to_stock

    def forgetful(self, state, config):
        published = honest(self, state, config)
        del published["multi_modal_projector.linear_2.weight"]
        return published

    monkeypatch.setattr(type(target), "to_stock", forgetful)
    with pytest.raises(CheckpointError, match=r"missing keys.*linear_2\.weight"):
        assistant.save(tmp_path / "model")


def test_a_full_disk_keeps_the_earlier_folder(tmp_path, monkeypatch):
    assistant = compose_tiny(tmp_path)
    assistant.save(tmp_path / "model")
    answer = ask(assistant)
    with torch.no_grad():
        assistant.model.model.connector.last_linear().weight.add_(1.0)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier folder"):
        assistant.save(tmp_path / "model")
    assert ask(load(tmp_path / "model", device="cpu")) == answer


def test_the_probe_moves_the_logits(tmp_path):
    """Parity would mean nothing if the picture did not matter to the logits."""
    assistant = compose_tiny(tmp_path)
    seen = parity.listen(assistant.model, assistant.processor)
    assert seen.logits.std() > 1e-2
    blind = assistant.processor.encode_chat([user(parity.QUESTION)], add_generation_prompt=True)
    assert len(seen.ids) == len(blind.ids) + 17  # 16 features and the line end behind the picture
    assert Text(parity.QUESTION) in parity.probe_messages()[0].content


def test_nothing_in_a_saved_folder_names_a_place_of_this_machine(tmp_path):
    assistant = compose_tiny(tmp_path)
    assistant.save(tmp_path / "model")
    hub.save_mmlm(assistant.model, assistant.processor, tmp_path / "ours")
    assistant.save(tmp_path / "delta", delta=True)
    for path in tmp_path.glob("[mod]*/*"):
        if path.suffix != ".safetensors" and path.parent.name in ("model", "ours", "delta"):
            assert str(tmp_path) not in path.read_text(encoding="utf-8"), path


def test_the_folder_holds_recipe_card_and_what_transformers_needs(tmp_path):
    assistant = compose_tiny(tmp_path)
    assistant.save(tmp_path / "model", recipe={"model": {"image": {"use": "squash"}}})
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md",
        "recipe.resolved.yaml", "mmlm.json",
    }  # fmt: skip


def test_an_assistant_can_be_saved_where_it_was_loaded_from(tmp_path):
    assistant = compose_tiny(tmp_path)
    assistant.save(tmp_path / "model")
    again = load(tmp_path / "model", device="cpu")
    assert again.save(tmp_path / "model") == []
    assert ask(load(tmp_path / "model", device="cpu")) == ask(assistant)
    assert isinstance(again, Assistant)
