"""The quickstart's command, from pictures to report, with tiny parts in place of the real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmlm.cli import run
from mmlm.cli.main import find_command
from mmlm.cli.quickstart import _overrides
from mmlm.data.builders import base
from mmlm.serving.about import read_about
from tests.tiny import picture, save_language, save_vision

RECIPE = """\
# A tiny quickstart.
model:
  vision:    {{use: hf, checkpoint: {eye}, layer: -2}}
  connector: {{use: mlp}}
  language:  {{use: causal_lm, checkpoint: {words}}}
stages:
  - {{name: align, learn: [connector.*], data: {{use: build, name: quickstart, rows: align}},
      until: {{epochs: 1}}, step_tokens: 512}}
run: {{seed: 0, precision: fp32, ask: {{every_steps: 1, num: 2, max_new_tokens: 2}}}}
"""
BENCHMARK = """\
# Tiny questions.
dataset: {build: quickstart, rows: held_out}
scorer: choice
generate: {max_new_tokens: 2}
"""


def _make(folder: Path, say: base.Say) -> dict[str, object]:
    say("drawing")
    for name in ("align", "held_out"):
        rows = []
        for number in range(6):
            picture(number).save(folder / f"{name}{number}.png")
            rows.append(
                {
                    "id": str(number),
                    "image": f"{name}{number}.png",
                    "question": "Which one?",
                    "answer": "abcdef"[number],
                    "thing": "abcdef"[number],
                    "choices": list("abcdef"),
                }
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {"things": 6, "unseen_things": ["f"], "seen_groups": ["noise"], "photo_names": ["fog"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recipes and benchmarks, and the parts that they name."""
    folder = tmp_path_factory.mktemp("quick")
    eye = save_vision(folder / "eye", "clip")
    words = save_language(folder / "words", "llama")
    (folder / "train").mkdir()
    (folder / "eval").mkdir()
    text = RECIPE.format(eye=eye, words=words)
    (folder / "train" / "quickstart.yaml").write_text(text, encoding="utf-8")
    (folder / "eval" / "quickstart_tiny.yaml").write_text(BENCHMARK, encoding="utf-8")
    return folder


@pytest.fixture
def quickstart(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the quickstart's names mean the tiny files; return a folder for runs."""
    monkeypatch.setattr("mmlm.recipes.recipe_folder", lambda kind: place / kind)
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))
    tiny = base.Builder(about="Noise.", key=lambda: "tiny", make=_make)
    monkeypatch.setitem(base.BUILDERS, "quickstart", lambda: tiny)
    return tmp_path


def test_the_quickstart_goes_from_pictures_to_a_report(quickstart, capsys):
    out = quickstart / "run"
    assert run(["quickstart", "--out", str(out), "--no-chat"]) == 0
    told = capsys.readouterr().out
    for words in ("1 of 4  pictures", "2 of 4  training", "3 of 4  measuring", "shuffled"):
        assert words in told
    assert f"mmlm chat {out}" in told
    results = json.loads((out / "eval" / "results.json").read_text())
    conditions = [row["condition"] for row in results]
    assert conditions == ["image", "blind", "shuffled", "nearest_neighbour"]
    assert all(row["low"] <= row["score"] <= row["high"] for row in results)
    for name in ("report.html", "contact_sheet.png", "model/recipe.resolved.yaml"):
        assert (out / name).is_file()
    assert (out / "delta" / "recipe.resolved.yaml").is_file()
    assert json.loads((out / "model" / "config.json").read_text())["model_type"] == "llava"

    about = read_about(out)
    assert "drawings of 5 everyday things (noise)" in about.learned
    assert all(Path(example.image or "").is_file() for example in about.examples)
    card = (out / "model" / "README.md").read_text()
    assert "drawings of 5 everyday things" in card
    assert "shuffled" in card

    # The same command again: everything is found, nothing is done twice.
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")}
    assert run(["quickstart", "--out", str(out), "--no-chat"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")} == before
    assert json.loads((out / "eval" / "results.json").read_text()) == results

    # Another seed is another run.
    assert run(["quickstart", "--out", str(out), "--no-chat", "--seed", "1"]) == 1
    assert "run.seed: 0 -> 1" in capsys.readouterr().err


def test_flags_become_lines_of_the_recipe():
    read = find_command("quickstart").read
    words = ["--encoder", "google/siglip2-base-patch16-256", "--llm", "me/llm", "--seed", "3"]
    assert _overrides(read(words)) == {
        "model.vision": {"use": "hf", "checkpoint": "google/siglip2-base-patch16-256"},
        "model.language": {"use": "causal_lm", "checkpoint": "me/llm"},
        "run.seed": 3,
    }
    timm = _overrides(read(["--encoder", "timm/vit_tiny_patch16_224"]))
    assert timm["model.vision"] == {"use": "timm", "checkpoint": "vit_tiny_patch16_224"}
    assert _overrides(read([])) == {}


def test_nothing_of_the_run_points_outside_of_it(quickstart):
    out = quickstart / "run"
    assert run(["quickstart", "--out", str(out), "--no-chat"]) == 0
    about = json.loads((out / "model" / "about.json").read_text())
    assert not any(os.path.isabs(example["image"]) for example in about["examples"])
