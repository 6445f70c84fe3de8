"""Pictures that strangers send: opened as a person would expect, or refused with the reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmlm.errors import ImageError
from mmlm.features import Size
from mmlm.images import open_image, read_size
from mmlm.images.readers import PictureConfig, ReaderConfig, Readers


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def picture(width: int = 40, height: int = 30) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    values = np.stack(
        [columns * 255 // max(1, width - 1), rows * 255 // max(1, height - 1), rows + columns], -1
    )
    return Image.fromarray(values.astype(np.uint8))


def promised_png(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose body holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "TGA", "ICO", "JPEG2000"]
)
def test_a_picture_opens_in_every_format(kind):
    opened = open_image(encoded(picture(), kind))
    assert opened.mode == "RGB"
    assert read_size(encoded(picture(), kind)) == Size(opened.height, opened.width)


def test_a_file_its_bytes_and_the_open_picture_give_the_same_pixels(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    wanted = np.asarray(picture())
    for source in (path, str(path), path.read_bytes(), picture(), wanted):
        assert np.array_equal(np.asarray(open_image(source)), wanted)
        assert read_size(source) == Size(30, 40)


def test_the_picture_that_is_given_is_never_the_one_that_is_returned():
    mine = picture()
    open_image(mine).paste((0, 0, 0), (0, 0, 40, 30))
    assert np.array_equal(np.asarray(mine), np.asarray(picture()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_and_its_size(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), "PNG", exif=exif)
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation](np.asarray(picture()))
    assert np.array_equal(np.asarray(open_image(data)), upright)
    assert read_size(data) == Size(*upright.shape[:2])


def test_broken_exif_counts_as_upright():
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    assert open_image(data).size == (40, 30)
    assert read_size(data) == Size(30, 40)


def test_cmyk_becomes_rgb():
    cyan = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    red, green, blue = open_image(encoded(cyan, "JPEG", quality=100)).getpixel((1, 1))
    assert red < 40
    assert min(green, blue) > 150


def test_a_palette_becomes_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    opened = open_image(encoded(image))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (3, 3), (10, 200, 30, 0)),
        Image.new("LA", (3, 3), (10, 0)),
        Image.new("PA", (3, 3), 0),
        Image.new("La", (3, 3), (0, 0)),
        Image.new("RGBa", (3, 3), (0, 0, 0, 0)),
    ],
    ids=lambda image: image.mode,
)
def test_what_is_transparent_is_white(image):
    assert open_image(image).getpixel((1, 1)) == (255, 255, 255)


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    opened = open_image(encoded(image, "PNG", transparency=0))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


def test_half_transparent_is_mixed_with_white():
    assert open_image(Image.new("RGBA", (2, 2), (0, 0, 0, 127))).getpixel((0, 0)) == (128, 128, 128)


def test_sixteen_bit_grey_keeps_its_scale():
    values = np.array([[0, 257 * 100, 65_535]], dtype=np.uint16)
    for source in (
        encoded(Image.fromarray(values), "PNG"),
        encoded(Image.fromarray(values), "TIFF"),
        values,
    ):
        assert np.asarray(open_image(source))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-1000.0, 0.0, 1000.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[-5, 0, 5]], np.int32), [0, 128, 255]),
    ],
    ids=["unit", "bytes", "spread", "nan", "signed"],
)
def test_grey_of_floats_and_long_integers_is_seen(values, wanted):
    assert np.asarray(open_image(Image.fromarray(values)))[0, :, 0].tolist() == wanted


def test_one_bit_becomes_black_and_white():
    image = Image.new("1", (2, 1), 0)
    image.putpixel((1, 0), 1)
    assert [open_image(image).getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_shows_its_first_frame(kind):
    frames = [
        Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    ]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    red, green, blue = open_image(data).getpixel((4, 4))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (20_000, 3), (3, 20_000)], ids=str)
def test_strips_open(size):
    data = encoded(Image.new("RGB", size, (1, 2, 3)))
    assert open_image(data).size == size
    assert read_size(data) == Size(size[1], size[0])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF"])
def test_a_truncated_picture_is_refused(kind, share):
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    data = encoded(noise, kind)
    with pytest.raises(ImageError, match=r"damaged or truncated|not a picture"):
        open_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (b"hello, this is text", 'begins with the text "hello, this is '),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"\x00\x00\x00\x18ftypheic....", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "not a picture|damaged"),
        (b"\xff\xd8\xff\xe0", "not a picture|damaged"),
        (bytes(1000), "not a picture.*begins with the bytes 00 00 00"),
    ],
    ids=["empty", "text", "svg", "html", "pdf", "heic", "eps", "png-magic", "jpeg-magic", "zeros"],
)
def test_what_is_no_picture_is_refused_with_what_it_seems_to_be(data, words):
    with pytest.raises(ImageError, match=words):
        open_image(data)
    with pytest.raises(ImageError, match=words):
        read_size(data)


def test_files_that_cannot_be_opened_are_named(tmp_path):
    empty = tmp_path / "empty.jpg"
    empty.touch()
    with pytest.raises(ImageError, match=r"empty\.jpg is empty"):
        open_image(empty)
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match=r"no picture at .*nothing\.png"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="address"):
        open_image("https://example.com/a.png")
    with pytest.raises(ImageError, match="int cannot be opened"):
        open_image(3)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_from_its_header():
    # 30,000 x 30,000 pixels would take 2.7 GB; the file has 57 bytes and no data to decode.
    with pytest.raises(ImageError, match=r"pixels"):
        open_image(promised_png(30_000, 30_000))
    with pytest.raises(ImageError, match=r"10000 x 10000 pixels, more than the"):
        read_size(promised_png(10_000, 10_000))
    with pytest.raises(ImageError, match=r"1000 x 1000 pixels, more than the 999,999"):
        open_image(promised_png(1000, 1000), max_pixels=999_999)
    with pytest.raises(ImageError, match="longest side"):
        open_image(promised_png(100_000, 1))
    with pytest.raises(ImageError, match="more than the"):
        open_image(picture(), max_pixels=10)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 20, 20), np.uint8), "not a picture"),
        (np.zeros((0, 4, 3), np.uint8), "not a picture"),
        (np.zeros((2, 3, 4, 3), np.uint8), "not a picture"),
        (np.full((4, 4, 3), 200.0), "between 0 and 1"),
        (np.full((4, 4), np.nan), "between 0 and 1"),
        (np.zeros((4, 4), np.int64), "int64"),
    ],
    ids=["channels-first", "empty", "4-d", "bytes-as-floats", "nan", "int64"],
)
def test_an_array_that_is_no_picture_is_refused(array, words):
    with pytest.raises(ImageError, match=words):
        open_image(array)


def test_arrays_of_every_kind_open():
    ones = np.ones((4, 5), bool)
    assert open_image(ones).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(np.full((4, 5, 3), 0.5)).getpixel((0, 0)) == (128, 128, 128)
    assert open_image(np.full((4, 5, 1), 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)
    assert open_image(np.zeros((4, 5, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)


def test_random_bytes_never_raise_anything_but_an_image_error():
    rng = np.random.default_rng(0)
    whole = encoded(picture(), "PNG")
    for _ in range(200):
        broken = bytearray(whole)
        for place in rng.integers(8, len(broken), size=5):
            broken[place] = rng.integers(256)
        try:
            assert open_image(bytes(broken)).mode == "RGB"
        except ImageError:
            continue


MISTAKES = {
    AttributeError: lambda: None.height,
    NameError: lambda: no_such_name,
    TypeError: lambda: len(3),
    NotImplementedError: lambda: ReaderConfig().claims(io.BytesIO()),
}


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_a_mistake_in_the_code_of_a_reader_is_no_damaged_picture(kind):
    class Mistaken(PictureConfig):
        def claims(self, file):
            return True

        def size(self, file):
            return MISTAKES[kind]()

    readers = Readers({"mistaken": Mistaken()})
    for call in (open_image, read_size):
        with pytest.raises(kind) as caught:
            call(encoded(picture()), readers=readers)
        assert not isinstance(caught.value, ImageError)
