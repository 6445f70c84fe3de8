"""`florence2` gives what transformers' Florence-2 computes, under each prompt (Florence-VL)."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import Florence2Config, Florence2Model, PreTrainedTokenizerFast

from mmlm.assistant import load
from mmlm.errors import ConfigError
from mmlm.messages import user
from mmlm.vision import encoders
from mmlm.vision.florence2 import PROMPTS
from tests.contracts.test_vision import FLORENCE
from tests.tiny import compose_tiny, picture

WORDS = json.loads(json.dumps(FLORENCE))


def write(folder):
    """Write a tiny Florence-2 with a tokenizer that gives each word a token."""
    torch.manual_seed(0)
    settings = {key: value for key, value in WORDS["config"].items() if key != "model_type"}
    whole = Florence2Model(Florence2Config(**settings)).eval()
    with torch.no_grad():
        for weight in whole.parameters():
            weight.mul_(3.0) if weight.dim() > 1 else None
    whole.save_pretrained(folder)
    known = sorted({word for prompt in PROMPTS for word in prompt.split()})
    words = ["<s>", "<pad>", "</s>", "<unk>", *known]
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **marks).save_pretrained(folder)
    return whole, {word: at for at, word in enumerate(words)}


@torch.no_grad()
def under(whole, pixels, ids):
    """What Florence-2's own encoder gives at the picture's places: ``(tiles, places, width)``."""
    places = (pixels.shape[-1] // 32) ** 2 + 1
    image = [whole.config.image_token_id] * places
    given = torch.tensor([[*image, *ids]] * len(pixels))
    out = whole(input_ids=given, pixel_values=pixels)
    return out.encoder_last_hidden_state[:, 1:places]


@torch.no_grad()
def test_depth_and_breadth_are_those_of_transformers_channel_by_channel(tmp_path):
    whole, words = write(tmp_path)
    encoder = encoders.read(
        {"use": "florence2", "checkpoint": str(tmp_path), "side_px": 96, "depths": ["entry", 1]},
        origin="vision",
    ).load()
    pixels = torch.randn(2, 3, 96, 96)
    out = encoder(pixels)
    assert out.grids[0][1:] == (3, 3)
    got = out.values.view(2, 9, -1)
    entry, stage, *prompted = got.split([24, 8, 24, 24, 24], dim=-1)
    close = {"rtol": 1e-4, "atol": 1e-5}  # another order of additions
    features = whole.get_image_features(pixels)
    torch.testing.assert_close(entry, features.pooler_output[:, 1:], **close)
    for given, prompt in zip(prompted, PROMPTS, strict=True):
        ids = [words["<s>"], *(words[word] for word in prompt.split()), words["</s>"]]
        torch.testing.assert_close(given, under(whole, pixels, ids), **close)
    hidden = pixels
    for stem, blocks in list(zip(whole.vision_tower.convs, whole.vision_tower.blocks, strict=True))[
        :2
    ]:
        hidden = stem(hidden)
        for block in blocks:
            hidden = block(hidden)
    pooled = functional.avg_pool2d(hidden, 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stage, pooled, **close)


@torch.no_grad()
def test_the_prompt_decides_what_is_read_from_the_same_picture(tmp_path):
    write(tmp_path)
    words = {"use": "florence2", "checkpoint": str(tmp_path), "side_px": 64, "depths": []}
    pixels = torch.randn(1, 3, 64, 64)
    seen = [
        encoders.read(words | {"prompts": [prompt]}, origin="vision").load()(pixels).values
        for prompt in PROMPTS
    ]
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    assert (seen[1] - seen[2]).abs().max() > 1e-3


def test_the_picture_is_read_once_and_all_of_it_learns(tmp_path):
    made = compose_tiny(tmp_path, eye=WORDS, connector={"use": "mlp", "depth": 3})
    vision = made.model.model.vision
    calls = {"backbone": 0, "text": 0}
    vision.backbone.convs[0].register_forward_hook(
        lambda *_: calls.update(backbone=calls["backbone"] + 1)
    )
    vision.text.register_forward_hook(lambda *_: calls.update(text=calls["text"] + 1))
    vision.requires_grad_(True).train()
    encoded = made.processor.encode_chat([user("What?", [picture()])], add_generation_prompt=True)
    ids = torch.tensor([encoded.ids])
    out = made.model(input_ids=ids, pixel_values=encoded.pixel_values, labels=ids)
    out.loss.backward()
    assert calls == {"backbone": 1, "text": 2}
    still = [name for name, weight in vision.named_parameters() if weight.grad is None]
    assert still == []
    made.model.eval()
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    asked = {"question": "What?", "images": [picture(1)], "max_new_tokens": 4}
    assert back.answer(**asked) == made.answer(**asked)


def test_what_cannot_be_read_is_refused(tmp_path):
    write(tmp_path)
    words = {"use": "florence2", "checkpoint": str(tmp_path), "side_px": 64}
    with pytest.raises(ConfigError, match="positions for 50 x 50"):
        encoders.read(words | {"side_px": 2048}, origin="vision").load()
    with pytest.raises(ConfigError, match="which has 4 stages"):
        encoders.read(words | {"depths": [4]}, origin="vision").load()
    with pytest.raises(ConfigError, match="needs `prompt_ids`"):
        encoders.read({"use": "florence2", "config": WORDS["config"]}, origin="vision")
