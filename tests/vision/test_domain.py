"""Encoders of other domains, in the very form in which they are published, made small.

A folder stands for the Hub id: the same files with the same keys. Weights are random.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel, Dinov2Config

from mmlm.features import Grid, Size
from mmlm.vision import encoders
from tests import tiny

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
RAD_DINO = {  # microsoft/rad-dino: preprocessor_config.json, its sides made small
    "crop_size": {"height": 42, "width": 42}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5307] * 3,
    "image_processor_type": "BitImageProcessor", "image_std": [0.2583] * 3, "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 42},
}  # fmt: skip
BIOMED_TEXT = {  # a text tower of the Hub, which must never be asked for
    "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
    "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
    "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 256,
}  # fmt: skip


def test_rad_dino_comes_with_its_own_side_and_greys(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, mlp_ratio=2, num_hidden_layers=3, num_attention_heads=4, image_size=42,
        patch_size=14,
    )  # fmt: skip
    theirs = AutoModel.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RAD_DINO))
    words = {"use": "hf", "checkpoint": str(tmp_path), "layer": "last"}
    encoder = encoders.read(words, origin="vision").load()
    facts = encoder.facts
    assert (facts.side, facts.resample, facts.num_prefix) == ((42, 42), "bicubic", 1)
    assert (facts.mean, facts.std) == ((0.5307,) * 3, (0.2583,) * 3)
    assert facts.out_grid(Size(70, 42)) == Grid(1, 5, 3)
    pixels = torch.randn(1, 3, 42, 42)
    with torch.no_grad():
        wanted = theirs(pixels).last_hidden_state[0, 1:]
        torch.testing.assert_close(encoder(pixels).values, wanted, rtol=0, atol=0)
    made = tiny.compose_tiny(tmp_path, eye=words)
    # A picture of one grey is what the two numbers make of it.
    grey = made.processor.image_processor.pixels(tiny.picture().convert("L").convert("RGB"))
    assert grey.shape == (1, 3, 42, 42)


def test_biomedclip_needs_no_text_tower(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import _build_vision_tower

    vision = {
        "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "",
        "timm_proj": "linear", "image_size": 64,
    }  # fmt: skip
    settings = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": BIOMED_TEXT}
    preprocess = {"mean": MEAN, "std": STD}
    values = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    visual = _build_vision_tower(16, open_clip.CLIPVisionCfg(**vision)).eval()
    state = {f"visual.{name}": weight for name, weight in visual.state_dict().items()}
    state |= {"text.transformer.embeddings.word_embeddings.weight": torch.zeros(4, 4)}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    words = {"use": "open_clip", "checkpoint": str(tmp_path)}
    encoder = encoders.read(words, origin="vision").load()
    assert encoder.facts.mean == tuple(MEAN)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, intermediates_only=True
        )["image_intermediates"][0]
        got = encoder(pixels).values
    torch.testing.assert_close(got, wanted.permute(0, 2, 3, 1).flatten(0, 2), rtol=0, atol=0)


def test_remoteclip_is_an_architecture_and_a_file_of_both_towers(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    whole = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(whole.state_dict(), tmp_path / "RemoteCLIP-ViT-S-32.pt")
    words = {
        "use": "open_clip", "checkpoint": "ViT-S-32-alt",
        "weights": str(tmp_path / "RemoteCLIP-ViT-S-32.pt"),
    }  # fmt: skip
    encoder = encoders.read(words, origin="vision").load()
    assert encoder.facts.out_grid(encoder.facts.side_size) == Grid(1, 7, 7)
    own = dict(whole.visual.named_parameters())
    for name, weight in encoder.tower.named_parameters():
        assert torch.equal(weight, own[name]), name
