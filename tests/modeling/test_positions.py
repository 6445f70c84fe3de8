"""Tokens of several encoders share positions (MouSi): what the language model is told and keeps."""

from __future__ import annotations

import copy

import pytest
import torch

from mmlm import load
from mmlm.errors import AlignmentError, ConfigError
from mmlm.messages import user
from mmlm.modeling.positions import SharedPositions
from mmlm.vision import encoders
from tests import tiny

TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32,
}  # fmt: skip
EYE = {
    "use": "mixture",
    "fuse": "sequence",
    "encoders": [
        {"use": "hf", "config": {"model_type": "clip_vision_model", "patch_size": 8, **TOWER}},
        {"use": "hf", "config": {"model_type": "siglip_vision_model", "patch_size": 16, **TOWER}},
    ],
}


@pytest.fixture(scope="module", params=["each", "one", "rows"])
def made(request, tmp_path_factory):
    torch.manual_seed(0)
    return tiny.compose_tiny(tmp_path_factory.mktemp("m"), eye=EYE | {"positions": request.param})


def told(made, given) -> torch.Tensor:
    """Return the position ids that reach the language model."""
    seen = []
    hook = made.model.model.language.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["position_ids"]), with_kwargs=True
    )
    made.model(**given)
    hook.remove()
    return seen[0]


def inputs(made, *pictures) -> dict:
    encoded = made.processor.encode_chat([user("Hm?", list(pictures))], add_generation_prompt=True)
    sizes = made.processor.image_processor.sizes(encoded.image_sizes)
    return {
        "input_ids": torch.tensor([encoded.ids]), "pixel_values": encoded.pixel_values, **sizes
    }  # fmt: skip


def test_positions_stand_still_where_they_are_shared(made):
    given = inputs(made, tiny.picture(1), tiny.picture(2))
    positions = told(made, given)
    rule = made.model.config.vision["positions"]
    if rule == "each":
        assert positions is None
        return
    tile = {"one": [1] + [0] * 15 + [1] + [0] * 3, "rows": [1, 0, 0, 0] * 4 + [1, 0] * 2}[rule]
    steps = iter(tile * 2)
    place, wanted = -1, []
    for token in given["input_ids"][0].tolist():
        place += next(steps) if token == made.model.config.image_token_id else 1
        wanted.append(place)
    assert positions.tolist() == [wanted]


def test_step_by_step_is_what_is_read_at_once(made):
    made.model.eval()
    pictures = [tiny.picture(1), tiny.picture(2)]
    words = made.answer("What is it?", images=pictures, max_new_tokens=6)
    chat = made.chat(max_new_tokens=6)
    assert chat.ask("What is it?", images=pictures) == words
    chat.ask("And now?")
    given = inputs(made, *pictures)
    with torch.no_grad():
        out = made.model.generate(**given, max_new_tokens=5, do_sample=False, use_cache=True)
        again = made.model.generate(**given, max_new_tokens=5, do_sample=False, use_cache=False)
        beams = made.model.generate(**given, max_new_tokens=4, num_beams=2, do_sample=False)
    assert torch.equal(out, again)
    assert beams.shape[0] == 1


def test_padded_and_packed_are_what_each_is_alone(made):
    made.model.eval()
    one, other = inputs(made, tiny.picture(1)), inputs(made, tiny.picture(2), tiny.picture(3))
    longest = max(one["input_ids"].shape[1], other["input_ids"].shape[1])
    pixels = {"pixel_values": torch.cat([one["pixel_values"], other["pixel_values"]]),
              "image_sizes": torch.cat([one["image_sizes"], other["image_sizes"]])}  # fmt: skip
    rows, masks = [], []
    for each in (one, other):
        ids = each["input_ids"][0]
        gap = longest - len(ids)
        rows.append(torch.cat([ids.new_zeros(gap), ids]))
        masks.append(torch.cat([ids.new_zeros(gap), torch.ones_like(ids)]))
    with torch.no_grad():
        wanted = [made.model(**each).logits[0] for each in (one, other)]
        padded = made.model(
            input_ids=torch.stack(rows), attention_mask=torch.stack(masks), **pixels
        ).logits
        # Worst case seen 2e-6; a neighbour or a place that is off moves them by 1e-2.
        for found, alone in zip(padded, wanted, strict=True):
            torch.testing.assert_close(found[-len(alone) :], alone, rtol=1e-4, atol=1e-5)
        packed = copy.deepcopy(made.model)
        packed.model.language.set_attn_implementation("mmlm_segments")
        lengths = [each["input_ids"].shape[1] for each in (one, other)]
        row = packed(
            input_ids=torch.cat([one["input_ids"], other["input_ids"]], 1),
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            cu_seq_lens_q=torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32),
            **pixels,
        ).logits[0]
        torch.testing.assert_close(row, torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_it_comes_back_with_its_rule(made, tmp_path):
    given = inputs(made, tiny.picture(1))
    made.model.eval()
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(back.model(**given).logits, made.model(**given).logits)


def test_what_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="sequence"):
        encoders.read(EYE | {"fuse": "channels", "positions": "one"}, origin="vision")
    shared = SharedPositions([1, 0, 0])
    with pytest.raises(AlignmentError, match="3 tokens of a tile"):
        shared(torch.ones(1, 4, dtype=torch.bool), None, None, {})
    named = {"cu_seq_lens_q": torch.tensor([0, 3]), "seen_before": torch.tensor([[0, 0]])}
    with pytest.raises(ConfigError, match="share a picture"):
        shared(torch.ones(1, 3, dtype=torch.bool), None, None, named)
