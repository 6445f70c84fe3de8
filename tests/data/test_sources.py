"""Rows of every shape become samples; wrong ones are refused under their own cause."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlm.data import BadRowError, sources, sources_rows
from mmlm.data.sources_files import parse_line
from mmlm.data.sources_index import index_json, index_lines
from mmlm.errors import DataError
from mmlm.messages import ImagePart, Text


def open_rows(folder, rows, use="jsonl", **settings):
    path = folder / f"rows.{use}"
    if use == "jsonl":
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    elif use == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text(rows)
    return sources.read({"use": use, "path": path.name, **settings}, origin="data").open(folder)


def content(sample):
    """The turns as short tuples; images as their path behind the folder."""
    return [
        (
            m.role,
            *(p.text if isinstance(p, Text) else f"[{p.image.split('/')[-1]}]" for p in m.content),
        )
        for m in sample.messages
    ]


def test_a_table_row_is_one_question_and_one_answer(tmp_path):
    source = open_rows(tmp_path, [{"image": "a.png", "question": "What?", "answer": "A cat."}])
    sample = source.sample(0)
    assert content(sample) == [("user", "[a.png]", "What?"), ("assistant", "A cat.")]
    assert sample.messages[0].images == [str(tmp_path / "a.png")]


def test_a_llava_row_keeps_its_image_where_the_text_says(tmp_path):
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And\n<image>"},
        {"from": "gpt", "value": "A dog."},
    ]
    source = open_rows(tmp_path, [{"id": 7, "image": ["a.png", "b.png"], "conversations": turns}])
    assert source.sample(0).id == "7"
    assert content(source.sample(0)) == [
        ("user", "[a.png]", "What?"),
        ("assistant", "A cat."),
        ("user", "And\n", "[b.png]"),
        ("assistant", "A dog."),
    ]


def test_a_llava_row_whose_text_names_no_image_shows_it_first(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    source = open_rows(tmp_path, [{"image": "a.png", "conversations": turns}])
    assert content(source.sample(0))[0] == ("user", "[a.png]", "What?")


def test_openai_rows_take_images_inside_and_beside_the_messages(tmp_path):
    inside = {"type": "image", "image": "a.png"}
    beside = {"type": "image"}
    ask = {"type": "text", "text": "What?"}
    answer = {"role": "assistant", "content": "A cat."}
    source = open_rows(
        tmp_path,
        [
            {"messages": [{"role": "user", "content": [inside, ask]}, answer]},
            {"messages": [{"role": "user", "content": [ask, beside]}, answer], "images": ["b.png"]},
            {
                "messages": [{"role": "user", "content": "<image>What?"}, answer],
                "images": ["c.png"],
            },
        ],
    )
    firsts = [content(source.sample(row))[0] for row in range(3)]
    assert firsts == [
        ("user", "[a.png]", "What?"),
        ("user", "What?", "[b.png]"),
        ("user", "[c.png]", "What?"),
    ]


def test_a_json_array_gives_the_same_samples_as_json_lines(tmp_path):
    rows = [{"question": f'tricky ], }} "{{" {i}', "answer": "\\"} for i in range(5)]
    array, lines = open_rows(tmp_path, rows, "json"), open_rows(tmp_path, rows)
    assert len(array) == len(lines) == 5
    assert [content(array.sample(i)) for i in range(5)] == [
        content(lines.sample(i)) for i in range(5)
    ]


def test_csv_cells_may_hold_commas_quotes_and_line_breaks(tmp_path):
    text = '\ufefffile,report\r\na.png,"two\nlines, ""quoted"""\r\nb.png,ünicode\r\n'
    source = open_rows(
        tmp_path,
        text,
        "csv",
        columns={"image": "file", "answer": "report"},
        question="Describe the picture.",
    )
    assert [content(source.sample(i))[1] for i in range(len(source))] == [
        ("assistant", 'two\nlines, "quoted"'),
        ("assistant", "ünicode"),
    ]
    assert content(source.sample(0))[0] == ("user", "[a.png]", "Describe the picture.")


def test_text_of_a_table_row_is_plain_text(tmp_path):
    row = {"question": "What does <image> mean?", "answer": "A <image> tag."}
    sample = open_rows(tmp_path, [row]).sample(0)
    assert not any(isinstance(p, ImagePart) for m in sample.messages for p in m.content)


BAD_ROWS = {
    "not json": ("{", "not_json"),
    "not utf-8": ('{"answer": "\\ud800"', "not_json"),
    "a number": (3, "not_a_row"),
    "no known key": ({"text": "x"}, "unknown_shape"),
    "empty answer": ({"question": "a", "answer": ""}, "no_answer"),
    "missing answer": ({"question": "a", "answer": None}, "no_answer"),
    "blank answer": ({"question": "a", "answer": "  "}, "no_answer"),
    "a list as answer": ({"question": "a", "answer": ["b"]}, "wrong_type"),
    "nothing asked": ({"question": "", "answer": "b"}, "no_question"),
    "an image that is a number": ({"image": 3, "question": "a", "answer": "b"}, "wrong_type"),
    "a url": ({"image": "https://x.org/a.png", "question": "a", "answer": "b"}, "url"),
    "a broken data url": (
        {"image": "data:image/png;base64,A", "question": "a", "answer": "b"},
        "bad_image",
    ),
    "a data url of a page": (
        {"image": "data:text/html;base64,AAAA", "question": "a", "answer": "b"},
        "url",
    ),
    "half a character": ({"question": "\ud83d", "answer": "b"}, "bad_unicode"),
    "not a number": ({"question": "a", "answer": float("nan")}, "no_answer"),
    "an empty path": ({"image": [""], "question": "a", "answer": "b"}, "wrong_type"),
    "a path with a zero": ({"image": "a\0.png", "question": "a", "answer": "b"}, "no_image_file"),
    "an empty second question": (
        {"texts": [{"user": "a", "assistant": "b"}, {"user": " ", "assistant": "c"}]},
        "no_question",
    ),
    "a pair without an answer": ({"texts": [{"user": "a"}]}, "wrong_type"),
    "a place without any image": (
        {
            "conversations": [
                {"from": "human", "value": "<image>What?"},
                {"from": "gpt", "value": "b"},
            ]
        },
        "placeholders",
    ),
    "learn that is a word": (
        {"messages": [{"role": "user", "content": "a", "learn": "no"}]},
        "wrong_type",
    ),
    "ten thousand images": (
        {"image": ["a.png"] * 10_000, "question": "a", "answer": "b"},
        "too_many_images",
    ),
    "conversation of nobody": (
        {"conversations": [{"from": "ghost", "value": "boo"}]},
        "wrong_role",
    ),
    "no turns": ({"conversations": []}, "wrong_type"),
    "turn without text": ({"conversations": [{"from": "human"}]}, "wrong_type"),
    "only a question": ({"conversations": [{"from": "human", "value": "a"}]}, "no_answer"),
    "answer first": (
        {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
        "wrong_order",
    ),
    "two users": (
        {"messages": [{"role": "user", "content": "a"}] * 2},
        "wrong_order",
    ),
    "more places than images": (
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image><image>"},
                {"from": "gpt", "value": "b"},
            ],
        },
        "placeholders",
    ),
    "a role of its own": ({"messages": [{"role": "tool", "content": "a"}]}, "wrong_role"),
    "content that is a number": ({"messages": [{"role": "user", "content": 3}]}, "wrong_type"),
}


@pytest.mark.parametrize(("row", "cause"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_wrong_row_is_refused_under_its_own_cause(row, cause, tmp_path):
    with pytest.raises(BadRowError) as caught:
        open_rows(tmp_path, [row]).sample(0)
    assert caught.value.cause == cause


def test_a_csv_row_with_a_missing_cell_is_refused(tmp_path):
    source = open_rows(tmp_path, "question,answer\na\nb,c\n", "csv")
    with pytest.raises(BadRowError) as caught:
        source.sample(0)
    assert caught.value.cause == "not_a_row"
    assert content(source.sample(1))[1] == ("assistant", "c")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_sample_or_a_bad_row(data):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.jsonl").write_bytes(data)
        source = sources.read({"use": "jsonl", "path": "a.jsonl"}, origin="data").open(folder)
        for row in range(len(source)):
            with pytest.raises(BadRowError):
                source.sample(row)


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()))))
def test_the_index_of_a_json_array_finds_what_json_finds(rows):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.json"
        path.write_text(json.dumps(rows))
        found = index_json(path)
        assert [json.loads(found.read(row)) for row in range(len(found))] == rows


def test_scalars_in_a_json_array_are_rows_too(tmp_path):
    (tmp_path / "a.json").write_text('[1, "x", null, {"a": [1, 2]}, [3]]')
    found = index_json(tmp_path / "a.json")
    assert [found.read(i) for i in range(5)] == [b"1", b'"x"', b"null", b'{"a": [1, 2]}', b"[3]"]


def test_empty_lines_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\r\n\r\n \n7\n{"b": 2}')
    found = index_lines(tmp_path / "a.jsonl")
    assert [found.read(i).strip() for i in range(len(found))] == [b'{"a": 1}', b"7", b'{"b": 2}']


@pytest.mark.parametrize(
    ("use", "text", "message"),
    [
        ("json", "", "is empty"),
        ("json", '{"a": 1}', "use: jsonl"),
        ("json", '[{"a": 1}, {"b"', "cut short"),
        ("csv", "", "no header"),
        ("csv", "a,a\n1,2\n", "twice"),
        ("csv", "image,report\na.png,x\n", "columns:"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_says_why(use, text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_rows_text(tmp_path, use, text)


def open_rows_text(folder, use, text):
    (folder / "a").write_text(text)
    return sources.read({"use": use, "path": "a"}, origin="data").open(folder)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        sources.read({"use": "jsonl", "path": "nowhere.jsonl"}, origin="data").open(tmp_path)


def test_rows_that_change_change_the_fingerprint(tmp_path):
    one = open_rows(tmp_path, [{"question": "a", "answer": "b"}]).fingerprint()
    other = open_rows(tmp_path, [{"question": "a", "answer": "c"}]).fingerprint()
    assert one != other


@given(st.one_of(st.text(min_size=1), st.from_regex(r"[a-z./ #_-]+", fullmatch=True)))
def test_the_path_of_a_picture_is_joined_as_pathlib_joins_it(image):
    folder = Path("/data/set")
    try:
        located = sources_rows._located(image, folder)
    except BadRowError:
        return
    assert located == str(folder / image)


def test_a_row_may_begin_with_a_byte_order_mark_and_not_hold_another_encoding():
    assert parse_line(b'\xef\xbb\xbf{"a": "\xc3\xa9"}') == {"a": "\u00e9"}
    for raw in ('{"a": 1}'.encode("utf-16"), b'{"a": "\xe9"}', b'{"a": "\xed\xa0\x80"}'):
        with pytest.raises(BadRowError, match="not JSON"):
            parse_line(raw)
