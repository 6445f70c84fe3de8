"""The connectors against the classes of transformers and timm that compute the same.

The weights of a tiny stock module are copied by name, and both run on the same features. Where
attention is involved the two may add in another order: the bound is ten times the worst
difference measured over 50 seeds (1e-6).
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from mmlm.connectors import connectors
from mmlm.features import Grid, VisionFeatures
from mmlm.reducers import reducers

VISION_WIDTH, TEXT_WIDTH = 24, 16
GRIDS = (Grid(1, 6, 6),) * 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def features(grids=GRIDS, width: int = VISION_WIDTH) -> VisionFeatures:
    return VisionFeatures(torch.randn(sum(grid.num_tokens for grid in grids), width), grids)


def build(seen: int = VISION_WIDTH, **words):
    """Build a connector for features of the width `seen`."""
    config = connectors.read(words, origin="connector")
    return config.build(vision_width=seen, text_width=TEXT_WIDTH).eval()


def disturb(module: nn.Module) -> nn.Module:
    """Make every weight differ from what it begins with, norms and biases too."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return module.eval()


def copy(ours: nn.Module, theirs: nn.Module, names: Iterable[tuple[str, str]]) -> None:
    """Copy all weights; pairs of beginnings of names, ours first, each weight of ours once."""
    state = theirs.state_dict()
    taken = {}
    for mine, other in names:
        found = {
            mine + key.removeprefix(other): value
            for key, value in state.items()
            if key.startswith(other)
        }
        assert found, f"nothing is named {other}"
        taken |= found
    ours.load_state_dict(taken)


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours.reshape(-1), theirs.reshape(-1), rtol=0, atol=atol)


def text_and_vision():
    from transformers import CLIPVisionConfig, LlamaConfig

    text = LlamaConfig(
        hidden_size=TEXT_WIDTH, intermediate_size=40, num_attention_heads=4, hidden_act="silu"
    )
    return text, CLIPVisionConfig(hidden_size=VISION_WIDTH)


def test_pixel_shuffle_and_norm_mlp_are_internvls_projector():
    from transformers import InternVLConfig, InternVLModel

    text, _ = text_and_vision()
    config = InternVLConfig(text_config=text, vision_config={"hidden_size": VISION_WIDTH})
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    theirs = disturb(InternVLMultiModalProjector(config))
    ours = build(4 * VISION_WIDTH, use="norm_mlp")
    pairs = [("layers.0", "layer_norm"), ("layers.1", "linear_1"), ("layers.3", "linear_2")]
    copy(ours, theirs, pairs)
    given = features()
    shuffled = InternVLModel.pixel_shuffle(None, given.values.reshape(3, 6, 6, -1), 0.5)
    reducer = reducers.read({"use": "pixel_shuffle"}, origin="r").build(width=VISION_WIDTH)
    # The same operations in the same order: equal to the last bit.
    close(ours(reducer(given)).values, theirs(shuffled.flatten(1, 2)), atol=0)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_pixel_shuffle_and_norm_mlp_are_lfm2_vls_projector(norm):
    from transformers import Lfm2VlConfig
    from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlMultiModalProjector

    text, _ = text_and_vision()
    config = Lfm2VlConfig(
        text_config=text,
        vision_config={"model_type": "siglip2_vision_model", "hidden_size": VISION_WIDTH},
        projector_hidden_size=20,
        projector_use_layernorm=norm,
        projector_bias=False,
    )
    theirs = disturb(Lfm2VlMultiModalProjector(config))
    ours = build(4 * VISION_WIDTH, use="norm_mlp", hidden_widths=[20], norms=int(norm), bias=False)
    pairs = [(f"layers.{int(norm)}", "linear_1"), (f"layers.{2 + norm}", "linear_2")]
    copy(ours, theirs, [("layers.0", "layer_norm"), *pairs] if norm else pairs)
    given = features((Grid(1, 4, 6),) * 2)
    reducer = reducers.read({"use": "pixel_shuffle"}, origin="r").build(width=VISION_WIDTH)
    close(ours(reducer(given)).values, theirs(given.values.reshape(2, 4, 6, -1)), atol=0)


def test_pixel_shuffle_and_linear_are_idefics3s_connector():
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    text, _ = text_and_vision()
    config = Idefics3Config(
        text_config=text, vision_config={"hidden_size": VISION_WIDTH}, scale_factor=3
    )
    theirs = disturb(Idefics3Connector(config))
    ours = build(9 * VISION_WIDTH, use="linear", bias=False)
    copy(ours, theirs, [("linear", "modality_projection.proj")])
    given = features()
    reducer = reducers.read({"use": "pixel_shuffle", "factor": 3}, origin="r").build(width=1)
    close(ours(reducer(given)).values, theirs(given.values.reshape(3, 36, -1)), atol=0)


def test_the_blocks_of_ldp_are_torchvisions_inverted_residuals():
    pytest.importorskip("torchvision")
    from functools import partial

    from timm.layers import LayerNormAct2d
    from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
    from torchvision.ops.misc import SqueezeExcitation

    norm = partial(LayerNormAct2d, act_layer=None)
    gate = partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid)
    ours = disturb(build(use="ldp"))
    names = (
        ("depth", "0.0"), ("depth_norm", "0.1"), ("squeeze", "1.fc1"), ("excite", "1.fc2"),
        ("point", "2.0"), ("point_norm", "2.1"),
    )  # fmt: skip
    for block, stride in ((ours.stay, 1), (ours.halve, 2)):
        words = (TEXT_WIDTH, 3, TEXT_WIDTH, TEXT_WIDTH, True, "HS", stride, 1, 1)
        theirs = InvertedResidual(InvertedResidualConfig(*words), norm, gate).eval()
        state = {
            f"block.{other}.{kind}": block.state_dict()[f"{mine}.{kind}"]
            for mine, other in names
            for kind in ("weight", "bias")
            if f"{mine}.{kind}" in block.state_dict()
        }
        theirs.load_state_dict(state)
        for rows, columns in ((6, 6), (5, 7)):
            maps = torch.randn(2, TEXT_WIDTH, rows, columns)
            close(block(maps), theirs(maps))


def test_patch_merger_is_mistral3s_projector():
    from transformers import LlamaConfig, Mistral3Config
    from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

    text = LlamaConfig(hidden_size=TEXT_WIDTH, num_attention_heads=4, rms_norm_eps=1e-4)
    vision = {"model_type": "pixtral", "hidden_size": VISION_WIDTH, "patch_size": 8}
    config = Mistral3Config(text_config=text, vision_config=vision)
    theirs = disturb(Mistral3MultiModalProjector(config))
    ours = build(use="patch_merger", eps=1e-4)
    pairs = [("norm", "norm"), ("merge", "patch_merger.merging_layer")]
    copy(ours, theirs, [*pairs, ("layers.0", "linear_1"), ("layers.2", "linear_2")])
    with torch.no_grad():  # theirs has the channel before the place
        turned = ours.merge.weight.unflatten(1, (VISION_WIDTH, 4)).transpose(1, 2)
        ours.merge.weight.copy_(turned.flatten(1))
    grids = (Grid(1, 4, 6), Grid(1, 2, 8))
    given = features(grids)
    sizes = torch.tensor([[8 * grid.rows, 8 * grid.columns] for grid in grids])
    close(ours(given).values, theirs(given.values, sizes))


def test_perceiver_is_idefics2s_connector():
    from transformers import Idefics2Config
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    text, _ = text_and_vision()
    perceiver = {
        "hidden_size": TEXT_WIDTH,
        "resampler_n_latents": 5,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
    }
    config = Idefics2Config(
        text_config=text, vision_config={"hidden_size": VISION_WIDTH}, perceiver_config=perceiver
    )
    theirs = disturb(Idefics2Connector(config))
    ours = build(
        use="perceiver", tokens=5, depth=2, heads=4, head_width=6, key_heads=2, project_width=40
    )
    resampler = "perceiver_resampler."
    pairs = [("latents", resampler + "latents"), ("norm", resampler + "norm")]
    parts = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    pairs += [(f"project.{a}", f"modality_projection.{b}") for a, b in parts.items()]
    inner = {
        "latent_norm": "input_latents_norm",
        "context_norm": "input_context_norm",
        "mlp_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        **{f"mlp.{a}": f"mlp.{b}" for a, b in parts.items()},
    }
    for index in range(2):
        pairs += [
            (f"layers.{index}.{a}", f"{resampler}layers.{index}.{b}") for a, b in inner.items()
        ]
    copy(ours, theirs, pairs)
    given = features()
    mask = torch.ones(3, 36, dtype=torch.bool)
    close(ours(given).values, theirs(given.values.reshape(3, 36, -1), mask))


def test_qformer_is_blip2s_query_transformer_and_its_projection():
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        encoder_hidden_size=VISION_WIDTH,
    )
    theirs = nn.ModuleDict({"q": Blip2QFormerModel(config), "out": nn.Linear(16, TEXT_WIDTH)})
    theirs["queries"] = nn.Embedding(5, 16)
    disturb(theirs)
    ours = build(use="qformer", tokens=5, depth=3, width=16, heads=2, mlp_width=24)
    pairs = [("queries", "queries.weight"), ("norm", "q.layernorm"), ("project", "out")]
    blocks = {"attention": "attention", "reading": "crossattention"}
    for index in range(3):
        mine, other = f"layers.{index}.", f"q.encoder.layer.{index}."
        for a, b in blocks.items():
            if a == "attention" or index % 2 == 0:
                pairs += [
                    (f"{mine}{a}.{part}", f"{other}{b}.attention.{part}")
                    for part in ("query", "key", "value")
                ]
                pairs += [
                    (f"{mine}{a}.out", f"{other}{b}.output.dense"),
                    (f"{mine}{a}_norm", f"{other}{b}.output.LayerNorm"),
                ]
        pairs += [
            (f"{mine}mlp.0", f"{other}intermediate_query.dense"),
            (f"{mine}mlp.2", f"{other}output_query.dense"),
            (f"{mine}mlp_norm", f"{other}output_query.LayerNorm"),
        ]
    copy(ours, theirs, pairs)
    given = features()
    queries = theirs["queries"].weight.expand(3, -1, -1)
    states = theirs["q"](queries, encoder_hidden_states=given.values.reshape(3, 36, -1))
    close(ours(given).values, theirs["out"](states.last_hidden_state))


def test_reassemble_fuses_as_transformers_dpt_does():
    from transformers import DPTConfig
    from transformers.models.dpt.modeling_dpt import DPTNeck

    factors, widths = [4, 2, 1, 0.5], [4, 6, 8, 10]
    config = DPTConfig(
        hidden_size=VISION_WIDTH,
        neck_hidden_sizes=widths,
        reassemble_factors=factors,
        fusion_hidden_size=8,
        readout_type="ignore",
        is_hybrid=False,
    )
    theirs = disturb(DPTNeck(config))
    ours = build(use="reassemble", factors=factors, widths=widths, width=8)
    pairs = [
        (f"project.{i}.{kind}", f"project.{i}.{kind}")
        for i in (0, 1)
        for kind in ("weight", "bias")
    ]
    state = {f"project.{key}": value for key, value in ours.project.state_dict().items()}
    stock = theirs.state_dict()
    names = [("narrow.{}", "convs.{}"), ("projections.{}", "reassemble_stage.layers.{}.projection")]
    pairs = [(a.format(i), b.format(i)) for i in range(4) for a, b in names]
    pairs += [(f"resizers.{i}", f"reassemble_stage.layers.{i}.resize") for i in (0, 1, 3)]
    inner = {
        "of_fused.first": "residual_layer2.convolution1",
        "of_fused.second": "residual_layer2.convolution2",
        "of_layer.first": "residual_layer1.convolution1",
        "of_layer.second": "residual_layer1.convolution2",
        "project": "projection",
    }
    pairs += [
        (f"fusions.{i}.{a}", f"fusion_stage.layers.{i}.{b}")
        for i in range(4)
        for a, b in inner.items()
        if i or not a.startswith("of_layer")
    ]
    for a, b in pairs:
        found = {a + k.removeprefix(b): v for k, v in stock.items() if k.startswith(b + ".")}
        assert found, b
        state |= found
    ours.load_state_dict(state)
    # An odd grid: maps that do not meet are resized on the way.
    layers = [torch.randn(2, 5 * 7 + 1, VISION_WIDTH) for _ in range(4)]
    fused = theirs(layers, patch_height=5, patch_width=7)[-1]
    maps = [each[:, 1:].transpose(1, 2).unflatten(2, (5, 7)) for each in layers]
    torch.testing.assert_close(ours.fuse(maps), fused, rtol=0, atol=1e-5)


def test_the_blocks_of_the_c_abstractor_are_timms_regnet_stage():
    timm = pytest.importorskip("timm")
    from functools import partial

    from timm.layers import LayerNorm2d
    from timm.models.regnet import RegStage

    del timm
    stage = partial(RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
    theirs = disturb(stage(2, VISION_WIDTH, 8))
    ours = build(use="c_abstractor", depth=2, width=8).before
    pairs = []
    for index in range(2):
        mine, other = f"{index}.", f"b{index + 1}."
        for a, b in (("enter", "conv1"), ("spread", "conv2"), ("leave", "conv3")):
            pairs += [
                (f"{mine}{a}", f"{other}{b}.conv"),
                (f"{mine}{a}_norm.norm", f"{other}{b}.bn"),
            ]
        pairs += [(f"{mine}squeeze", f"{other}se.fc1"), (f"{mine}excite", f"{other}se.fc2")]
        if index == 0:
            pairs += [(f"{mine}bypass", f"{other}downsample.conv")]
            pairs += [(f"{mine}bypass_norm.norm", f"{other}downsample.bn")]
    copy(ours, theirs, pairs)
    maps = torch.randn(2, VISION_WIDTH, 5, 7)
    torch.testing.assert_close(ours(maps), theirs(maps), rtol=0, atol=1e-5)
