"""Image towers of open_clip's checkpoints, in the forms of RemoteCLIP and BiomedCLIP (timm)."""

from __future__ import annotations

import json

import pytest
import torch

from mmlm import load
from mmlm.errors import ConfigError
from mmlm.features import Size
from mmlm.messages import user
from mmlm.vision import encoders
from tests import tiny

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
REMOTE = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32},
    "text_cfg": TEXT,
}
BIOMED = {
    "embed_dim": 16,
    "vision_cfg": {
        "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 64,
    },
    "text_cfg": TEXT,
}  # fmt: skip
MEAN = [0.4, 0.5, 0.6]


def checkpoint(folder, settings) -> tuple[str, torch.nn.Module]:
    """Write both towers in the form in which they are published."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.CLIP(**settings).eval()
    folder.mkdir()
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    values = {"model_cfg": settings, "preprocess_cfg": {"mean": MEAN, "std": [0.2] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    return str(folder), model.visual


@pytest.mark.parametrize("settings", [REMOTE, BIOMED], ids=["vit", "timm"])
def test_features_are_those_of_the_library_and_come_back(settings, tmp_path):
    folder, visual = checkpoint(tmp_path / "clip", settings)
    words = {"use": "open_clip", "checkpoint": folder, "layer": -2, "norm": False}
    encoder = encoders.read(words, origin="vision").load()
    assert encoder.facts.mean == tuple(MEAN)
    side = settings["vision_cfg"]["image_size"]
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        found = visual.forward_intermediates(pixels, indices=2, intermediates_only=True)
        wanted = found["image_intermediates"][0].permute(0, 2, 3, 1).flatten(0, 2)
        torch.testing.assert_close(encoder(pixels).values, wanted, rtol=0, atol=0)

    made = tiny.compose_tiny(tmp_path, eye=words)
    encoded = made.processor.encode_chat(
        [user("What?", [tiny.picture()])], add_generation_prompt=True
    )
    given = {"input_ids": torch.tensor([encoded.ids]), "pixel_values": encoded.pixel_values}
    made.model(**given, labels=given["input_ids"]).loss.backward()
    still = {n for n, p in made.model.model.vision.named_parameters() if p.grad is None}
    assert still == made.model.model.vision.idle_parameters()
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            back.model(**given).logits, made.model(**given).logits, rtol=0, atol=0
        )


def test_positions_are_resized_for_another_side(tmp_path):
    folder, visual = checkpoint(tmp_path / "clip", REMOTE)
    words = {"use": "open_clip", "checkpoint": folder}
    encoder = encoders.read(words | {"side_px": 48}, origin="vision").load()
    assert encoder.facts.out_grid(Size(48, 48)).num_tokens == 36
    table, own = encoder.tower.positional_embedding, visual.positional_embedding
    torch.testing.assert_close(table[0], own[0], rtol=0, atol=0)
    wanted = torch.nn.functional.interpolate(
        own[1:].T.reshape(1, -1, 4, 4), size=(6, 6), mode="bicubic"
    )
    torch.testing.assert_close(table[1:], wanted.flatten(2)[0].T)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"open_clip_config\.json"):
        encoders.read({"use": "open_clip", "checkpoint": str(tmp_path)}, origin="vision").load()
    with pytest.raises(ConfigError, match="pretrained: false"):
        encoders.read({"use": "open_clip", "checkpoint": "ViT-B-32"}, origin="vision").load()
