"""One file of predictions in every dialect, and what the differences are made of."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from mmlm.errors import EvaluationError
from mmlm.evaluation import evaluate, load_benchmark
from mmlm.evaluation.reports.dialects import in_all_dialects, read_answers_of
from tests.evaluation.conftest import Parrot, write_rows

SAYS = ("Yes", "Yes, a dog", "No", "No", "Yes")
TRUE = ("yes", "yes", "no", "yes", "no")


@pytest.fixture
def pope(tmp_path):
    from PIL import Image

    rows = []
    for number, answer in enumerate(TRUE):
        Image.new("RGB", (8, 8), (number * 9, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "question": f"{number}?",
                     "answer": answer, "category": "random"})  # fmt: skip
    write_rows(tmp_path, rows)
    (tmp_path / "pope.yaml").write_text(
        "dataset: {path: rows.jsonl}\nscorer: {use: yes_no, dialect: official}\n"
    )
    return load_benchmark(tmp_path / "pope.yaml")


def answers():
    return {str(number): text for number, text in enumerate(SAYS)}


def test_the_worked_example_of_pope_in_every_dialect(pope):
    found = in_all_dialects(pope, answers())
    scores = {each.dialect: each.score for each in found.scores}
    assert scores == pytest.approx(
        {"official": 0.6, "mmlm": 0.6, "llava": 0.6, "lmms-eval": 0.4, "vlmevalkit": 0.6}
    )
    assert [each.dialect for each in found.scores if each.used] == ["official"]


def test_a_difference_is_explained_by_the_answers_that_make_it(pope):
    found = in_all_dialects(pope, answers())
    (mismatch,) = found.mismatches
    assert (mismatch.dialect, mismatch.change, mismatch.num_answers) == (
        "lmms-eval", "right → wrong", 1,
    )  # fmt: skip
    assert mismatch.effect == pytest.approx(-0.2)
    assert mismatch.examples[0]["answer"] == "Yes, a dog"
    assert mismatch.examples[0]["read_there"] is None
    console = Console(file=StringIO(), width=160, record=True)
    console.print(found.table(), found.why())
    text = console.export_text()
    assert "official *" in text
    assert '"Yes, a dog" (yes / nothing; yes)' in text


def test_a_file_of_predictions_is_enough(pope, tmp_path):
    by_prompt = {f"{number}?": text for number, text in enumerate(SAYS)}
    model = Parrot(lambda request: by_prompt[request.question])
    evaluate(model, pope, tmp_path / "out", quiet=True, with_report=False)
    read = read_answers_of(tmp_path / "out" / "predictions.jsonl", "pope")
    assert read == answers()
    with pytest.raises(EvaluationError, match="holds no answers to 'gqa'"):
        read_answers_of(tmp_path / "out" / "predictions.jsonl", "gqa")


def test_an_answer_of_ten_megabytes_in_a_file_is_refused(pope):
    with pytest.raises(EvaluationError, match="item 0, has 11,000,000 characters"):
        in_all_dialects(pope, {"0": "blah blah. " * 1_000_000})


def test_answers_to_another_benchmark_are_refused(pope):
    with pytest.raises(EvaluationError, match="belongs to an item of pope"):
        in_all_dialects(pope, {"x": "Yes"})
