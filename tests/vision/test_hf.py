"""Towers of transformers: the right layer, tokens, size and normalisation, or a clear refusal."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
)

from mmlm.errors import ConfigError
from mmlm.features import Grid, Size
from mmlm.vision import HFVisionConfig
from mmlm.vision.positions import resize_table

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TOWER = {**SMALL, "image_size": 32, "patch_size": 8}
KINDS = {
    "clip_vision_model": {},
    "siglip_vision_model": {},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
}
PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "dinov2_with_registers": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each kind of tower, as `save_pretrained` writes it."""
    made = {}
    for kind, more in KINDS.items():
        torch.manual_seed(0)
        made[kind] = tmp_path_factory.mktemp(kind)
        AutoModel.from_config(AutoConfig.for_model(kind, **TOWER, **more)).save_pretrained(
            made[kind]
        )
    return made


def pixels(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def theirs(folder) -> PreTrainedModel:
    return AutoModel.from_pretrained(folder).eval()


@pytest.mark.parametrize("layer", [-2, -1, 0, 3, "last"], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_hidden_state_of_transformers_without_its_prefix(folders, kind, layer):
    encoder = HFVisionConfig(checkpoint=str(folders[kind]), layer=layer).load()
    with torch.no_grad():
        out = theirs(folders[kind])(pixels(), output_hidden_states=True)
        wanted = out.last_hidden_state if layer == "last" else out.hidden_states[layer]
        got = encoder(pixels())
    assert encoder.facts.num_prefix == PREFIX[kind]
    assert torch.equal(got.values, wanted[:, PREFIX[kind] :].reshape(-1, 32))
    assert encoder.facts.feature == (
        "last_hidden_state" if layer == "last" else f"hidden_states[{layer}]"
    )


@pytest.mark.parametrize(
    ("prefix", "kept"), [("drop", 0), ("drop_first", 3), ("keep_as_tokens", 4)]
)
def test_prefix_tokens_are_dropped_or_kept_before_the_patches(folders, prefix, kept):
    folder = folders["dinov2_with_registers"]
    encoder = HFVisionConfig(checkpoint=str(folder), prefix=prefix).load()
    with torch.no_grad():
        states = theirs(folder)(pixels(), output_hidden_states=True).hidden_states[-2]
        got = encoder(pixels())
    assert torch.equal(got.values, states[:, 4 - kept :].reshape(-1, 32))
    assert torch.equal(got.prefix, states[:, :4])
    assert got.grids[0] == (Grid(1, 1, 16 + kept) if kept else Grid(1, 4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_another_side_equals_transformers_own_interpolation(folders, kind):
    encoder = HFVisionConfig(checkpoint=str(folders[kind]), layer="last", side_px=48).load()
    dynamic = {} if "dino" in kind else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        wanted = theirs(folders[kind])(pixels(48), **dynamic).last_hidden_state
        got = encoder(pixels(48)).values
    assert encoder.facts.grid == (6, 6)
    # Both interpolate the same table by the same kernel: equal to the last bit.
    assert torch.equal(got, wanted[:, PREFIX[kind] :].reshape(-1, 32))


def test_a_resized_tower_runs_in_the_stock_class_without_a_flag(folders):
    encoder = HFVisionConfig(checkpoint=str(folders["siglip_vision_model"]), side_px=48).load()
    assert encoder.tower_config["image_size"] == 48
    again = AutoModel.from_config(AutoConfig.for_model(**encoder.tower_config)).eval()
    again.load_state_dict(encoder.tower.state_dict())
    with torch.no_grad():
        states = again(pixels(48), output_hidden_states=True).hidden_states[-2]
        assert torch.equal(encoder(pixels(48)).values, states.reshape(-1, 32))


def test_a_table_keeps_its_prefix_and_its_places():
    table = torch.randn(2 + 4 * 4, 5)
    same = resize_table(table, (4, 4), (4, 4), torch.Size([18, 5]))
    # At scale 1 a bicubic kernel is 1 at its place and 0 elsewhere.
    torch.testing.assert_close(same, table, rtol=0, atol=0)
    ramp = torch.arange(8.0)[:, None].expand(8, 8).reshape(64, 1)
    wide = resize_table(ramp, (8, 8), (8, 16), torch.Size([128, 1])).reshape(8, 16)
    # Rows keep their values when only the columns become more: the table is resized in 2-D.
    torch.testing.assert_close(wide, ramp.reshape(8, 8).repeat(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("joint", "model"),
    [(CLIPConfig, CLIPModel), (SiglipConfig, SiglipModel)],
    ids=["clip", "siglip"],
)
def test_the_tower_of_a_joint_checkpoint_is_loaded_alone(joint, model, tmp_path):
    text = {**SMALL, "vocab_size": 99, "max_position_embeddings": 16}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    whole = model(joint(vision_config=TOWER, text_config={**text, **ids})).eval()
    whole.save_pretrained(tmp_path)
    encoder = HFVisionConfig(checkpoint=str(tmp_path)).load()
    assert not any("text" in name for name, _ in encoder.named_parameters())
    with torch.no_grad():
        states = whole.vision_model(pixels(), output_hidden_states=True).hidden_states[-2]
        got = encoder(pixels()).values
    assert torch.equal(got, states[:, encoder.facts.num_prefix :].reshape(-1, 32))


def test_the_image_processor_of_the_checkpoint_decides_how_pixels_are_normalised(folders, tmp_path):
    facts = HFVisionConfig(checkpoint=str(folders["siglip_vision_model"])).load().facts
    assert (facts.mean, facts.std, facts.resample) == ((0.5,) * 3, (0.5,) * 3, "bicubic")
    theirs(folders["clip_vision_model"]).save_pretrained(tmp_path)
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    own["image_processor_type"] = "CLIPImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    facts = HFVisionConfig(checkpoint=str(tmp_path)).load().facts
    assert facts.mean == (0.1, 0.2, 0.3)
    assert facts.std == (0.4, 0.5, 0.6)
    assert facts.resample == "bilinear"


def test_what_the_recipe_says_about_pixels_wins(folders):
    facts = (
        HFVisionConfig(
            checkpoint=str(folders["dinov2"]), mean=(0.0,) * 3, std=(1.0,) * 3, resample="bilinear"
        )
        .load()
        .facts
    )
    assert (facts.mean, facts.std, facts.resample) == ((0.0,) * 3, (1.0,) * 3, "bilinear")


def test_weights_that_are_missing_are_an_error_not_random_numbers(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs(folders["clip_vision_model"]).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in state if "layers.1" in key)
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 weights of its clip_vision_model tower"):
        HFVisionConfig(checkpoint=str(tmp_path)).load()


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_that_does_not_fit_is_refused_with_sides_that_work(folders, kind):
    with pytest.raises(ConfigError, match=r"side_px 50: .*Sizes that work: 48, 56, 40"):
        HFVisionConfig(checkpoint=str(folders[kind]), side_px=50).load()


def test_a_tower_that_takes_other_sides_by_itself_is_left_as_it_is():
    beit = {"model_type": "beit", **TOWER, "use_relative_position_bias": True}
    encoder = HFVisionConfig(config=beit, layer="last", side_px=48).load()
    assert encoder.facts.grid == (6, 6)
    assert encoder.facts.rule == "multiple"
    assert encoder.tower_config["image_size"] == 32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "either `checkpoint`"),
        ({"checkpoint": "a", "config": {}}, "either `checkpoint`"),
        ({"checkpoint": "/no/such/folder"}, "cannot be read"),
        ({"config": {"model_type": "llama"}}, "no image encoder.*input_ids"),
        ({"config": {"model_type": "no_such"}}, "vision.config cannot be used"),
        ({"config": {"model_type": "clip_vision_model", **TOWER}, "layer": 7}, "from -4 to 3"),
    ],
    ids=["nothing", "both", "folder", "language", "unknown", "layer"],
)
def test_what_cannot_be_an_encoder_is_refused_with_the_reason(settings, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=words):
        HFVisionConfig(**settings).load()


def test_a_kept_prefix_has_no_grid_for_a_reducer(folders):
    from mmlm.reducers import PixelShuffleConfig

    folder = str(folders["clip_vision_model"])
    facts = HFVisionConfig(checkpoint=folder, prefix="keep_as_tokens").load().facts
    with pytest.raises(ConfigError, match="keeps prefix tokens"):
        PixelShuffleConfig().out_grid(facts.out_grid(Size(32, 32)))


def test_further_layers_are_those_of_the_tower_and_cost_one_run():
    words = {"config": {"model_type": "clip_vision_model", **TOWER}, "layer": "last"}
    torch.manual_seed(0)
    encoder = HFVisionConfig.from_dict({**words, "layers": [0, 2, -1]}).load().eval()
    pixels = torch.randn(2, 3, *encoder.facts.side)
    runs = []
    encoder.tower.register_forward_hook(lambda *_: runs.append(1))
    out = encoder(pixels)
    assert len(runs) == 1
    states = encoder.tower(pixels, output_hidden_states=True).hidden_states
    for layer, index in zip(out.layers, (0, 2, -1), strict=True):
        torch.testing.assert_close(layer.values, states[index][:, 1:].flatten(0, 1), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"vision\.layers 9 is beyond this tower"):
        HFVisionConfig.from_dict({**words, "layers": [9]}).load()
