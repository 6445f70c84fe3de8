from __future__ import annotations

import json

from mmlm.serving.about import read_about


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def test_about_json_speaks_first(tmp_path):
    told = {"title": "fox", "learned": "Foxes.", "limits": "No dogs.", "more": 1}
    folder = write(
        tmp_path / "m", about_json=json.dumps(told), README_md="# x\n\n## Intended use\n\nNo."
    )
    about = read_about(folder)
    assert (about.title, about.sentence) == ("fox", "Foxes. No dogs.")


def test_a_run_tells_what_its_model_tells(tmp_path):
    write(tmp_path / "run")
    write(tmp_path / "run/model", about_json='{"learned": "Foxes."}')
    about = read_about(tmp_path / "run")
    assert (about.title, about.learned) == ("run", "Foxes.")


def test_examples_stay_inside_the_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    examples = [
        {"question": "What?", "image": "a.png"},
        {"question": "Out?", "image": "../secret.png"},
        {"question": "Absolute?", "image": "/etc/hostname"},
        {"question": "Missing?", "image": "b.png"},
        {"question": "Words alone?"},
    ]
    folder = write(tmp_path / "m", about_json=json.dumps({"examples": examples}), a_png="x")
    shown = read_about(folder).examples
    assert [example.question for example in shown] == ["What?", "Words alone?"]
    assert shown[0].image == str(folder / "a.png")


def test_the_card_speaks_where_there_is_no_about_json(tmp_path):
    head = "---\nlicense: mit\n---\n# Fox\n\n"
    card = f"{head}## What it has learned to see\n\nFoxes\nand cubs.\n\nMore."
    assert read_about(write(tmp_path / "m", README_md=card)).learned == "Foxes and cubs."
    empty = "# Fox\n\n## Intended use\n\n[More Information Needed]\n"
    assert read_about(write(tmp_path / "n", README_md=empty)).learned == ""


def test_parts_are_named_from_either_kind_of_config(tmp_path):
    ours = {"sources": {"vision": {"checkpoint": "a/eye"}, "language": {"checkpoint": "b/talk"}}}
    stock = {"vision_config": {"model_type": "siglip"}, "text_config": {"_name_or_path": "c/talk"}}
    assert read_about(write(tmp_path / "m", config_json=json.dumps(ours))).parts == "a/eye + b/talk"
    assert (
        read_about(write(tmp_path / "n", config_json=json.dumps(stock))).parts == "siglip + c/talk"
    )


def test_nothing_known_is_said_honestly(tmp_path):
    for folder in (
        write(tmp_path / "m"),
        write(tmp_path / "n", about_json="{", config_json="[]"),
        "someone/some-model",
    ):
        assert "Nobody wrote down" in read_about(folder).sentence
    assert read_about("someone/some-model").title == "someone/some-model"
