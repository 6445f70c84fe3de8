"""One small member of every family of the installed libraries keeps what an encoder promises.

It is fed at its own size and at another that it takes: grid × tokens, no graph when frozen, a
gradient into the picture when tuned, bf16; a size that it does not take is refused with sizes that
work. Which families are none, and why, stands in `families.UNFIT`.
"""

from __future__ import annotations

import pytest

from mmlm.errors import ConfigError
from mmlm.vision import encoders
from tests.vision import families

FAST_TIMM = (
    "vision_transformer", "convnext", "efficientnet", "resnet", "nfnet", "byobnet", "mambaout",
)  # fmt: skip
FAST_HF = (
    "clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "dinov2",
    "dinov2_with_registers", "vit", "beit", "convnext", "ijepa", "aimv2_vision_model",
)  # fmt: skip


def cases(library: str, names, fast):
    """Return the families that fit; all but a few belong to the slow tier."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in fast))
        for name in names
        if f"{library}:{name}" not in families.UNFIT
    ]


@pytest.mark.parametrize("family", cases("timm", families.TIMM, FAST_TIMM))
def test_a_family_of_timm_is_an_encoder(family):
    timm = pytest.importorskip("timm")
    member = families.TIMM[family]
    if not timm.is_model(member):
        pytest.skip(f"timm {timm.__version__} has no {member}")
    families.check(families.words_of("timm", family, member))


@pytest.mark.parametrize("family", cases("hf", families.HF, FAST_HF))
def test_a_family_of_transformers_is_an_encoder(family):
    families.check(families.words_of("hf", family, member_of(family)))


def member_of(family: str) -> dict:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {family}")
    return {"model_type": family, **families.shrunk(CONFIG_MAPPING[family]())}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        name.removeprefix("hf:")
        for name in families.UNFIT
        if name not in ("hf:efficientnet", "hf:timm_backbone", "hf:dinat")
    ],
)
def test_a_family_that_is_no_encoder_is_refused_with_a_reason(family):
    words = families.words_of("hf", family, member_of(family))
    with pytest.raises(ConfigError, match=r"\w+"):
        encoders.read(words, origin="vision").load()


@pytest.mark.slow
def test_the_families_are_those_of_the_installed_libraries():
    assert sorted(families.hf_families()) == sorted(families.HF)
    pytest.importorskip("timm")
    assert families.timm_families() == families.TIMM
