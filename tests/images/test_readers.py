"""Pictures of medicine, of satellites and of paper: read by their bytes, sized by their headers."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from mmlm.errors import ConfigError, ImageError, MissingExtraError
from mmlm.features import Size
from mmlm.images import all_readers, image_policies, open_image, picture_readers, read_size

pydicom = pytest.importorskip("pydicom")
rasterio = pytest.importorskip("rasterio")
pdfium = pytest.importorskip("pypdfium2")


def dicom(values, *, photometric="MONOCHROME2", frames=1, **tags) -> bytes:
    """A DICOM file of uint16 or int16 grey, or uint8 colours."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["a"])
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    shape = values.shape[1:] if frames > 1 else values.shape
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = 3 if len(shape) == 3 else 1
    if len(shape) == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    bits = values.dtype.itemsize * 8
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    if frames > 1:
        dataset.NumberOfFrames = frames
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = values.tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def geotiff(values, **settings) -> bytes:
    """A GeoTIFF of ``(bands, height, width)``."""
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", count=values.shape[0], height=values.shape[1], width=values.shape[2],
            dtype=values.dtype, crs="EPSG:32633",
            transform=rasterio.transform.from_origin(0, 0, 10, 10), **settings,
        ) as raster:  # fmt: skip
            raster.write(values)
        return memory.read()


def paper(*sizes) -> bytes:
    """A PDF of blank pages of these sizes in points; the bottom half of each is black."""
    document = pdfium.PdfDocument.new()
    for width, height in sizes:
        page = document.new_page(width, height)
        raw = pdfium.raw
        box = raw.FPDFPageObj_CreateNewRect(0, 0, width, height / 2)
        raw.FPDFPageObj_SetFillColor(box, 0, 0, 0, 255)
        raw.FPDFPath_SetDrawMode(box, raw.FPDF_FILLMODE_WINDING, False)
        raw.FPDFPage_InsertObject(page, box)
        page.gen_content()
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def grey(data, **read):
    """The first row of a picture that is grey, after the settings of its reader."""
    opened = np.asarray(open_image(data, readers=all_readers(read)))
    assert (opened[..., 0] == opened[..., 1]).all()
    return opened[0, :, 0].tolist()


HOUNSFIELD = {"RescaleSlope": 1, "RescaleIntercept": -1000}
# Stored values 0 to 2000 are -1000 to 1000 Hounsfield units.
CT = np.array([[0, 800, 1000, 1200, 2000]] * 3, dtype=np.uint16)


class TestDicom:
    def test_its_size_is_that_of_its_picture(self):
        data = dicom(CT)
        assert read_size(data, readers=all_readers()) == Size(3, 5)
        assert open_image(data, readers=all_readers()).size == (5, 3)

    def test_the_window_of_the_file_is_taken(self):
        # PS3.3 C.11.2.1.2: black up to c - 0.5 - (w-1)/2 = -200, white from 200 - 1 on.
        data = dicom(CT, WindowCenter=0, WindowWidth=400, **HOUNSFIELD)
        assert grey(data) == [0, 0, 128, 255, 255]

    def test_a_window_of_the_recipe_wins(self):
        data = dicom(CT, WindowCenter=0, WindowWidth=400, **HOUNSFIELD)
        assert grey(data, dicom={"window": [0, 2001]}) == [0, 102, 128, 153, 255]

    @pytest.mark.parametrize("settings", [{}, {"dicom": {"window": "spread"}}], ids=["none", "set"])
    def test_without_a_window_the_values_are_spread(self, settings):
        assert grey(dicom(CT, **HOUNSFIELD), **settings) == [0, 102, 128, 153, 255]

    def test_our_window_is_that_of_pydicom(self):
        from pydicom.pixels import apply_windowing

        values = np.arange(0, 4096, 7, dtype=np.uint16)[None]
        for shape in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
            data = dicom(values, WindowCenter=1500, WindowWidth=900, VOILUTFunction=shape)
            dataset = pydicom.dcmread(io.BytesIO(data))
            wanted = apply_windowing(values, dataset) / 65_535 * 255
            assert np.abs(np.array(grey(data)) - wanted[0]).max() <= 0.51, shape

    def test_the_first_of_several_windows_is_taken(self):
        data = dicom(CT, WindowCenter=[0, 500], WindowWidth=[400, 10], **HOUNSFIELD)
        assert grey(data) == [0, 0, 128, 255, 255]

    def test_padding_has_no_part_in_the_spread(self):
        values = np.array([[-2000, 0, 50, 100]], dtype=np.int16)
        assert grey(dicom(values, PixelPaddingValue=-2000)) == [0, 0, 128, 255]

    def test_monochrome1_is_turned(self):
        data = dicom(np.array([[0, 100]], dtype=np.uint16), photometric="MONOCHROME1")
        assert grey(data) == [255, 0]

    def test_colours_are_colours(self):
        values = np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)
        data = dicom(values, photometric="RGB")
        assert np.array_equal(np.asarray(open_image(data, readers=all_readers())), values)

    def test_a_frame_is_named_in_the_path(self, tmp_path):
        film = np.stack([np.full((2, 2), value, np.uint8) for value in (10, 20, 30)])
        film[:, 0, 0], film[:, 0, 1] = 0, 255
        (tmp_path / "film.dcm").write_bytes(dicom(film, frames=3))
        readers = all_readers()
        seen = [
            open_image(f"{tmp_path}/film.dcm#frame={n}", readers=readers).getpixel((0, 1))[0]
            for n in range(3)
        ]
        assert seen == [10, 20, 30]
        with pytest.raises(ImageError, match="frame number 3 was asked for; the file has 3"):
            read_size(f"{tmp_path}/film.dcm#frame=3", readers=readers)

    def test_a_file_without_pixels_is_refused(self):
        data = dicom(CT)
        dataset = pydicom.dcmread(io.BytesIO(data))
        for name in ("PixelData", "Rows", "Columns"):
            delattr(dataset, name)
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        with pytest.raises(ImageError, match="holds no picture"):
            read_size(buffer.getvalue(), readers=all_readers())

    def test_a_promise_of_too_many_pixels_is_refused_before_decoding(self):
        data = dicom(CT)
        dataset = pydicom.dcmread(io.BytesIO(data))
        dataset.Rows = dataset.Columns = 60_000
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        with pytest.raises(ImageError, match="more than the"):
            open_image(buffer.getvalue(), readers=all_readers())

    def test_a_file_that_was_cut_short_is_refused(self):
        values = np.zeros((64, 64), np.uint16)
        with pytest.raises(ImageError, match="damaged or truncated"):
            open_image(dicom(values)[:-2000], readers=all_readers())

    def test_a_number_that_is_there_and_empty_is_not_there(self):
        dataset = pydicom.dcmread(io.BytesIO(dicom(CT, WindowWidth=400)))
        dataset.WindowCenter = dataset.NumberOfFrames = None
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        assert grey(buffer.getvalue()) == grey(dicom(CT))
        dataset.Rows = None
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        with pytest.raises(ImageError, match="holds no picture"):
            open_image(buffer.getvalue(), readers=all_readers())


class TestGeoTiff:
    bands = np.stack([np.full((2, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)])

    def test_the_first_three_bands_are_seen_by_default(self):
        data = geotiff(self.bands)
        assert read_size(data, readers=all_readers()) == Size(2, 3)
        assert open_image(data, readers=all_readers()).getpixel((0, 0)) == (10, 20, 30)

    def test_the_recipe_chooses_bands(self):
        readers = all_readers({"geotiff": {"bands": [5, 3, 1]}})
        assert open_image(geotiff(self.bands), readers=readers).getpixel((0, 0)) == (50, 30, 10)

    def test_bands_are_chosen_also_where_three_would_open_without_a_library(self):
        readers = all_readers({"geotiff": {"bands": [3, 2, 1]}})
        data = geotiff(self.bands[:3], photometric="RGB")
        assert open_image(data).getpixel((0, 0)) == (10, 20, 30)
        assert open_image(data, readers=readers).getpixel((0, 0)) == (30, 20, 10)

    def test_a_band_that_is_not_there_is_an_error(self):
        readers = all_readers({"geotiff": {"bands": [9, 2, 1]}})
        with pytest.raises(ImageError, match=r"Band 9 was asked for .*; the file has 5"):
            open_image(geotiff(self.bands), readers=readers)

    def test_deep_values_are_brought_to_bytes_by_a_range(self):
        values = np.zeros((4, 1, 3), np.uint16)
        values[:, 0] = [0, 1500, 9000]
        readers = all_readers({"geotiff": {"range": [0, 3000]}})
        opened = np.asarray(open_image(geotiff(values), readers=readers))
        assert opened[0, :, 0].tolist() == [0, 128, 255]

    def test_deep_values_are_spread_by_default_and_without_data_is_black(self):
        values = np.tile(np.arange(1000, 2001, dtype=np.float32), (4, 1, 1))
        values[:, 0, 500] = -9999
        opened = np.asarray(open_image(geotiff(values, nodata=-9999), readers=all_readers()))
        assert opened[0, 500].tolist() == [0, 0, 0]
        # The 2nd percentile of the thousand values is 1019.98 and the 98th 1980.02.
        wanted = np.clip((np.arange(1000, 2001) - 1019.98) / 960.04, 0, 1) * 255
        assert np.abs(np.delete(opened[0, :, 0] - wanted, 500)).max() < 0.6

    def test_a_path_and_its_bytes_give_the_same(self, tmp_path):
        path = tmp_path / "named.png"  # the name says nothing
        path.write_bytes(geotiff(self.bands))
        assert open_image(path, readers=all_readers()).getpixel((0, 0)) == (10, 20, 30)

    @pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "P", "I;16", "F", "1"])
    @pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
    def test_what_pillow_shows_is_left_to_pillow(self, mode, compression):
        buffer = io.BytesIO()
        Image.new(mode, (3, 2)).save(buffer, "TIFF", compression=compression)
        buffer.seek(0)
        assert not picture_readers["geotiff"]().claims(buffer)
        assert open_image(buffer.getvalue(), readers=all_readers()).size == (3, 2)

    def test_a_promise_of_too_many_pixels_is_refused_before_decoding(self):
        data = geotiff(np.zeros((4, 2000, 2000), np.uint8), compress="deflate")
        with pytest.raises(ImageError, match=r"2000 x 2000 pixels, more than the 1,000,000"):
            open_image(data, readers=all_readers(), max_pixels=1_000_000)

    def test_a_file_that_was_cut_short_is_refused(self):
        noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64), dtype=np.uint8)
        with pytest.raises(ImageError, match=r"damaged or truncated|not a picture"):
            open_image(geotiff(noise)[:3000], readers=all_readers())


class TestPdf:
    def test_a_page_is_drawn_at_the_resolution_asked_for(self):
        data = paper((72, 144))
        for dpi in (72, 150, 200):
            readers = all_readers({"pdf": {"dpi": dpi}})
            picture = open_image(data, readers=readers)
            assert read_size(data, readers=readers) == Size(picture.height, picture.width)
            assert picture.size == (dpi, 2 * dpi)
            assert picture.getpixel((5, 5)) == (255, 255, 255)
            assert picture.getpixel((5, 2 * dpi - 5)) == (0, 0, 0)

    def test_a_page_is_named_in_the_path(self, tmp_path):
        (tmp_path / "paper.pdf").write_bytes(paper((72, 72), (72, 36)))
        readers = all_readers({"pdf": {"dpi": 72}})
        assert read_size(tmp_path / "paper.pdf", readers=readers) == Size(72, 72)
        assert read_size(f"{tmp_path}/paper.pdf#page=2", readers=readers) == Size(36, 72)
        with pytest.raises(ImageError, match="the file has 2"):
            open_image(f"{tmp_path}/paper.pdf#page=3", readers=readers)
        with pytest.raises(ImageError, match="first page is page 1"):
            open_image(f"{tmp_path}/paper.pdf#page=0", readers=readers)

    def test_a_giant_page_is_refused_before_it_is_drawn(self):
        with pytest.raises(ImageError, match="more than the"):
            open_image(paper((14_000, 14_000)), readers=all_readers({"pdf": {"dpi": 600}}))

    @pytest.mark.parametrize(
        "data", [b"%PDF-1.7 nothing", paper((72, 72))[:300]], ids=["text", "cut"]
    )
    def test_what_is_damaged_is_refused(self, data):
        with pytest.raises(ImageError, match="damaged or truncated"):
            open_image(data, readers=all_readers())

    def test_threads_do_not_meet_inside_the_library(self):
        from concurrent.futures import ThreadPoolExecutor

        data, readers = paper((72, 72)), all_readers()
        with ThreadPoolExecutor(4) as pool:
            pictures = list(pool.map(lambda _: open_image(data, readers=readers), range(24)))
        assert {picture.getpixel((2, 148)) for picture in pictures} == {(0, 0, 0)}


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_a_frame_of_an_animation_is_named_in_the_path(kind, tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (8, 8), colour) for colour in colours]
    path = tmp_path / "film"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], lossless=True)
    for number, colour in enumerate(colours):
        opened = open_image(f"{path}#frame={number}").getpixel((4, 4))
        assert max(abs(a - b) for a, b in zip(opened, colour, strict=True)) < 5
    with pytest.raises(ImageError, match="frame number 3 was asked for; the file has 3"):
        open_image(f"{path}#frame=3")


def test_a_file_that_is_really_called_like_a_frame_is_that_file(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.png#frame=7")
    assert open_image(tmp_path / "a.png#frame=7").size == (3, 2)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_plain_grey_goes_through_a_window(depth):
    values = np.array([[0, 100, 125, 150, 255]], dtype=depth)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    data = buffer.getvalue()
    assert grey(data, picture={"window": [125, 50]}) == [0, 0, 128, 255, 255]
    assert grey(data, picture={"window": "spread"}) == [0, 100, 125, 150, 255]
    full = [0, 100, 125, 150, 255] if depth is np.uint8 else [0, 0, 0, 1, 1]
    assert grey(data) == grey(data, picture={"window": "full"}) == full


@pytest.mark.parametrize(
    ("data", "package", "extra"),
    [(dicom(CT), "pydicom", "dicom"), (geotiff(TestGeoTiff.bands), "rasterio", "geo"),
     (paper((72, 72)), "pypdfium2", "pdf")],
    ids=["dicom", "geo", "pdf"],
)  # fmt: skip
def test_a_missing_library_names_its_extra(data, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"mmlm\[{extra}\]"):
        read_size(data, readers=all_readers())


@pytest.mark.parametrize("data", [dicom(CT), geotiff(TestGeoTiff.bands), paper((72, 72))],
                         ids=["dicom", "geo", "pdf"])  # fmt: skip
def test_nothing_is_given_to_a_library_that_was_not_asked_for(data, monkeypatch):
    for package in ("pydicom", "rasterio", "pypdfium2"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImageError, match=r"not a picture|damaged"):
        open_image(data)


def test_random_bytes_behind_a_mark_never_raise_anything_but_an_image_error():
    rng = np.random.default_rng(0)
    wholes = [dicom(CT), geotiff(TestGeoTiff.bands), paper((20, 20))]
    readers = all_readers()
    for turn in range(150):
        broken = bytearray(wholes[turn % 3])
        for place in rng.integers(8, len(broken), size=4):
            broken[place] = rng.integers(256)
        try:
            assert open_image(bytes(broken), readers=readers).mode == "RGB"
        except ImageError:
            continue


def test_the_settings_of_readers_stand_in_the_image_policy_and_travel_with_it():
    words = {"use": "letterbox", "read": {"dicom": {"window": [40.0, 400.0]}}}
    policy = image_policies.read(words, origin="image")
    assert policy.to_dict() == words
    assert policy.readers.by_name["dicom"].window == (40.0, 400.0)
    assert image_policies.read({"use": "letterbox"}, origin="image").to_dict() == {
        "use": "letterbox"
    }


@pytest.mark.parametrize(
    ("read", "words"),
    [({"dikom": {}}, "Did you mean 'dicom'"), ({"pdf": {"dpi": 1}}, "greater than or equal to 18"),
     ({"geotiff": {"bands": [0, 1, 2]}}, "count from 1")],
)  # fmt: skip
def test_a_wrong_setting_is_refused_when_the_recipe_is_read(read, words):
    with pytest.raises(ConfigError, match=words):
        image_policies.read({"use": "letterbox", "read": read}, origin="image")
