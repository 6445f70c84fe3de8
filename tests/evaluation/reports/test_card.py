"""Scores for a model card."""

from __future__ import annotations

from datetime import date

import pytest
import yaml

from mmlm.errors import EvaluationError
from mmlm.evaluation import evaluate, load_benchmark
from mmlm.evaluation.reports.card import card_section, eval_results, read_scores, write_eval_results
from tests.evaluation.conftest import Parrot, sees


def test_scores_become_a_table_and_the_hubs_entries(colours, tmp_path):
    file = colours / "colours.yaml"
    file.write_text(file.read_text() + "hub_id: me/colours\n")
    benchmark = load_benchmark(file)
    evaluate(Parrot(sees), benchmark, tmp_path / "out", quiet=True)
    scores = read_scores(tmp_path / "out")

    section = card_section(scores)
    assert "| colours | choice | 12 | 100.0 (" in section
    files = eval_results(scores, [benchmark], on=date(2026, 1, 2))
    (path,) = write_eval_results(tmp_path / "model", files)
    first = yaml.safe_load(path.read_text())[0]
    assert first["dataset"] == {"id": "me/colours", "task_id": "name"}
    assert first["value"] == 100.0
    assert "blind 16.67" in first["notes"]


def test_a_benchmark_of_ones_own_has_no_entry_on_the_hub(colours):
    assert eval_results([], [load_benchmark(colours / "colours.yaml")]) == {}


def test_an_unfinished_evaluation_has_no_scores(tmp_path):
    with pytest.raises(EvaluationError, match="not finished"):
        read_scores(tmp_path)
