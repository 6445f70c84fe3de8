"""The quick size of a file is what Pillow says of it, or nothing."""

import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmlm.errors import ImageError
from mmlm.features import Size
from mmlm.images import read_size
from mmlm.images.header import quick_size, size_of_bytes
from tests.tiny import picture


def written(kind, height=23, width=41, **settings):
    stream = io.BytesIO()
    picture(1, height, width).save(stream, kind, **settings)
    return stream.getvalue()


def exif(orientation, *, order="II", padding=0):
    found = Image.Exif()
    found[0x010F] = "x" * padding
    found[0x0112] = orientation
    found.endian = {"II": "<", "MM": ">"}[order]
    return found.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("padding", [0, 9000])
def test_a_jpeg_that_lies_on_its_side_is_left_to_pillow(tmp_path, orientation, padding):
    data = written("JPEG", exif=exif(orientation, padding=padding))
    (tmp_path / "a.jpg").write_bytes(data)
    size, length = quick_size(str(tmp_path / "a.jpg"))
    assert size == (None if orientation > 4 else Size(23, 41))
    assert size in (None, read_size(tmp_path / "a.jpg"))
    assert length == len(data)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("JPEG", {"progressive": True}), ("JPEG", {"icc_profile": b"p" * 70_000}), ("PNG", {}),
     ("JPEG", {"comment": b"c" * 5000}), ("JPEG", {"quality": 100, "subsampling": 0})],
)  # fmt: skip
def test_plain_pictures_are_read_quickly(tmp_path, kind, words):
    (tmp_path / "a").write_bytes(written(kind, **words))
    assert quick_size(str(tmp_path / "a"))[0] == Size(23, 41)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "BMP", "TIFF"])
def test_other_formats_are_left_to_pillow(tmp_path, kind):
    (tmp_path / "a").write_bytes(written(kind))
    assert quick_size(str(tmp_path / "a"))[0] is None


def test_what_is_no_picture_is_left_to_pillow(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("hello")
    for name in ("empty", "folder", "text"):
        assert quick_size(str(tmp_path / name))[0] is None
    with pytest.raises(FileNotFoundError):
        quick_size(str(tmp_path / "gone"))


ORIGINALS = [
    written("JPEG"), written("JPEG", exif=exif(6)), written("JPEG", progressive=True),
    written("PNG"), written("PNG", exif=exif(8)), written("JPEG", exif=exif(5, order="MM")),
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(ORIGINALS), st.integers(0, 2**32), st.integers(0, 3))
def test_damaged_pictures_have_the_size_that_pillow_gives_or_none(original, seed, changes):
    draw, data = random.Random(seed), bytearray(original)
    for _ in range(changes):
        data[draw.randrange(min(len(data), 400))] = draw.randrange(256)
    if draw.random() < 0.3:
        del data[draw.randrange(len(data)) :]
    size, _ = size_of_bytes(bytes(data))
    try:
        theirs = read_size(bytes(data))
    except ImageError:
        return  # opened or refused when it is decoded, under the same cause
    assert size in (None, theirs)
