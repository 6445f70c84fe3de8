"""Clips through the whole model: tokens are counted exactly, and each way to make less works."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from mmlm import load
from mmlm.data import Mixture, Share
from mmlm.data.collate import MMLMCollator, collate_packed
from mmlm.data.planning import Planner
from mmlm.errors import ConfigError
from mmlm.features import ClipSize, Grid, Size, VisionFeatures
from mmlm.messages import Clip, ImagePart, Message, Text, assistant, user
from mmlm.modeling.clips import finished
from mmlm.modeling.pictures import arrange
from mmlm.processing import new_places
from mmlm.training import train
from mmlm.vision.blocks import rolled
from tests import tiny
from tests.data.made import open_source, write_lines
from tests.training.tiny_run import tiny_recipe

VIDEOS = {
    "frames": {"max_frames": 4},
    "pooled": {"max_frames": 6, "pool": [2, 2, 3]},
    "joined": {"max_frames": 5, "joined": True},
    "rolled": {"max_frames": 4, "roll": 0.25},
    "dropped": {"max_frames": 4, "drop": 0.5},
}
IMAGES = {
    "squash": {"use": "squash"},
    "tiles": {"use": "tiles", "rule": "anyres", "layout": "newline"},
    "native": {"use": "native", "max_tokens": 64, "layout": "row_ends"},
}


@functools.cache
def made(video: str, image: str = "squash", eye: str = "clip"):
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    words = {"use": "frames", **VIDEOS[video]}
    if image == "native":
        eye = "patches"
    return tiny.compose_tiny(folder, eye, image=IMAGES[image], video=words)


def clip(count: int, seed: int = 0, *, height: int = 24, width: int = 40) -> Clip:
    """A clip in which the right half of the picture never changes."""
    draw = np.random.default_rng(seed)
    still = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    frames: list[Image.Image] = []
    for _ in range(count):
        frame = still.copy()
        frame[:, : width // 2] = draw.integers(0, 256, (height, width // 2, 3), dtype=np.uint8)
        frames.append(Image.fromarray(frame))
    return Clip(tuple(frames))


SIDES = st.one_of(st.integers(1, 64), st.integers(1, 3000))


@pytest.mark.parametrize("video", [name for name in VIDEOS if name != "dropped"])
@pytest.mark.parametrize("image", IMAGES)
@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.tuples(SIDES, SIDES, st.integers(0, 40)), min_size=1, max_size=3))
def test_the_count_from_sizes_is_what_comes_out(video, image, sizes):
    model = made(video, image).model.model
    counter = model.counter
    all_sizes = [
        ClipSize(height, width, counter.video.num_frames(frames)) if frames else Size(height, width)
        for height, width, frames in sizes
    ]
    grids: list[Grid] = []
    for size in all_sizes:
        tiles = counter.plan(size).tiles
        if isinstance(size, ClipSize) and counter.video.joined:
            grids.append(counter.grid_of_clip(size))
        else:
            grids += [counter.grid_of_tile(tile.size) for tile in tiles]
    values = torch.zeros(sum(grid.num_tokens for grid in grids), 32)
    features = VisionFeatures(values, tuple(grids))
    features = finished(features, counter, all_sizes, [None] * len(all_sizes))
    if model.marks is not None:
        features = arrange(features, counter, all_sizes, model.marks)
    assert features.values.shape[0] == sum(counter.count(size) for size in all_sizes)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("video", VIDEOS)
def test_clips_and_pictures_go_through_together_as_they_do_alone(video, image):
    if (video, image) == ("rolled", "native"):
        pytest.skip("raw patches have no blocks between which tokens could roll")
    made_ = made(video, image)
    looks = made_.processor.image_processor
    shown = [clip(7), tiny.picture(1, 33, 47), clip(2, 1, height=50), clip(1, 2)]
    counts = [made_.processor.count_tokens(each) for each in shown]
    with torch.no_grad():
        together = made_.model.get_image_features(
            **looks.together([looks.look(each) for each in shown])
        ).values
        alone = [
            made_.model.get_image_features(**looks.together([looks.look(each)])).values
            for each in shown
        ]
    assert [len(each) for each in alone] == counts
    # Products of other batches are summed in another order.
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "video",
    [pytest.param(v, marks=[pytest.mark.slow] * (v in ("frames", "joined"))) for v in VIDEOS],
)
def test_it_answers_learns_and_comes_back(video, tmp_path):
    made_ = made(video)
    given = MMLMCollator(made_.processor)(
        [{"messages": [{"role": "user", "content": [
            {"type": "video", "video": list(clip(6).source)}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A dog runs."}]}]
    )  # fmt: skip
    model = made_.model.train()
    loss = model(**given).loss
    loss.backward()
    moved = [p for n, p in model.named_parameters() if n.startswith("model.connector")]
    assert all(parameter.grad.abs().sum() > 0 for parameter in moved)
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    model.zero_grad()
    with torch.no_grad():
        assert model(**given).loss < loss
        made_.model.eval()
        made_.save(tmp_path / "saved")
        back = load(tmp_path / "saved", device="cpu")
        assert back.model.config.video == model.config.video
        torch.testing.assert_close(back.model(**given).logits, model(**given).logits)
    asked = [clip(9, 3), tiny.picture(4)]
    words = made_.answer("What?", images=asked, max_new_tokens=4)
    chat = made_.chat(max_new_tokens=4)
    assert chat.ask("What?", images=asked) == words
    assert (
        chat.ask("And then?") == back.chat(max_new_tokens=4).ask("And then?", images=[])
        or chat.messages
    )  # the second turn goes on in the cache that holds the clip


def test_pool_is_the_mean_of_equal_parts():
    model = made("pooled").model.model
    size = ClipSize(24, 40, 6)
    values = torch.randn(6 * 16, 32)
    features = VisionFeatures(values, (Grid(1, 4, 4),) * 6)
    out = finished(features, model.counter, [size], [None])
    clips = values.view(1, 6, 4, 4, 32).movedim(-1, 1)
    wanted = functional.adaptive_avg_pool3d(clips, (2, 2, 3)).movedim(1, -1).reshape(-1, 32)
    assert out.grids == (Grid(2, 2, 3),)
    torch.testing.assert_close(out.values, wanted)
    # A single frame keeps its time, and is pooled in space alone.
    one = finished(
        VisionFeatures(values[:16], (Grid(1, 4, 4),)), model.counter, [ClipSize(24, 40, 1)], [None]
    )
    assert one.grids == (Grid(1, 2, 3),)


def naive_rolled(tokens, share, skip):
    """The definition, written as loops."""
    tiles, places, _ = tokens.shape
    out = tokens.clone()
    count = round((places - skip) * share)
    for number in range(count):
        place = skip + (2 * number + 1) * (places - skip) // (2 * count)
        for tile in range(tiles):
            out[(tile + 1) % tiles, place] = tokens[tile, place]
    return out


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_rolling_moves_a_share_of_the_tokens_to_the_next_frame(tiles):
    tokens = torch.randn(tiles, 1 + 16, 3)
    moved = rolled(tokens, 0.25, 1)
    assert moved.equal(naive_rolled(tokens, 0.25, 1))
    if tiles == 1:
        assert moved.equal(tokens)
    else:
        assert (moved != tokens).any(-1).sum() == 4 * tiles


def test_frames_meet_in_the_encoder_only_where_tokens_roll():
    changed = {}
    for name in ("frames", "rolled"):
        looks = made(name).processor.image_processor
        first, second = clip(4, 0), clip(4, 0)
        frames = list(second.source)
        frames[2] = tiny.picture(9, 24, 40)
        seen = [
            made(name).model.get_image_features(**looks.together([looks.look(each)])).values
            for each in (first, Clip(tuple(frames)))
        ]
        differs = (seen[0] - seen[1]).abs().amax(-1).view(4, 16) > 1e-6
        changed[name] = differs.any(1).tolist()
    assert changed == {
        "frames": [False, False, True, False],
        "rolled": [True, False, True, True],
    }  # two blocks: on to the next, and to the first


def test_a_network_without_tokens_refuses_to_roll(tmp_path):
    packed = {"model_type": "siglip2_vision_model", **tiny.VISION, "num_patches": 16}
    for eye in (
        {"use": "timm", "checkpoint": "test_convnext", "pretrained": False},
        {"use": "hf", "config": packed},
    ):
        made_ = tiny.compose_tiny(tmp_path, eye=eye, video={"use": "frames", "roll": 0.25})
        looks = made_.processor.image_processor
        with pytest.raises(ConfigError, match="ViT"):
            made_.model.get_image_features(**looks.together([looks.look(clip(2))]))


def naive_new(tiles, rows, columns, least):
    frames, _, height, width = tiles.shape
    down, across = height // rows, width // columns
    out = torch.zeros(frames, rows, columns, dtype=torch.bool)
    out[0] = True
    for frame in range(1, frames):
        best, where = -1.0, (0, 0)
        for row in range(rows):
            for column in range(columns):
                spot = (slice(row * down, (row + 1) * down),
                        slice(column * across, (column + 1) * across))  # fmt: skip
                one, other = tiles[frame][:, *spot], tiles[frame - 1][:, *spot]
                change = float((one.float() - other.float()).abs().mean())
                out[frame, row, column] = change > least
                if change > best:
                    best, where = change, (row, column)
        out[frame][where] = True
    return out


def test_tokens_like_those_of_the_frame_before_are_dropped():
    tiles = torch.randint(0, 256, (5, 3, 8, 12), dtype=torch.uint8)
    tiles[1, :, :, 6:] = tiles[0, :, :, 6:]
    tiles[3] = tiles[2]
    for least in (0.5, 80.0, 255.0):
        assert new_places(tiles, (2, 3), least).equal(naive_new(tiles, 2, 3, least))
    assert new_places(tiles[3:4], (2, 3), 1.0).all()


def test_what_is_kept_are_the_tokens_of_the_undropped_clip():
    whole, thin = made("frames"), made("dropped")
    thin.model.load_state_dict(whole.model.state_dict())
    shown = clip(4)
    looks = whole.processor.image_processor
    with torch.no_grad():
        all_tokens = whole.model.get_image_features(**looks.together([looks.look(shown)])).values
        looks = thin.processor.image_processor
        pixels, size = looks.look(shown)
        kept = thin.model.get_image_features(**looks.together([(pixels, size)])).values
    mask = pixels[-64:].bool()
    assert 16 < size.kept == int(mask.sum()) < 64  # the right half stands still
    assert looks.size_of(shown) == size
    torch.testing.assert_close(kept, all_tokens[mask])


def rows_of(folder, count: int = 8):
    rows = []
    for number in range(count):
        frames = clip(2 + number % 3, number).source
        names = [f"{number}-{index}.png" for index in range(len(frames))]
        for name, frame in zip(names, frames, strict=True):
            frame.save(folder / name)
        rows.append({"messages": [
            {"role": "user", "content": [{"type": "video", "video": names},
                                         {"type": "text", "text": "What happens?"}]},
            {"role": "assistant", "content": "nothing" if number % 2 else "rain"}]})  # fmt: skip
    write_lines(folder / "clips.jsonl", rows)


@pytest.mark.parametrize("video", ["pooled", "dropped"])
def test_packed_clips_are_what_each_is_alone(video, tmp_path):
    made_ = made(video)
    rows_of(tmp_path)
    mixture = Mixture(
        [(open_source(tmp_path, use="jsonl", path="clips.jsonl"), Share())], shuffle=False
    )
    planner = Planner(mixture, made_.processor, max_tokens=2000, max_tiles=64)
    samples = [planner.plan(number) for number in range(3)]
    looks = made_.processor.image_processor

    def logits(chosen):
        row = collate_packed(chosen)
        row.pop("labels")
        pixels = torch.cat([looks.pixels(image) for s in chosen for image in s.images])
        sizes = looks.sizes([size for sample in chosen for size in sample.sizes])
        with torch.no_grad():
            return made_.model(**row, pixel_values=pixels, **sizes).logits[0]

    together = logits(samples)
    alone = torch.cat([logits([sample]) for sample in samples])
    # Worst case seen 2e-6; a sample that sees its neighbour is off by more than 1e-2.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("video", [pytest.param("pooled", marks=pytest.mark.slow), "dropped"])
def test_a_recipe_trains_on_rows_of_clips(video, tmp_path):
    rows_of(tmp_path)
    words = {"use": "frames", **VIDEOS[video]}
    recipe = tiny_recipe(tmp_path)
    recipe["model"] |= {"video": words}
    recipe["stages"] = [
        {"name": "clips", "learn": ["connector.*"], "data": str(tmp_path / "clips.jsonl"),
         "until": {"epochs": 2}, "step_tokens": 512, "peak_lr": 1e-2}
    ]  # fmt: skip
    result = train(recipe, out=tmp_path / "run")
    assert result.stages[0].steps > 1
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert not any("drop" in line.get("event", "") for line in log)
    back = load(tmp_path / "run", device="cpu")
    assert back.model.config.video["max_frames"] == VIDEOS[video]["max_frames"]
    back.answer("What happens?", images=[clip(3)], max_new_tokens=3)


def test_a_picture_model_takes_clips_without_learning(tmp_path):
    pictures = tiny.compose_tiny(tmp_path)
    with pytest.raises(ConfigError, match=r"with_video"):
        pictures.answer("What?", images=[clip(3)])
    before = pictures.answer("What?", images=[tiny.picture()], max_new_tokens=4)
    films = pictures.with_video(max_frames=4, pool=[2, 2, 2])
    assert films.processor.count_tokens(clip(9)) == 8
    assert films.answer("What?", images=[tiny.picture()], max_new_tokens=4) == before
    films.answer("What?", images=[clip(9)], max_new_tokens=4)


def test_the_preview_shows_the_frames_that_are_taken(tmp_path):
    from mmlm.data.preview import Survey
    from mmlm.data.preview_page import preview_page

    rows_of(tmp_path, 1)
    mixture = Mixture([(open_source(tmp_path, use="jsonl", path="clips.jsonl"), Share())])
    made_ = made("frames")
    planned = Planner(mixture, made_.processor, max_tokens=2000, max_tiles=64).plan(0)
    page = preview_page(Survey([planned]), made_.processor, title="Clips")
    assert page.count("<figure>") == 2
    assert "frame 2, 32 × 32 px" in page


def test_a_clip_in_text_is_one_place():
    made_ = made("frames")
    turns = [Message("user", (ImagePart(clip(3)), Text("What?"))), assistant("Rain.")]
    encoded = made_.processor.encode_chat(turns, with_labels=True)
    assert encoded.text.count("<image>") == 1
    assert encoded.image_spans[0][1] - encoded.image_spans[0][0] == 3 * 16
    assert made_.processor.encode_chat([user("What?", [clip(3)])]).image_sizes == (
        ClipSize(24, 40, 3),
    )
