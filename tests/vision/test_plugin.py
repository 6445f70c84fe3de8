"""A package of twenty lines brings an encoder of its own; nothing in MMLM knows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mmlm import load
from mmlm.errors import RegistryError
from mmlm.messages import user
from mmlm.vision import encoders
from tests import tiny

PACKAGE = Path(__file__).parents[1] / "plugin"


@pytest.fixture
def installed(monkeypatch):
    """Put the package on the path, as pip would; forget it afterwards."""
    monkeypatch.setattr(encoders, "_entries", dict(encoders._entries))
    monkeypatch.setattr(encoders, "_plugins_loaded", False)
    with pytest.raises(RegistryError, match="squares"):
        encoders["squares"]
    monkeypatch.syspath_prepend(PACKAGE)
    monkeypatch.setattr(encoders, "_plugins_loaded", False)


def test_the_entry_point_has_a_name_that_packaging_allows():
    assert re.fullmatch(r"\w+(\.\w+)*", encoders._group)


def test_an_encoder_from_outside_trains_a_step_and_comes_back(installed, tmp_path):
    made = tiny.compose_tiny(tmp_path, eye={"use": "squares"})
    encoded = made.processor.encode_chat(
        [user("What?", [tiny.picture()])], add_generation_prompt=True
    )
    ids = torch.tensor([encoded.ids])
    assert (ids == made.model.config.image_token_id).sum() == 16
    loss = made.model(input_ids=ids, pixel_values=encoded.pixel_values, labels=ids).loss
    loss.backward()
    weight = made.model.model.vision.colours.weight
    before = weight.detach().clone()
    torch.optim.SGD(made.model.parameters(), lr=0.1).step()
    assert not weight.equal(before)
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    with torch.no_grad():
        again = back.model(input_ids=ids, pixel_values=encoded.pixel_values).logits
        wanted = made.model(input_ids=ids, pixel_values=encoded.pixel_values).logits
    torch.testing.assert_close(again, wanted, rtol=0, atol=0)
