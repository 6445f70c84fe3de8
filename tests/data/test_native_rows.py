"""Pictures at their own size: rows keep two budgets, and no picture sees another's patches."""

from dataclasses import replace

import pytest
import torch

from mmlm.data import Drop, Mixture, PackingConfig, Share
from mmlm.data.collate import collate_packed
from mmlm.data.pipeline import StepStream
from mmlm.data.planning import Planner
from mmlm.errors import TrainingError
from mmlm.training.attention import choose_attention, prove_pictures_apart
from mmlm.training.recipe import RunConfig
from tests.data.made import open_source, write_lines
from tests.tiny import compose_tiny, picture

SIZES = [(16, 24), (40, 8), (64, 64), (24, 56), (8, 8), (48, 80)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    eye = {"use": "patches", "patch_px": 8, "side_px": 32}
    made = compose_tiny(
        tmp_path_factory.mktemp("model"), vision="patches", eye=eye,
        image={"use": "native", "min_tokens": 1, "max_tokens": 400},
    )  # fmt: skip
    made.model.eval()
    return made


def planner(folder, tiny, **words):
    rows = []
    for number, (height, width) in enumerate(SIZES):
        picture(number, height, width).save(folder / f"{number}.png")
        rows.append({"id": f"{number}", "image": f"{number}.png", "question": "a", "answer": "b"})
    write_lines(folder / "a.jsonl", rows)
    mixture = Mixture([(open_source(folder, use="jsonl", path="a.jsonl"), Share())], shuffle=False)
    return Planner(mixture, tiny.processor, max_tokens=2000, max_tiles=64, **words)


def test_patches_are_counted_from_headers(tmp_path, tiny):
    plans = planner(tmp_path, tiny, max_patches=100)
    found = [plans.plan(number).num_patches for number in range(len(SIZES))]
    assert found == [height * width // 64 for height, width in SIZES]
    plans = planner(tmp_path, tiny, max_patches=50)
    causes = [one.cause for n in range(len(SIZES)) if isinstance(one := plans.plan(n), Drop)]
    assert causes == ["too_long"] * 2
    assert "run.row_patches" in plans.plan(2).detail


def test_a_large_picture_is_as_many_tiles_as_it_is_large(tmp_path, tiny):
    plans = planner(tmp_path, tiny)
    found = [plans.plan(number).num_tiles for number in range(len(SIZES))]
    assert found == [-(-height * width // 32**2) for height, width in SIZES]


def test_rows_of_a_stream_keep_both_budgets(tmp_path, tiny):
    packing = PackingConfig(row_tokens=400, pool_samples=4, max_patches=64)
    plans = planner(tmp_path, tiny, max_patches=64)
    pixels = tiny.processor.image_processor.pixels
    stream = StepStream(plans, packing, rows_per_step=1, num_samples=60,
                        pixels=lambda i: ("", pixels(i)))  # fmt: skip
    rows = [row for step in stream for row in step.rows]
    assert rows
    for row in rows:
        assert sum(sample.num_patches for sample in row.samples) <= 64
        assert row.num_tokens <= 400


def test_no_picture_of_a_row_sees_another(tmp_path, tiny):
    plans = planner(tmp_path, tiny)
    samples = [plans.plan(number) for number in (0, 3, 1)]
    together = features(tiny, samples)
    alone = [features(tiny, [sample]) for sample in samples]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    changed = features(tiny, [plans.plan(5), *samples[1:]])
    kept = sum(int((s.ids == tiny.processor.image_token_id).sum()) for s in samples[1:])
    assert torch.allclose(changed[-kept:], together[-kept:], atol=1e-6)


def features(tiny, samples):
    processor = tiny.processor.image_processor
    pixels = torch.cat([processor.pixels(image) for s in samples for image in s.images])
    sizes = processor.sizes([size for s in samples for size in s.sizes])
    with torch.no_grad():
        found = tiny.model.model.get_image_features(pixels, **sizes)
    count = int((collate_packed(samples)["input_ids"] == tiny.processor.image_token_id).sum())
    assert found.values.shape[0] == count
    return found.values


def test_a_run_proves_that_its_encoder_keeps_pictures_apart_or_is_refused(tiny, monkeypatch):
    proven = prove_pictures_apart(tiny.model)
    assert proven.holds
    assert choose_attention(tiny.model, RunConfig(), torch.device("cpu")).packed
    eye = tiny.model.model.vision
    encode = eye.encode_numbers

    def mixed(numbers, sizes):
        found = encode(numbers, sizes)
        return replace(found, values=found.values + found.values.mean(0))

    monkeypatch.setattr(eye, "encode_numbers", mixed)
    assert not prove_pictures_apart(tiny.model).holds
    with pytest.raises(TrainingError, match=r"pictures of one row see each other.*letterbox"):
        choose_attention(tiny.model, RunConfig(), torch.device("cpu"))


def test_a_vit_that_packs_pictures_of_all_sizes_keeps_them_apart(tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower = {"model_type": "siglip2_vision_model", **size, "num_attention_heads": 4,
             "patch_size": 8, "num_patches": 16}  # fmt: skip
    made = compose_tiny(
        tmp_path, eye={"use": "hf", "config": tower, "layer": "last"},
        image={"use": "native", "rule": "fit", "max_tokens": 9},
        reducer={"use": "pixel_shuffle"},
    )  # fmt: skip
    assert prove_pictures_apart(made.model).holds
