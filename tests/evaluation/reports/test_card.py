"""Scores for a model card."""

from __future__ import annotations

import json
from datetime import date

import pytest
import yaml

from mmlm.errors import EvaluationError
from mmlm.evaluation import evaluate, load_benchmark
from mmlm.evaluation.reports.card import hub_rows, write_scores
from tests.evaluation.conftest import Parrot, sees


def test_scores_become_a_table_and_the_hubs_entries(colours, tmp_path):
    file = colours / "colours.yaml"
    file.write_text(file.read_text() + "hub_id: me/colours\n")
    benchmark = load_benchmark(file)
    evaluate(Parrot(sees), benchmark, tmp_path / "out", quiet=True)
    scores = json.loads((tmp_path / "out" / "results.json").read_text())

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "README.md").write_text("# Mine\n\n## Scores\n\nNone.\n\n## Opens in\n\nvLLM\n")
    for _ in range(2):  # measured again, the section is replaced
        card = write_scores(model, scores, [benchmark], on=date(2026, 1, 2)).read_text()
        assert card.count("| colours | choice | 12 | 100.0 (") == 1
        assert card.startswith("# Mine\n\n## Scores\n\n|")
        assert card.endswith("see.\n\n## Opens in\n\nvLLM\n")
    first = yaml.safe_load((model / ".eval_results" / "colours.yaml").read_text())[0]
    assert first["dataset"]["id"] == "me/colours"
    assert first["value"] == 100.0
    assert "blind 16.67" in first["notes"]


def test_a_benchmark_of_ones_own_has_no_entry_on_the_hub(colours):
    rows = [{"set": "colours", "question": "name", "condition": "image"}]
    assert hub_rows(rows, [load_benchmark(colours / "colours.yaml")]) == []


def test_scores_need_a_model_folder(tmp_path):
    with pytest.raises(EvaluationError, match=r"no config\.json"):
        write_scores(tmp_path, [], [])
