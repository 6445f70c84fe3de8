"""Two checkpoints: what is a gain, what cannot be seen, and which is the best."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mmlm.errors import EvaluationError
from mmlm.evaluation import evaluate, load_benchmark
from mmlm.evaluation.reports.comparison import (
    Change,
    compare_evaluations,
    predictions_from,
    write_comparison,
)
from tests.evaluation.conftest import Parrot, sees


def run(reply, benchmark, out):
    return evaluate(
        Parrot(reply, str(out)), benchmark, out, quiet=True, conditions=("image",),
        with_report=False,
    )  # fmt: skip


@pytest.fixture
def pair(colours, tmp_path):
    benchmark = load_benchmark(colours / "colours.yaml")
    before = run(lambda request: "red", benchmark, tmp_path / "before")
    return benchmark, before, run(sees, benchmark, tmp_path / "after")


def test_a_checkpoint_that_learnt_to_see_is_better(pair):
    benchmark, before, after = pair
    found = compare_evaluations([benchmark], before, after)
    name = next(change for change in found.changes if change.question == "name")
    assert (name.before, name.after) == (pytest.approx(2 / 12), 1.0)
    assert name.difference == pytest.approx(10 / 12)
    assert (name.num_won, name.num_lost, name.verdict) == (10, 0, "better")
    assert name.p_value < 0.01
    assert 0 < name.visible < 0.6
    backwards = compare_evaluations([benchmark], after, before).changes[0]
    assert backwards.verdict == "worse"


def test_two_equal_checkpoints_cannot_be_told_apart(pair):
    benchmark, before, _ = pair
    found = compare_evaluations([benchmark], before, before)
    assert {change.verdict for change in found.changes} == {"cannot be told apart"}
    assert {change.p_value for change in found.changes} == {1.0}
    assert found.changed == ()


def test_a_verdict_needs_interval_and_test():
    words = dict.fromkeys(("set", "question", "metric"), "x")
    numbers = dict.fromkeys(("n", "num_won", "num_lost"), 5) | dict.fromkeys(
        ("before", "after", "difference", "gain", "visible"), 0.4
    )
    sure = Change(**words, **numbers, low=0.1, high=0.7, p_value=0.01)
    assert sure.verdict == "better"
    assert replace(sure, p_value=0.065).verdict == "cannot be told apart"
    assert replace(sure, low=-0.1).verdict == "cannot be told apart"


def test_what_changed_is_shown_in_the_report(pair):
    from mmlm.evaluation.reports.report import report

    benchmark, before, after = pair
    comparison = compare_evaluations([benchmark], before, after, names=("step 100", "step 200"))
    path = write_comparison(comparison, after.out)
    assert json.loads(path.read_text())["changes"][0]["verdict"] == "better"
    page = report(after).page.read_text(encoding="utf-8")
    assert "step 100" in page
    assert "10 won" in page


def test_answers_of_a_file_are_marked_like_those_of_a_run(pair):
    benchmark, before, after = pair
    answers = {each.case.item.id: each.answer for each in after.predictions}
    again = replace(after, predictions=tuple(predictions_from(benchmark, answers)))
    assert compare_evaluations([benchmark], before, again).changes == (
        compare_evaluations([benchmark], before, after).changes
    )


def test_evaluations_that_share_no_item_are_refused(pair):
    benchmark, before, after = pair
    with pytest.raises(EvaluationError, match="share no item"):
        compare_evaluations([benchmark], replace(before, predictions=()), after)
