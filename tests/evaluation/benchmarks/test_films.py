"""Videos in benchmarks: films and folders of frames, as pictures or as one clip."""

from __future__ import annotations

import pytest
from PIL import Image

from mmlm.errors import EvaluationError
from mmlm.evaluation import load_benchmark
from mmlm.evaluation.asking.backend import LocalBackend
from mmlm.evaluation.benchmarks.conditions import cases
from mmlm.evaluation.benchmarks.pictures import find_frames
from mmlm.generation import GenerationSettings
from mmlm.messages import Clip
from tests.evaluation.conftest import write_rows
from tests.tiny import compose_tiny


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))


def frames(first=0, count=10):
    return [Image.new("RGB", (16, 16), (20 * n + first, 0, 0)) for n in range(count)]


def write_gif(path, **made):
    pictures = frames(**made)
    pictures[0].save(path, save_all=True, append_images=pictures[1:])


def reds(paths):
    shown = []
    for path in paths:
        with Image.open(path) as image:
            shown.append(image.convert("RGB").getpixel((0, 0))[0])
    return shown


def test_frames_of_a_film_are_cut_once_and_by_its_bytes(tmp_path):
    write_gif(tmp_path / "a.gif")
    found = find_frames("a", [tmp_path], 4)
    assert reds(found) == [20, 60, 120, 160]
    before = [path.stat().st_mtime_ns for path in found]
    assert find_frames("a.gif", [tmp_path], 4) == found
    assert [path.stat().st_mtime_ns for path in found] == before
    write_gif(tmp_path / "a.gif", first=5)
    assert reds(find_frames("a", [tmp_path], 4)) == [25, 65, 125, 165]
    assert len(find_frames("a", [tmp_path], 99)) == 10


def test_a_film_of_another_kind_is_opened_by_pyav(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        for picture in frames():
            film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode())
    found = find_frames("a", [tmp_path], 4)
    assert reds(found) == pytest.approx([20, 60, 120, 160], abs=12)  # the codec loses a little


def test_films_that_are_missing_or_broken_are_named(tmp_path):
    (tmp_path / "broken.gif").write_bytes(b"GIF89a and nothing")
    rows = write_rows(tmp_path, [
        {"id": "1", "video": "none", "question": "?", "answer": "x"},
        {"id": "2", "video": "broken", "question": "?", "answer": "x"},
    ])  # fmt: skip
    yaml = tmp_path / "films.yaml"
    yaml.write_text(f'dataset: {{path: {rows.name}}}\nimage: "{{video}}"\nframes: 2\n')
    with pytest.raises(EvaluationError, match=r"(?s)2 of 2 rows.*no film.*gives no frames"):
        load_benchmark(yaml)


def test_a_model_with_a_video_policy_gets_one_clip_and_every_other_pictures(tmp_path):
    write_gif(tmp_path / "a.gif")
    rows = write_rows(tmp_path, [{"id": "1", "video": "a", "question": "What?", "answer": "x"}])
    yaml = tmp_path / "films.yaml"
    yaml.write_text(
        f'dataset: {{path: {rows.name}}}\nimage: "{{video}}"\nframes: 4\nscorer: exact\n'
    )
    benchmark = load_benchmark(yaml)
    (case,) = cases(benchmark, "image", benchmark.items, seed=0)
    settings = GenerationSettings(max_new_tokens=6)

    plain = compose_tiny(tmp_path / "plain")
    wanted = plain.answer("What?", list(case.images), max_new_tokens=6)
    assert LocalBackend(plain).answer([case], settings) == [wanted]

    watching = compose_tiny(tmp_path / "watching", video={"use": "frames", "max_frames": 2})
    wanted = watching.answer("What?", [Clip(case.images)], max_new_tokens=6)
    assert LocalBackend(watching).answer([case], settings) == [wanted]
