"""The connectors against transformers' own, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from mmlm.connectors import MLPConnectorConfig
from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures


def features(width: int = 48) -> VisionFeatures:
    values = torch.randn(2 * 9, width, generator=torch.Generator().manual_seed(0))
    return VisionFeatures(values, (Grid(1, 3, 3),) * 2)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_mlp_equals_llavas_projector_to_the_last_bit(activation, bias):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    theirs = LlavaMultiModalProjector(
        LlavaConfig(
            vision_config=CLIPVisionConfig(hidden_size=48),
            text_config=LlamaConfig(hidden_size=64, num_attention_heads=4),
            projector_hidden_act=activation,
            multimodal_projector_bias=bias,
        )
    )
    ours = MLPConnectorConfig(activation=activation, bias=bias).build(
        vision_width=48, text_width=64
    )
    names = {"linear_1": "layers.0", "linear_2": "layers.2"}
    state = theirs.state_dict()
    ours.load_state_dict(
        {f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in state.items()}
    )
    # The same operations in the same order: equal to the last bit.
    torch.testing.assert_close(ours(features()).values, theirs(features().values), rtol=0, atol=0)


def test_depth_counts_the_linear_layers():
    for depth in (1, 2, 4):
        connector = MLPConnectorConfig(depth=depth).build(vision_width=8, text_width=4)
        layers = [m for m in connector.modules() if isinstance(m, torch.nn.Linear)]
        assert len(layers) == depth
        assert connector.last_linear() is layers[-1]


def test_an_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"activation: .*known: gelu, .*relu, .*silu, tanh"):
        MLPConnectorConfig.from_dict({"activation": "swish"})
