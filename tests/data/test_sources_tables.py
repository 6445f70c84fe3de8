"""Parquet, Arrow and folders with captions: any row at random, nothing loaded, wrong ones named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlm.data import sources_arrow
from mmlm.errors import DataError
from tests.data.made import answer, content, open_source, png, write_lines


def table(first, count, **columns):
    numbers = range(first, first + count)
    return pa.table(
        {
            "id": [f"row-{n}" for n in numbers],
            "image": [{"bytes": png(n), "path": None} for n in numbers],
            "question": ["Which?" for _ in numbers],
            "answer": [f"number {n}" for n in numbers],
            **columns,
        }
    )


def write_parquet(folder, sizes, **settings):
    folder.mkdir(exist_ok=True)
    first = 0
    for index, size in enumerate(sizes):
        pq.write_table(table(first, size), folder / f"part-{index}.parquet", **settings)
        first += size
    return folder


@pytest.mark.parametrize("row_group_size", [2, 100])
def test_any_row_of_several_parquet_files_is_read_alone(tmp_path, row_group_size):
    write_parquet(tmp_path / "p", [5, 0, 7], row_group_size=row_group_size)
    source = open_source(tmp_path, use="parquet", path="p")
    assert len(source) == 12
    assert [answer(source, row) for row in (11, 0, 4, 5)] == [f"number {n}" for n in (11, 0, 4, 5)]
    sample = source.sample(5)
    assert (sample.id, sample.messages[0].images) == ("row-5", [png(5)])


def test_parquet_with_large_row_groups_is_written_once_as_arrow(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources_arrow, "_MOST_GROUP_BYTES", 100)
    write_parquet(tmp_path / "p", [70, 3])
    first = open_source(tmp_path, use="parquet", path="p/*.parquet")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "parquet").iterdir()}
    again = open_source(tmp_path, use="parquet", path="p/*.parquet")
    assert [answer(first, row) for row in (72, 64, 0)] == ["number 72", "number 64", "number 0"]
    assert len(written) == 2
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert again.fingerprint() == first.fingerprint()


def test_parquet_is_read_from_an_address(tmp_path):
    write_parquet(tmp_path / "p", [3])
    source = open_source(tmp_path, use="parquet", path=f"file://{tmp_path}/p/*.parquet")
    assert answer(source, 2) == "number 2"


def test_a_saved_data_set_keeps_its_order_and_its_splits_are_told_apart(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset(table(0, 12))
    made.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    source = open_source(tmp_path, use="arrow", path="saved")
    assert [answer(source, row) for row in range(12)] == [f"number {n}" for n in range(12)]
    assert source.sample(3).messages[0].images == [png(3)]
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="path: splits/train"):
        open_source(tmp_path, use="arrow", path="splits")


def test_rows_of_tables_may_have_any_shape(tmp_path):
    pair = {"user": "Which?", "assistant": "that one"}
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "this one"}]
    rows = {
        "images": [[{"bytes": png(), "path": None}] * 2, [{"bytes": None, "path": "a.png"}], None],
        "texts": [[pair, pair], None, None],
        "conversations": [None, turns, None],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = open_source(tmp_path, use="parquet", path="a.parquet")
    size = f"[{len(png())} bytes]"
    turn = ("assistant", "that one")
    assert content(source.sample(0)) == [
        ("user", size, size, "Which?"), turn, ("user", "Which?"), turn,
    ]  # fmt: skip
    assert content(source.sample(1))[0] == ("user", "[a.png]", "Which?")
    assert answer(source, 2) == "unknown_shape"


@pytest.mark.parametrize("value", [b"bytes", True, [["a"]], {"a": 1}])
def test_an_answer_that_is_no_text_is_refused(tmp_path, value):
    pq.write_table(pa.table({"question": ["a"], "answer": [value]}), tmp_path / "a.parquet")
    assert answer(open_source(tmp_path, use="parquet", path="a.parquet"), 0) == "wrong_type"


@pytest.mark.parametrize("use", ["parquet", "arrow"])
def test_a_table_that_was_cut_short_is_named(tmp_path, use):
    path = tmp_path / f"a.{use}"
    if use == "parquet":
        pq.write_table(table(0, 9), path)
    else:
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table(0, 9).schema) as to:
            to.write_table(table(0, 9), max_chunksize=2)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(DataError, match=rf"a\.{use} .*cut short"):
        open_source(tmp_path, use=use, path=path.name)


def test_ids_are_unique_where_that_is_asked_for(tmp_path):
    rows = [{"id": n % 3, "question": "a", "answer": f"number {n}"} for n in range(5)]
    write_lines(tmp_path / "a.jsonl", [*rows, {"question": "a", "answer": "no id"}, "{", "{"])
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = ["number 0", "number 1", "number 2", "duplicate_id", "duplicate_id"]
    for name in ("a.jsonl", "a.json", "a.parquet"):
        use = name.partition(".")[2]
        source = open_source(tmp_path, use=use, path=name, unique_ids=True)
        assert [answer(source, row) for row in range(5)] == expected
        assert answer(open_source(tmp_path, use=use, path=name), 4) == "number 4"
    lines = open_source(tmp_path, use="jsonl", path="a.jsonl", unique_ids=True)
    assert [answer(lines, row) for row in (5, 6, 7)] == ["no id", "not_json", "not_json"]


def write_folder(folder):
    (folder / "b").mkdir(parents=True)
    for name, text in {"a.png": "first", "b/c.JPG": "  second\n", "b/d.webp": None}.items():
        (folder / name).write_bytes(png())
        if text is not None:
            (folder / name).with_suffix(".txt").write_text(text)
    (folder / "e.png").write_bytes(png())
    (folder / "e.txt").write_bytes(b"\xff\xfe")
    (folder / "f.png").write_bytes(png())
    (folder / "f.txt").write_text(" ")
    (folder / ".hidden.png").write_bytes(png())
    return folder


def test_a_picture_has_its_caption_beside_it(tmp_path):
    write_folder(tmp_path / "photos")
    source = open_source(tmp_path, use="folder", path="photos", question="Describe it.")
    assert [answer(source, row) for row in range(len(source))] == [
        "first", "second", "no_caption", "bad_unicode", "no_answer",
    ]  # fmt: skip
    sample = source.sample(1)
    assert (sample.id, sample.source) == ("b/c.JPG", "photos")
    assert content(sample)[0] == ("user", "[c.JPG]", "Describe it.")
    before = source.fingerprint()
    (tmp_path / "photos" / "a.txt").write_text("changed")
    assert source.fingerprint() != before


def test_a_metadata_file_is_read_as_image_folders_are(tmp_path):
    for use, text in {
        "jsonl": json.dumps({"file_name": "a.png", "text": "first"}),
        "csv": "file_name,text\na.png,first\n",
    }.items():
        folder = tmp_path / use
        folder.mkdir()
        (folder / "a.png").write_bytes(png())
        (folder / f"metadata.{use}").write_text(text)
        source = open_source(tmp_path, use="folder", path=use)
        assert content(source.sample(0)) == [("user", "[a.png]"), ("assistant", "first")]
        assert source.name == use


def test_a_metadata_file_may_hold_conversations(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "b"}]
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "conversations": turns}])
    source = open_source(tmp_path.parent, use="folder", path=tmp_path.name)
    assert content(source.sample(0))[0] == ("user", "[a.png]", "What?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"use": "folder", "path": "nowhere"}, "no folder"),
        ({"use": "folder", "path": "."}, "holds no picture"),
        ({"use": "folder", "path": "s3://bucket/a"}, "an address"),
        ({"use": "jsonl", "path": "s3://bucket/a.jsonl"}, "an address"),
        ({"use": "jsonl", "path": "."}, "use: folder"),
        ({"use": "parquet", "path": "."}, "names no file"),
        ({"use": "parquet", "path": "strange://a.parquet"}, "strange"),
        ({"use": "webdataset", "path": "a.tar.gz"}, "names no file"),
    ],
)
def test_a_source_that_leads_nowhere_says_what_to_do(tmp_path, words, message):
    (tmp_path / "note.md").write_text("x")
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, **words)
