"""Streams: every row once an epoch, an order that is a function of the seed, cuts by name."""

import io
import json
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.data import Mixture, Share
from mmlm.data.streams_tar import members
from mmlm.errors import DataError
from tests.data.made import answer, captions, content, open_source, png, write_tar, write_tars

TARS = {"use": "webdataset", "path": "tars", "window": 4, "shards_at_once": 2}


def drawn(mixture, positions):
    return [answer(mixture.sources[p.source], p.row) for p in map(mixture.place, positions)]


def write_parquets(folder, sizes):
    folder.mkdir()
    first = 0
    for index, size in enumerate(sizes):
        numbers = range(first, first + size)
        columns = {
            "image": [{"bytes": png(n), "path": None} for n in numbers],
            "answer": [f"number {n}" for n in numbers],
        }
        path = folder / f"train-{index:05d}-of-{len(sizes):05d}.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=3)
        first += size
    return folder


def open_stream(folder, kind, sizes, **words):
    if kind == "tar":
        write_tars(folder / "tars", sizes)
        return open_source(folder, **{**TARS, **words})
    pytest.importorskip("datasets")
    write_parquets(folder / "parquets", sizes)
    settings = {"window": 4, "shards_at_once": 2, **words}
    return open_source(folder, use="hub", repo="parquets", **settings)


@pytest.mark.parametrize("kind", ["tar", "hub"])
def test_a_stream_gives_every_row_once_an_epoch_in_an_order_of_its_seed(tmp_path, kind):
    stream = open_stream(tmp_path, kind, [5, 9, 2, 7])
    every = {f"number {n}" for n in range(23)}
    assert len(stream) == 23
    plain = Mixture([(stream, Share())], shuffle=False)
    assert drawn(plain, range(24)) == [f"number {n % 23}" for n in range(24)]
    orders = [drawn(Mixture([(stream, Share())], seed=seed), range(46)) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert set(orders[0][:23]) == set(orders[0][23:]) == every
    assert orders[0][:23] != orders[0][23:]


@pytest.mark.parametrize("kind", ["tar", "hub"])
def test_a_stream_goes_on_exactly_from_what_a_checkpoint_holds(tmp_path, kind):
    stream = open_stream(tmp_path, kind, [5, 9, 2, 7])
    whole = drawn(Mixture([(stream, Share())], seed=3), range(60))
    for cut in range(1, 50, 7):
        first = Mixture([(stream, Share())], seed=3)
        drawn(first, range(cut))
        oldest = max(0, cut - 6)
        state = json.loads(json.dumps(first.stream_states({stream.name: oldest})))
        again = Mixture([(open_again(stream, tmp_path, kind), Share())], seed=3)
        again.restore_streams(state)
        assert drawn(again, range(oldest, 60)) == whole[oldest:]
        assert again.fingerprint() == first.fingerprint()


def open_again(stream, folder, kind):
    words = TARS if kind == "tar" else {
        "use": "hub", "repo": "parquets", "window": 4, "shards_at_once": 2,
    }  # fmt: skip
    found = open_source(folder, **words)
    assert found.name == stream.name
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 40),
    st.integers(0, 9),
)
def test_any_stream_can_be_left_and_gone_on_with(
    tmp_path_factory, sizes, window, at_once, cut, back
):
    folder = write_tars(tmp_path_factory.mktemp("shards"), sizes)
    words = {**TARS, "path": str(folder), "window": window, "shards_at_once": at_once}
    stream = open_source(folder, **words)
    whole = drawn(Mixture([(stream, Share())], seed=1), range(50))
    assert {"no_shard", "cut_shard"}.isdisjoint(whole)
    first = Mixture([(stream, Share())], seed=1)
    drawn(first, range(cut))
    oldest = max(0, cut - back)
    state = json.loads(json.dumps(first.stream_states({stream.name: oldest})))
    again = Mixture([(open_source(folder, **words), Share())], seed=1)
    again.restore_streams(state)
    assert drawn(again, range(oldest, 50)) == whole[oldest:]


def test_a_stream_and_a_file_are_mixed_by_weight(tmp_path):
    stream = open_stream(tmp_path, "tar", [5, 9, 2, 7])
    lines = [{"question": "a", "answer": f"line {n}"} for n in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = open_source(tmp_path, use="jsonl", path="a.jsonl")
    mixture = Mixture([(file, Share()), (stream, Share(weight=2))], seed=5)
    epoch = drawn(mixture, range(mixture.epoch_rows))
    assert sum(a.startswith("line") for a in epoch) == 10
    assert sorted(a for a in epoch if a.startswith("number")) == sorted(
        2 * [f"number {n}" for n in range(23)]
    )
    later = Mixture([(file, Share()), (stream, Share(weight=2))], seed=5)
    middle = mixture.epoch_rows // 2
    assert drawn(later, range(middle, mixture.epoch_rows)) == epoch[middle:]


def test_members_with_one_stem_are_one_row(tmp_path):
    turns = [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "No."}]
    files = {
        "x/1.10.png": png(1), "x/1.2.jpg": png(2, side=9),
        "x/1.json": json.dumps({"conversations": turns}),
        "x/2.png": png(), "x/2.txt": " a caption\n", "x/2.json": '{"id": "two", "url": "u"}',
        "x/3.png": png(), "x/3.txt": b"\xff",
        "x/4.json": "[1]", "x/5.json": "{", "x/6.txt": "no picture", "x/7.cls": "3",
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", files)
    source = open_source(tmp_path, use="webdataset", path="a.tar", window=1)
    two, ten = len(png(2, side=9)), len(png(1))
    assert content(source.sample(0))[0] == ("user", f"[{two} bytes]", f"[{ten} bytes]", "Same?")
    assert source.sample(0).id == "x/1"
    assert source.sample(1).id == "two"
    assert [answer(source, row) for row in range(1, 7)] == [
        "a caption", "bad_unicode", "not_a_row", "not_json", "no_question", "unknown_shape",
    ]  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_headers_of_every_kind_are_read_as_the_standard_library_reads_them(tmp_path, form):
    long = "d" * (90 if form == tarfile.USTAR_FORMAT else 300)
    name = "short" if form == tarfile.USTAR_FORMAT else "ünï" * 60
    files = {f"{long}/a.txt": "a", f"{name}.txt": "b" * 700, "empty.txt": ""}
    path = write_tar(tmp_path / "a.tar", files, format=form, encoding="utf-8")
    with path.open("rb") as file, tarfile.open(path) as archive:
        found = [(m.name, m.size, file.seek(m.data) and file.read(m.size)) for m in members(file)]
        expected = [(m.name, m.size, archive.extractfile(m).read()) for m in archive]
    assert found == expected


def test_a_shard_that_is_missing_or_cut_is_counted_and_the_rest_is_read(tmp_path):
    write_tars(tmp_path / "tars", [4, 4, 4, 4])
    cut, empty, gone = (tmp_path / "tars" / f"00{i}.tar" for i in (1, 2, 3))
    cut.write_bytes(cut.read_bytes()[: 5 * 1024 + 700])
    empty.write_bytes(b"")
    gone.unlink()
    source = open_source(
        tmp_path, use="webdataset", path="tars/{000..003}.tar", window=1, rows=7
    )  # fmt: skip
    assert [answer(source, row) for row in range(10)] == [
        "number 0", "number 1", "number 2", "number 3", "number 4", "number 5",
        "cut_shard", "no_shard", "no_shard", "number 0",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"byte 6,144 \(in .*001\.tar\)"):
        source.sample(6)


def test_parquet_shards_that_are_broken_are_counted_and_the_rest_is_read(tmp_path):
    open_stream(tmp_path, "hub", [4, 4, 4])
    cut, gone = (tmp_path / "parquets" / f"train-0000{i}-of-00003.parquet" for i in (1, 2))
    cut.write_bytes(cut.read_bytes()[:300])
    source = open_source(tmp_path, use="hub", repo="parquets", window=1)
    gone.unlink()
    found = [answer(source, row) for row in range(7)]
    assert found == [*(f"number {n}" for n in range(4)), "no_shard", "no_shard", "number 0"]


def test_a_cut_anywhere_is_told_from_an_end(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", captions(0, 3)).read_bytes()
    ends = whole.rstrip(b"\0")
    for length in random.Random(0).sample(range(1, len(ends)), 60):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        source = open_source(tmp_path, use="webdataset", path="cut.tar", window=1, rows=3)
        found = [answer(source, row) for row in range(3)]
        assert {"cut_shard", "no_shard"} & set(found), length


def test_bytes_of_any_kind_are_rows_or_causes(tmp_path):
    draw = random.Random(1)
    whole = bytearray(write_tar(tmp_path / "whole.tar", captions(0, 3)).read_bytes())
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(6000)] = draw.randrange(256)
        (tmp_path / "a.tar").write_bytes(data)
        source = open_source(tmp_path, use="webdataset", path="a.tar", window=1)
        for row in range(4):
            answer(source, row)


def test_shards_without_a_row_are_an_error_and_no_endless_loop(tmp_path):
    tarfile.open(tmp_path / "a.tar", "w").close()
    source = open_source(tmp_path, use="webdataset", path="a.tar", rows=3)
    with pytest.raises(DataError, match="holds a row"):
        source.sample(0)


def test_shards_of_an_address_need_a_number_of_rows(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    write_tars(tmp_path / "tars", [2, 3])
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "tars").iterdir():
        memory.pipe(f"/shards/{path.name}", path.read_bytes())
    words = {"use": "webdataset", "path": "memory://shards/{000..001}.tar", "window": 1}
    with pytest.raises(DataError, match="rows: 1_000_000"):
        open_source(tmp_path, **words)
    source = open_source(tmp_path, **words, rows=5)
    assert [answer(source, row) for row in range(5)] == [f"number {n}" for n in range(5)]
    glob = open_source(tmp_path, **{**words, "path": "memory://shards/*.tar", "rows": 5})
    assert answer(glob, 4) == "number 4"


def test_a_data_set_that_does_not_exist_says_so(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be streamed"):
        open_source(tmp_path, use="hub", repo="empty")


@pytest.mark.hub
def test_a_data_set_of_the_hub_is_streamed(tmp_path):
    source = open_source(
        tmp_path, use="hub", repo="HuggingFaceM4/the_cauldron", subset="ai2d", window=4,
        shards_at_once=1,
    )  # fmt: skip
    assert isinstance(source.sample(0).messages[0].images[0], bytes)
    assert io.BytesIO(source.sample(0).messages[0].images[0]).read(1)
