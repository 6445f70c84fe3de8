"""Clips: which frames are taken, how they are opened, and what is refused."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmlm.errors import ConfigError, DataError, ImageError, MissingExtraError
from mmlm.features import Size
from mmlm.images import clip_facts, evenly, open_frames, video_policies
from mmlm.messages import Clip, from_openai, to_openai


def read(**words):
    return video_policies.read({"use": "frames", **words}, origin="video")


SIZE = Size(24, 32)


def greys(count: int, size: Size = SIZE) -> list[Image.Image]:
    """Frames of one grey each, growing brighter."""
    return [
        Image.fromarray(np.full((*size, 3), 10 + 8 * number, dtype=np.uint8))
        for number in range(count)
    ]


def film(path, count: int = 24, rate: int = 8):
    """Write a film of growing greys."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for frame in greys(count):
            out.mux(stream.encode(av.VideoFrame.from_image(frame)))
        out.mux(stream.encode())
    return path


@given(there=st.integers(1, 5000), data=st.data())
def test_frames_are_taken_evenly_in_order_and_never_twice(there, data):
    wanted = data.draw(st.integers(1, there))
    chosen = evenly(there, wanted)
    assert len(chosen) == wanted
    assert chosen == sorted(set(chosen))
    assert 0 <= chosen[0] <= chosen[-1] < there
    gaps = np.diff([*chosen, chosen[0] + there])
    assert gaps.max() - gaps.min() <= 1
    assert abs(chosen[0] - (there - 1 - chosen[-1])) <= 1  # as far from either end


@given(
    there=st.integers(1, 1000),
    seconds=st.none() | st.floats(0, 1e4),
    most=st.integers(1, 64),
    rate=st.none() | st.floats(0.1, 30),
)
def test_no_clip_takes_more_than_its_budget(there, seconds, most, rate):
    count = read(max_frames=most, per_second=rate).num_frames(there, seconds)
    assert 1 <= count <= min(most, there)
    if rate is None or seconds is None:
        assert count == min(most, there)


def test_a_film_is_opened_frame_by_frame(tmp_path):
    clip = Clip(str(film(tmp_path / "a.mp4")))
    facts = clip_facts(clip)
    assert (facts.size, facts.num_frames) == (Size(24, 32), 24)
    assert facts.seconds == pytest.approx(3.0, abs=0.2)
    found = open_frames(clip, [0, 9, 23])
    # Compressed greys are some steps off; neighbours of those wanted are 8 apart.
    assert [np.asarray(each).mean() for each in found] == pytest.approx([10, 82, 194], abs=3.5)


def test_an_animation_and_a_list_are_clips_too(tmp_path):
    frames = greys(5)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    for clip in (Clip(str(tmp_path / "a.gif")), Clip(tuple(frames))):
        assert clip_facts(clip).num_frames == 5
        found = open_frames(clip, [1, 3])
        assert [np.asarray(each).mean() for each in found] == pytest.approx([18, 34], abs=1)


def test_what_is_no_clip_is_refused_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"no film at all" * 50)
    pytest.importorskip("av")
    with pytest.raises(ImageError, match=r"a\.mp4 cannot be opened"):
        clip_facts(Clip(str(tmp_path / "a.mp4")))
    with pytest.raises(ImageError, match="cannot be opened"):
        clip_facts(Clip(str(tmp_path / "none.mp4")))
    with pytest.raises(ImageError, match="different sizes"):
        clip_facts(Clip((greys(1)[0], greys(1, Size(9, 9))[0])))
    with pytest.raises(ImageError, match="no frames"):
        clip_facts(Clip(()))
    real = builtins.__import__

    def without(name, *given, **named):
        if name == "av":
            raise ImportError(name)
        return real(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"mmlm\[video\]"):
        clip_facts(Clip(str(tmp_path / "a.mp4")))


@pytest.mark.parametrize(
    "words",
    [{"drop": 1.0, "pool": [2, 2, 2]}, {"drop": 1.0, "joined": True}, {"pool": [0, 1, 1]},
     {"image": {"use": "tiles"}}, {"roll": 0.9}, {"frames": 3}],
)  # fmt: skip
def test_settings_that_contradict_are_refused(words):
    with pytest.raises(ConfigError, match="video"):
        read(**words)


def test_a_video_part_of_a_message_is_a_clip_and_goes_back():
    rows = [
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"},
                                     {"type": "text", "text": "What happens?"}]},
        {"role": "user", "content": [{"type": "video", "video": ["1.png", "2.png"]}]},
    ]  # fmt: skip
    messages = from_openai(rows)
    assert [image.source for message in messages for image in message.images] == [
        "a.mp4",
        ("1.png", "2.png"),
    ]
    assert to_openai(messages)[0]["content"] == rows[0]["content"]
    assert to_openai(messages)[1]["content"] == rows[1]["content"]
    with pytest.raises(DataError, match="film or its frames"):
        from_openai([{"role": "user", "content": [{"type": "video", "video": []}]}])
