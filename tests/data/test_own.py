"""From somebody's own table or folder to splits, a recipe and a benchmark."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from mmlm.cli import run
from mmlm.data.base import sources
from mmlm.data.own import Words, survey_own
from mmlm.data.own_files import model_words, write_own
from mmlm.errors import DataError
from mmlm.evaluation.benchmarks.benchmark import load_benchmark
from mmlm.training.recipe import read_recipe
from tests.data.test_alike import scene
from tests.tiny import picture

REPORTS = ("No finding.", "A small shadow on the left.", "Clear lungs, heart of normal size.")


def write_table(folder, count=30):
    """A CSV of thirty pictures of ten patients; row 28 is a smaller copy of row 3's picture."""
    rows = []
    for number in range(count):
        image = scene(number, 64) if number != 28 else scene(3, 64).resize((112, 112))
        image.save(folder / f"{number}.png")
        rows.append({"path": f"{number}.png", "report": REPORTS[number % 3],
                     "patient_id": f"p{number // 3}"})  # fmt: skip
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:900])
    rows.append({"path": "cut.png", "report": "a", "patient_id": "p0"})
    rows.append({"path": "lost.png", "report": "a", "patient_id": "p0"})
    rows.append({"path": "2.png", "report": "", "patient_id": "p0"})
    with (folder / "my.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "my.csv"


def splits_of(out):
    return {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    table = write_table(folder)
    words = ["data", "new", str(table), "--image", "path", "--answer", "report", "--group",
             "patient_id", "--out", str(folder / "made")]  # fmt: skip
    assert run(words) == 0
    return folder / "made"


def test_what_was_found_is_said(made):
    facts = json.loads((made / "found.json").read_text())
    assert (facts["rows"], facts["usable"]) == (33, 30)
    assert facts["left_out"] == {"bad_image": 1, "no_image_file": 1, "no_answer": 1}
    assert facts["formats"] == {"PNG RGB": 30}
    assert facts["width_px"] == [64, 64, 112]
    assert facts["answer_words"] == [2, 6, 6]
    assert facts["groups"] == 10
    assert facts["near_duplicates"] == 1
    left_out = [json.loads(line) for line in (made / "left_out.jsonl").read_text().splitlines()]
    assert [drop["row"] for drop in left_out] == [30, 31, 32]


def test_the_splits_share_no_group_and_no_picture_that_looks_alike(made):
    splits = splits_of(made)
    assert sum(map(len, splits.values())) == 30
    assert all(splits.values())
    homes = {}
    for name, rows in splits.items():
        for row in rows:
            homes.setdefault(row["group"], set()).add(name)
    assert all(len(names) == 1 for names in homes.values())
    # Pictures 3 and 28 look alike, so their patients go together.
    assert homes["p1"] == homes["p9"]


def test_every_picture_is_found_from_the_new_folder(made):
    for rows in splits_of(made).values():
        for row in rows:
            assert (made / row["image"]).is_file()
            assert row["question"] == "Describe the picture."


def test_recipe_and_benchmark_are_read_as_they_are(made):
    recipe, folder, _ = read_recipe(made / "recipe.yaml")
    assert recipe.model == model_words("own_data")
    assert folder == made
    benchmark = load_benchmark(made / "benchmark.yaml")
    assert len(benchmark.items) == len(splits_of(made)["test"])
    assert benchmark.config.scorer == "anls"


def test_the_same_again_is_the_same_and_never_written_over(made, capsys):
    table = made.parent / "my.csv"
    words = ["data", "new", str(table), "--image", "path", "--answer", "report", "--group",
             "patient_id", "--out", str(made)]  # fmt: skip
    before = splits_of(made)
    assert run(words) == 1
    assert "is there already" in capsys.readouterr().err
    assert run([*words, "--fresh"]) == 0
    assert splits_of(made) == before
    (made.parent / "mine").mkdir()
    (made.parent / "mine/letter.txt").write_text("dear")
    assert run([*words[:-1], str(made.parent / "mine"), "--fresh"]) == 1
    assert (made.parent / "mine/letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("answers", "scorer"),
    [(["yes", "no"], "yes_no"), (["a red fox", "an owl"], "exact"),
     (["a long answer of many words", "b"], "anls")],
)  # fmt: skip
def test_the_benchmark_marks_as_the_answers_are(answers, scorer, tmp_path):
    rows = []
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
        row = {"image": f"{number}.png", "question": "What?", "answer": answers[number % 2]}
        rows.append(json.dumps(row))
    (tmp_path / "my.jsonl").write_text("\n".join(rows))
    found = survey_own(tmp_path / "my.jsonl", Words())
    write_own(found, tmp_path / "made", model=model_words("own_data"))
    assert load_benchmark(tmp_path / "made/benchmark.yaml").config.scorer == scorer


@pytest.mark.skipif("folder" not in sources, reason="no source reads folders with captions")
def test_a_folder_with_captions_is_a_table_too(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        picture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"Picture {number}.")
    found = survey_own(folder, Words(ask="What is it?"))
    assert [(row.question, row.answer) for row in found.rows] == [
        ("What is it?", f"Picture {n}.") for n in range(5)
    ]
    write_own(found, tmp_path / "made", model=model_words("own_data"))
    assert sum(map(len, splits_of(tmp_path / "made").values())) == 5


def test_deep_grey_and_medicine_are_named_by_their_format(tmp_path):
    pytest.importorskip("pydicom")
    from tests.images.test_readers import CT, dicom

    Image.fromarray(np.full((4, 4), 900, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "scan").write_bytes(dicom(CT))
    rows = [json.dumps({"image": name, "answer": "a"}) for name in ("deep.png", "scan")]
    (tmp_path / "my.jsonl").write_text("\n".join(rows))
    formats = {p.format for p in survey_own(tmp_path / "my.jsonl", Words()).pictures.values()}
    assert formats == {"PNG I;16", "dicom"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (Words(image="picture"), "names no picture"),
        (Words(answer="text"), "no column 'text'"),
        (Words(group="ward"), "'ward', which --group names"),
        (Words(question="asked"), "write --ask 'asked'"),
    ],
    ids=["image", "answer", "group", "question"],
)
def test_a_column_that_is_nowhere_is_an_error(words, told, tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "my.csv").write_text("image,answer\na.png,b\n")
    with pytest.raises(DataError, match=told):
        survey_own(tmp_path / "my.csv", words)


def test_too_few_groups_are_an_error_that_says_what_to_do(tmp_path):
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,b,ann" for number in range(6)]
    (tmp_path / "my.csv").write_text("\n".join(["image,answer,who", *lines]))
    found = survey_own(tmp_path / "my.csv", Words(group="who"))
    with pytest.raises(DataError, match="fall into 1 groups"):
        write_own(found, tmp_path / "made", model=model_words("own_data"))


def test_words_of_one_action_are_refused_by_the_other(capsys):
    assert run(["data", "build", "quickstart", "--group", "a"]) == 2
    assert "--group; it belongs to mmlm data new" in capsys.readouterr().err
    assert run(["data", "new"]) == 2


def test_conversations_of_several_turns_are_kept_and_asked_one_by_one_in_the_test(tmp_path, capsys):
    rows = []
    for number in range(24):
        scene(number, 64).save(tmp_path / f"{number}.png")
        turns = [("What is it?", f"thing {number}"), ("What colour?", "red"), ("Sure?", "yes")]
        asked = turns[: 1 + number % 3]
        said = [{"from": who, "value": text} for pair in asked
                for who, text in zip(("human", "gpt"), pair, strict=True)]  # fmt: skip
        rows.append({"image": f"{number}.png", "conversations": said})
    between = [*rows[2]["conversations"][:2], {"from": "human", "value": "<image>\nAnd this?"},
               {"from": "gpt", "value": "no"}]  # fmt: skip
    rows.append({"image": "3.png", "conversations": between})
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(["data", "new", str(tmp_path / "my.jsonl"), "--out", str(tmp_path / "made")]) == 0
    said = capsys.readouterr().out
    assert "1 to 3 a row" in said
    assert "unknown_shape" in said
    splits = splits_of(tmp_path / "made")
    turns = {row["id"]: len(row.get("conversations", [1, 2])) // 2 for row in splits["train"]}
    assert turns == {name: 1 + int(name) % 3 for name in turns}
    assert all("conversations" not in row for row in splits["test"])
    assert any(row["question"] == "What colour?" for row in splits["test"])
    words = {"use": "jsonl", "path": "train.jsonl"}
    source = sources.read(words, origin="data").open(tmp_path / "made")
    lengths = {len(source.sample(row).messages) for row in range(len(source))}
    assert lengths <= {2, 4, 6}
    assert max(lengths) > 2
    assert load_benchmark(tmp_path / "made" / "benchmark.yaml")
