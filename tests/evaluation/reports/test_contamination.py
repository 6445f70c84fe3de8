"""Contamination: copies of pictures and runs of words are found, strangers are not."""

from __future__ import annotations

import pytest

from mmlm.data import Sample
from mmlm.errors import EvaluationError
from mmlm.evaluation import load_benchmark
from mmlm.evaluation.reports.contamination import contamination, contamination_table
from mmlm.messages import assistant, user
from tests.evaluation.conftest import write_rows
from tests.tiny import picture

LONG = "Which of the two people in the boat holds the longer oar"


@pytest.fixture
def benchmark(tmp_path):
    rows = []
    for number in range(4):
        # Large soft shapes, as photographs have; noise alone has no look that survives a resize.
        image = picture(number, 6, 8).resize((240, 180))
        image.save(tmp_path / f"{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "answer": "left",
                     "question": f"{LONG} {number}?" if number else "Red?"})  # fmt: skip
    write_rows(tmp_path, rows)
    (tmp_path / "boats.yaml").write_text("dataset: {path: rows.jsonl}\n")
    return load_benchmark(tmp_path / "boats.yaml")


def sample(number, text, *pictures):
    return Sample(str(number), "train", (user(text, pictures), assistant("Yes, left.")))


def test_a_smaller_copy_and_the_same_words_are_found(benchmark):
    copy = picture(1, 6, 8).resize((240, 180)).resize((120, 90))
    samples = [
        sample(0, "Something else entirely, about nothing.", picture(9, 6, 8).resize((240, 180))),
        sample(1, "What is this?", copy),
        sample(2, f"Look. {LONG.lower()} 2, please?"),
    ]
    (found,) = contamination([benchmark], samples)
    assert found.num_training_samples == 3
    assert found.num_training_pictures == 2
    assert found.by_picture == 0.25
    # The words of three questions are the same but for their numbers.
    assert found.by_text == 0.75
    assert found.by_both == 0.25
    first = found.examples[0]
    assert (first["id"], first["picture_in"], first["text_in"]) == ("1", "train/1", "train/2")
    assert contamination_table([found]).row_count == 1


def test_a_short_question_is_no_evidence(benchmark):
    (found,) = contamination([benchmark], [sample(0, "Red? left")])
    assert found.by_text == 0.0


def test_training_pictures_that_cannot_be_opened_are_counted(benchmark):
    (found,) = contamination([benchmark], [sample(0, "What?", b"no picture")])
    assert (found.num_unreadable, found.num_training_pictures) == (1, 0)


def test_no_training_data_is_an_error(benchmark):
    with pytest.raises(EvaluationError, match="not one training sample"):
        contamination([benchmark], [])
