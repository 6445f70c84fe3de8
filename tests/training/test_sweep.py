"""A sweep trains all combinations on the same tokens, goes on, and says what failed."""

import json

import pytest
import yaml

from mmlm.cli import run as mmlm
from mmlm.errors import ConfigError
from mmlm.training.batches import Batcher
from mmlm.training.sweep import cells_of
from tests.training.tiny_run import tiny_recipe


def test_cells_are_all_combinations_with_names_of_their_own():
    grid = {"model.connector.depth": "1,2", "run.seed": "0,1", "run.threads": "1"}
    names = [cell.name for cell in cells_of(grid)]
    assert names == ["depth=1--seed=0", "depth=1--seed=1", "depth=2--seed=0", "depth=2--seed=1"]
    assert cells_of(grid)[0].values["run.threads"] == "1"
    parts = cells_of({"model.connector": "{use: mlp, depth: 1},{use: linear}"})
    assert len({cell.name for cell in parts}) == 2


@pytest.mark.parametrize("grid", [{"run.seed": "1"}, {"run.seed": "1,1"}, {"run.seed": "1,"}])
def test_a_grid_in_which_nothing_varies_is_refused(grid):
    with pytest.raises(ConfigError):
        cells_of(grid)


def test_a_sweep_compares_cells_on_the_same_tokens_and_goes_on(tmp_path, capsys, monkeypatch):
    encoded, encode = [], Batcher._encode

    def counted(self, missing, cache):
        encoded.append(len(missing))
        return encode(self, missing, cache)

    monkeypatch.setattr(Batcher, "_encode", counted)
    recipe = tiny_recipe(tmp_path)
    recipe["stages"] = recipe["stages"][:1]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    words = ["sweep", str(path), "model.connector.depth=1,2,none", "--out", str(tmp_path / "out")]
    assert mmlm(words) == 1  # the third cell is no depth
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    first, second, third = rows
    step = recipe["stages"][0]["step_tokens"]
    assert abs(first["tokens"]["align"] - second["tokens"]["align"]) <= step
    assert first["learning"] < second["learning"]
    assert "depth" in third["error"]
    assert sum(encoded) == 12  # each picture once, in the first cell
    assert "depth=2" in said
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "<svg" in page
    assert "Loss over tokens" in page
    trained = (tmp_path / "out" / "depth=1" / "result.json").stat().st_mtime_ns
    assert mmlm([*words[:2], "model.connector.depth=1,2", *words[3:]]) == 0
    assert (tmp_path / "out" / "depth=1" / "result.json").stat().st_mtime_ns == trained


def test_the_log_the_page_and_the_card_say_how_the_training_went(tmp_path):
    from mmlm.training import train

    recipe = tiny_recipe(tmp_path)
    recipe["run"]["log_to"] = ["tensorboard"]
    result = train(recipe, tmp_path / "run", quiet=True)
    rows = [json.loads(line) for line in (result.out / "log.jsonl").read_text().splitlines()]
    wanted = {"mfu", "loss_by_source", "useful_tokens_per_second", "padding", "memory_gib",
              "dropped", "seconds_left"}  # fmt: skip
    assert all(wanted <= set(row) for row in rows)
    # Every token is learnt from one source, so its loss is the loss.
    assert all(
        list(row["loss_by_source"].values()) == [pytest.approx(row["loss"], rel=1e-4)]
        for row in rows
    )
    assert all(0 < row["mfu"] < 2 and row["memory_gib"] > 0 for row in rows)
    page = (result.out / "report.html").read_text()
    assert "MFU" in page
    assert "Loss by source" in page
    card = (result.model / "README.md").read_text()
    assert "## How it was trained" in card
    assert "| align |" in card
    assert "MFU: useful operations over a matrix product that was measured here" in card
    assert list((result.out / "tensorboard").iterdir())
