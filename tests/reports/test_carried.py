"""What the picture carries is told in points with their interval, and never surer than that."""

from __future__ import annotations

import json

import pytest

from mmlm.reports import write_report
from mmlm.reports.carried import carried


def details(metric="accuracy", *, down=False, **against):
    found = {"n": 50, "difference": 0.4, "low": 0.3, "high": 0.5, "share_of_score": 0.5, **against}
    question = {"set": "bees", "question": "count", "metric": metric, "lower_is_better": down}
    return {"questions": [{**question, "against": {"blind": found, "permuted": found}}]}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "50 % of the score is gone blind (40.0 points, 30.0 to 50.0)"),
        ({"low": -0.1}, "blind, no difference is sure (40.0 points, -10.0 to 50.0)"),
        (
            {"difference": -0.4, "low": -0.5, "high": -0.3, "share_of_score": -0.5},
            "blind, it is better than with the image (-40.0 points, -50.0 to -30.0)",
        ),
        (
            {"down": True, "difference": -0.4, "low": -0.5, "high": -0.3, "share_of_score": None},
            "blind, it is worse (40.0 points, 30.0 to 50.0)",
        ),
        (
            {"metric": "MME points", "difference": 400.0, "low": 300.0, "high": 500.0},
            "50 % of the score is gone blind (400.0 points, 300.0 to 500.0)",
        ),
    ],
)
def test_a_sentence_for_each_question(given, told):
    assert carried(details(**given)) == [f"bees · count: {told}"]


def test_a_run_with_the_image_alone_says_nothing():
    assert carried({"questions": [{"set": "a", "question": "b", "against": {}}]}) == []
    assert carried({}) == []


def test_the_report_shows_it(tmp_path):
    score = {"set": "bees", "question": "count", "condition": "image", "n": 50, "score": 0.8,
             "low": 0.7, "high": 0.9, "metric": "accuracy", "chance": None,
             "parse_fail_rate": 0.0}  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps([score]))
    (tmp_path / "details.json").write_text(json.dumps(details()))
    html = write_report(tmp_path / "out", scores=tmp_path).page.read_text()
    assert "bees · count: 50 % of the score is gone blind" in html
