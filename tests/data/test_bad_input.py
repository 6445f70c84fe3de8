"""Whatever is wrong with a row or a picture is counted under its own name; nothing else happens."""

import io
import json
import random
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmlm.data import (
    CAUSES,
    BadRowError,
    Drop,
    Mixture,
    PackingConfig,
    Quarantine,
    Sample,
    Share,
    open_mixture,
)
from mmlm.data.pipeline import StepStream
from mmlm.data.planning import Planner
from mmlm.data.sources_rows import RowReader
from mmlm.errors import DataError
from tests.data.made import open_source, png, write_lines, write_tar, write_tars
from tests.tiny import compose_tiny, picture


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    eye = {"use": "patches", "patch_px": 8, "side_px": 16}
    return compose_tiny(tmp_path_factory.mktemp("model"), vision="patches", eye=eye).processor


def stream(mixture, processor, **words):
    packing = PackingConfig(row_tokens=512, pool_samples=4)
    planner = Planner(mixture, processor, max_tokens=512, max_tiles=64)
    words = {"rows_per_step": 2, "num_samples": mixture.epoch_rows, **words}
    pixels = processor.image_processor.pixels
    return StepStream(planner, packing, pixels=lambda image: ("", pixels(image)), **words)


def read_all(mixture, processor):
    """Go through one epoch; return the names of the samples used, and the drops."""
    used, drops = [], []
    for step in stream(mixture, processor):
        used += [s.id for row in step.rows for s in row.samples]
        drops += step.drops
    return used, drops


def huge_png(width, height):
    """A header that promises more pixels than anybody has memory for, in a few bytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_every_way_in_which_a_row_can_be_wrong_has_its_own_name(tmp_path, processor):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "huge.png").write_bytes(huge_png(30_000, 30_000))
    (tmp_path / "large.png").write_bytes(huge_png(10_000, 10_000))
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.png").write_text("<html>not found</html>")
    (tmp_path / "cut.png").write_bytes(png(side=64)[:60])
    (tmp_path / "folder.png").mkdir()
    with (tmp_path / "endless.png").open("wb") as file:
        file.write(png())
        file.truncate((2 << 30) + 1)  # takes no room on disk
    ask = {"question": "What?", "answer": "A."}
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]
    rows = {
        "good": {**ask, "image": "good.png"},
        "no_image_file": {**ask, "image": "missing.png"},
        "image_too_large": {**ask, "image": "huge.png"},
        "image_too_large too": {**ask, "image": "large.png"},
        "image_too_large file": {**ask, "image": "endless.png"},
        "bad_image": {**ask, "image": "empty.png"},
        "bad_image page": {**ask, "image": "page.png"},
        "bad_image cut": {**ask, "image": "cut.png"},
        "bad_image folder": {**ask, "image": "folder.png"},
        "bad_image long": {**ask, "image": "x" * 5000},
        "url": {**ask, "image": "http://127.0.0.1/a.png"},
        "url file": {**ask, "image": "file:///etc/a.png"},
        "wrong_type": {**ask, "image": 3},
        "wrong_type answer": {**ask, "answer": {"a": 1}},
        "too_many_images": {**ask, "image": ["good.png"] * 10_000},
        "no_answer": {**ask, "answer": ""},
        "no_question": {"answer": "A."},
        "bad_unicode": {**ask, "question": "half \ud83d"},
        "wrong_role": {"conversations": [{"from": "ghost", "value": "boo"}]},
        "wrong_order": {"conversations": turns[::-1]},
        "placeholders": {"conversations": [{"from": "human", "value": "<image>"}, turns[1]]},
        "unknown_shape": {"caption": "A."},
        "not_a_row": [1],
        "not_json": "{",
        "too_long": {**ask, "answer": "long " * 400},
        "duplicate_id": {**ask, "id": "good"},
        "no_answer learnt": {"messages": [{"role": "user", "content": "a"},
                                   {"role": "assistant", "content": "b", "learn": False},
                                   {"role": "user", "content": "c"}]},
    }  # fmt: skip
    lines = [{"id": name, **row} if isinstance(row, dict) else row for name, row in rows.items()]
    write_lines(tmp_path / "a.jsonl", lines)
    source = open_source(tmp_path, use="jsonl", path="a.jsonl", unique_ids=True)
    planner = Planner(Mixture([(source, Share())], shuffle=False), processor,
                      max_tokens=512, max_tiles=64)  # fmt: skip
    found = [planner.plan(position) for position in range(len(source))]
    causes = [one.cause if isinstance(one, Drop) else "good" for one in found]
    expected = [name.split()[0] for name in rows]
    # What only decoding can tell is told when the row is opened, below.
    expected[list(rows).index("bad_image cut")] = "good"
    assert dict(zip(rows, causes, strict=True)) == dict(zip(rows, expected, strict=True))
    used, drops = read_all(Mixture([(source, Share())]), processor)
    assert used == ["good"]
    assert len(drops) == len(rows) - 1


FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")


def mutated(data, draw):
    """Change the bytes of a file as disks, networks and careless programs do."""
    data = bytearray(data)
    kind = draw.randrange(6)
    place = draw.randrange(len(data))
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data[place : place + 40] = b""
    elif kind == 2:
        data[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 60)))
    elif kind == 3:
        data[place : place + 60] = bytes(len(data[place : place + 60]))
    else:
        for _ in range(draw.randrange(1, 12)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def test_a_thousand_mutated_pictures_and_rows_never_stop_the_run(tmp_path, processor):
    draw = random.Random(7)
    originals = []
    for number, name in enumerate(FORMATS):
        made = io.BytesIO()
        picture(number, 24, 20).convert("P" if name == "GIF" else "RGB").save(made, name)
        originals.append(made.getvalue())
    lines = []
    for number in range(1000):
        name = f"{number}.img"
        (tmp_path / name).write_bytes(mutated(draw.choice(originals), draw))
        line = json.dumps({"image": name, "question": "Wås ist dås?", "answer": f"Das {number}."},
                          ensure_ascii=False).encode()  # fmt: skip
        if number % 4 == 0:
            line = mutated(line, draw).replace(b"\n", b"")
        lines.append(line or b"{")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    mixture = open_mixture("a.jsonl", folder=tmp_path)
    used, drops = read_all(mixture, processor)
    counts = Counter(drop.cause for drop in drops)
    assert len(used) + len(drops) == mixture.epoch_rows
    assert len(used) > 100, counts
    assert counts["bad_image"] > 100, counts
    assert counts["not_json"] > 20, counts
    assert set(counts) <= set(CAUSES)
    assert [d.row for d in drops if not d.detail] == []


def test_a_picture_that_breaks_in_a_shard_is_counted_once_in_the_quarantine(tmp_path, processor):
    files = {f"{n}.png": (png(n) if n % 3 else png(n, side=64)[:70]) for n in range(9)}
    files = {k: v for n, v in files.items() for k, v in ((n, v), (n.replace("png", "txt"), "A."))}
    write_tar(tmp_path / "a.tar", files)
    mixture = open_mixture("a.tar", folder=tmp_path)
    used, drops = read_all(mixture, processor)
    assert sorted(used) == sorted(str(n) for n in range(9) if n % 3)
    quarantine = Quarantine(tmp_path / "q.jsonl")
    quarantine.record(drops, seen=9)
    assert [c for (_, c) in quarantine.counts] == ["bad_image"]
    assert "(in " not in drops[0].detail
    with pytest.raises(DataError, match="drop_budget"):
        Quarantine(None, budget=0.1, floor=1).record(drops, seen=9)


def rows_of(step):
    return [
        [(s.id, s.ids.tolist()) for s in row.samples]
        + [None if tiles is None else float(tiles.sum()) for _, tiles in row.images]
        for row in step.rows
    ]


@pytest.mark.parametrize("kind", ["stream", "mixed"])
def test_steps_of_a_stream_go_on_exactly_from_a_checkpoint(tmp_path, processor, kind):
    write_tars(tmp_path / "tars", [9, 14, 3, 11])
    (tmp_path / "tars" / "001.tar").write_bytes((tmp_path / "tars" / "001.tar").read_bytes()[:9000])
    write_lines(tmp_path / "a.jsonl", [{"question": "a", "answer": str(n)} for n in range(20)])
    words = [{"use": "webdataset", "path": "tars", "window": 4, "shards_at_once": 2}]
    words += ["a.jsonl"] if kind == "mixed" else []
    packing = {"num_samples": 70, "rows_per_step": 1}

    def steps(state=None):
        return stream(
            open_mixture(words, folder=tmp_path, seed=4), processor, state=state, **packing
        )

    whole = list(steps())
    drops = [drop for step in whole for drop in step.drops]
    assert {drop.cause for drop in drops} == {"cut_shard"}
    assert len(whole) > 3
    for cut in range(len(whole) - 1):
        state = json.loads(json.dumps(whole[cut].state))
        rest = list(steps(state))
        assert [rows_of(s) for s in rest] == [rows_of(s) for s in whole[cut + 1 :]]
        assert [s.state for s in rest] == [s.state for s in whole[cut + 1 :]]
        assert [s.drops for s in rest] == [s.drops for s in whole[cut + 1 :]]


KEYS = st.sampled_from([
    "id", "image", "images", "question", "answer", "conversations", "messages", "texts", "system",
    "from", "value", "role", "content", "type", "text", "user", "assistant", "learn", "path",
    "bytes", "url", "image_url",
])  # fmt: skip
WORDS = st.sampled_from([
    "human", "gpt", "user", "assistant", "system", "image", "text", "image_url", "<image>",
    "a.png", "https://x.org/a.png", "data:image/png;base64,AAAA", "",
])  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS
    | st.text(st.characters(codec=None), max_size=20) | st.binary(max_size=8)
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES | st.dictionaries(KEYS | st.text(max_size=5), VALUES, max_size=6))
def test_any_values_are_a_sample_or_a_bad_row(tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp()
    read = sample_or_error(values, folder)
    if isinstance(read, BadRowError):
        assert read.cause in CAUSES
        assert len(read.detail) < 2000
    else:
        assert isinstance(read, Sample)
        assert all(isinstance(i, str | bytes) for m in read.messages for i in m.images)
        "".join(m.text for m in read.messages).encode()


def sample_or_error(values, folder):
    try:
        return RowReader().read(values, number=3, source="any", folder=folder)
    except BadRowError as error:
        return error


def test_values_of_any_depth_and_size_are_refused_in_few_words():
    deep = "x"
    for _ in range(900):
        deep = [deep]
    for value in (deep, "a" * 10**6, [0] * 10**6, b"a" * 10**6):
        read = sample_or_error({"image": {"bytes": value}, "answer": [value]}, None)
        assert isinstance(read, BadRowError)
        assert len(read.detail) < 300


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TEXTS, TEXTS)
@example("\u202eright to left", "👩‍👩‍👧 e\u0301 \ufeff \0 \u2028 <|im_end|>")
def test_text_in_any_script_is_learnt_as_it_stands(processor, question, answer):
    row = {"question": question, "answer": answer}
    sample = RowReader().read(row, number=0, source="any", folder=None)
    assert (sample.messages[0].text, sample.messages[1].text) == (question, answer)
    encoded = processor.chat.encode(sample.messages, image_tokens=[], with_labels=True)
    learnt = [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label >= 0]
    assert answer.strip() in processor.tokenizer.decode(learnt)


def test_a_picture_is_what_its_bytes_are_and_not_its_name(tmp_path, processor):
    made = io.BytesIO()
    Image.new("RGB", (8, 8)).save(made, "JPEG")
    (tmp_path / "a.png").write_bytes(made.getvalue())
    write_lines(tmp_path / "a.jsonl", [{"id": "x", "image": "a.png", "answer": "b"}])
    assert read_all(open_mixture("a.jsonl", folder=tmp_path), processor) == (["x"], [])


def test_every_cause_is_named_by_a_test():
    tests = Path(__file__).parents[1]
    text = "".join(path.read_text(encoding="utf-8") for path in tests.rglob("test_*.py"))
    assert [cause for cause in CAUSES if not re.search(rf"\b{cause}\b", text)] == []
