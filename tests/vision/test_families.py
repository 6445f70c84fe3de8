"""Members of many families keep what every encoder promises; see `families`."""

from __future__ import annotations

import pytest

from tests.vision import families

FAST_TIMM = (
    "test_vit", "test_convnext", "test_efficientnet", "test_resnet", "test_nfnet", "test_byobnet",
    "test_mambaout",
)  # fmt: skip
FAST_HF = (
    "clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "dinov2",
    "dinov2_with_registers", "vit", "beit", "convnext", "ijepa", "aimv2_vision_model",
)  # fmt: skip
SLOW_HF = (
    "deit", "dinov3_vit", "mlcd_vision_model", "convnextv2", "pvt_v2", "hiera", "internvl_vision",
    "data2vec-vision", "resnet", "poolformer", "segformer", "regnet", "bit", "mobilenet_v2",
    "swinv2", "focalnet", "cvt",
)  # fmt: skip


@pytest.mark.parametrize("member", FAST_TIMM)
def test_a_network_of_timm_is_an_encoder(member):
    timm = pytest.importorskip("timm")
    if not timm.is_model(member):
        pytest.skip(f"timm {timm.__version__} has no {member}")
    families.check({"use": "timm", "checkpoint": member, "pretrained": False})


@pytest.mark.parametrize(
    "model_type", [*FAST_HF, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_HF)]
)
def test_a_tower_of_transformers_is_an_encoder(model_type):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    member = {"model_type": model_type, **families.shrunk(CONFIG_MAPPING[model_type]())}
    families.check(families.words_of("hf", model_type, member))
