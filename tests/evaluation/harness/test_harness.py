"""Our models inside the field's harnesses, and our answers under their functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmlm.errors import EvaluationError
from mmlm.evaluation import load_benchmark
from mmlm.evaluation.harness.asking import request, settings_of
from mmlm.evaluation.harness.rescore import TASKS, rescore
from mmlm.evaluation.harness.vlmevalkit_model import Answers, request_of
from mmlm.messages import Clip
from tests.evaluation.benchmarks.test_published import PUBLISHED, write_copy
from tests.evaluation.conftest import write_rows
from tests.tiny import compose_tiny, picture

ROOT = Path(__file__).parents[3]
HAS_LMMS = find_spec("lmms_eval") is not None
needs_lmms = pytest.mark.skipif(not HAS_LMMS, reason="needs mmlm[harness]")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    compose_tiny(folder).save(folder / "model")
    return folder / "model"


def test_pictures_stand_where_the_prompt_says():
    asked = request("First <image>, then <image>.", ["a.png", "b.png"])
    (message,) = asked.messages
    assert message.images == ["a.png", "b.png"]
    assert message.text == "First , then ."
    # A wrong number of places is text, and the pictures come first.
    assert request("One <image>.", ["a.png", "b.png"]).images == ["a.png", "b.png"]
    assert request("What?", ["film.mp4"]).images == [Clip("film.mp4")]


def test_settings_of_a_harness_are_ours():
    asked = {"max_new_tokens": 16, "temperature": 0.2, "do_sample": True, "top_p": 0.9,
             "num_beams": 1, "until": "\n"}  # fmt: skip
    assert settings_of(asked) == {
        "max_new_tokens": 16, "temperature": 0.2, "top_p": 0.9, "stop": ("\n",),
    }  # fmt: skip
    assert settings_of({"temperature": 0.2, "do_sample": False})["temperature"] == 0.0


def test_vlmevalkits_list_of_parts_is_answered(saved, tmp_path):
    from mmlm.assistant import load

    path = tmp_path / "x.png"
    picture(2).save(path)
    inside = Answers(str(saved), max_new_tokens=6)
    parts = [{"type": "image", "value": str(path)}, {"type": "text", "value": "What?"}]
    wanted = load(saved).answer("What?", [path], max_new_tokens=6)
    assert inside.generate_inner(parts, dataset="MMBench") == wanted
    film = [{"type": "video", "value": "film.mp4"}, {"type": "text", "value": "What?"}]
    assert request_of(film).messages[0].images == [Clip("film.mp4")]
    with pytest.raises(ValueError, match="not 'audio'"):
        request_of([{"type": "audio", "value": "a.wav"}])


TASK = """
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {rows}}}
task: tiny_yes_no
test_split: test
output_type: generate_until
doc_to_visual: !function {name}.visual
doc_to_text: !function {name}.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false, until: []}}
process_results: !function {name}.process
metric_list:
  - {{metric: tiny_accuracy, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process(doc, results):
    return {"tiny_accuracy": float(results[0].strip() == doc["answer"])}
"""


def installed(folder):
    """Write what an installation of MMLM tells of its entry points, for a tree that is none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["lmms_eval.models"]
    told = folder / "mmlm_tree-0.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: mmlm_tree\nVersion: 0\n")
    lines = "".join(f"{name} = {place}\n" for name, place in points.items())
    (told / "entry_points.txt").write_text(f"[lmms_eval.models]\n{lines}")
    return os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])


@needs_lmms
@pytest.mark.slow  # a process that imports lmms-eval
def test_lmms_eval_runs_our_model_on_a_local_task(saved, tmp_path):
    import datasets

    pytest.importorskip("pytablewriter", reason="lmms-eval is here without what it needs")
    from mmlm.assistant import load

    model = load(saved)
    shown = [picture(number) for number in range(3)]
    answers = [model.answer("What?", [image], max_new_tokens=4) for image in shown]
    rows = {"image": shown, "question": ["What?"] * 3, "answer": [*answers[:2], "another"]}
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"),
         "answer": datasets.Value("string")}
    )  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "own.py").write_text(FUNCTIONS)
    (tasks / "tiny_yes_no.yaml").write_text(TASK.format(rows=tmp_path / "rows.parquet", name="own"))
    command = [sys.executable, "-m", "lmms_eval", "--model", "mmlm", "--model_args",
               f"pretrained={saved},device=cpu", "--tasks", "tiny_yes_no", "--include_path",
               str(tasks), "--batch_size", "2", "--output_path", str(tmp_path / "out")]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if "mmlm" not in {point.name for point in entry_points(group="lmms_eval.models")}:
        environment["PYTHONPATH"] = str(installed(tmp_path / "site"))
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=900, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    # lmms-eval may fail with the exit code 0, and tells why on either stream.
    results = next((tmp_path / "out").rglob("*results.json"), None)
    told = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, told
    assert results is not None, told
    found = json.loads(results.read_text())["results"]["tiny_yes_no"]
    assert found["tiny_accuracy,none"] == pytest.approx(2 / 3)


@needs_lmms
@pytest.mark.slow  # imports lmms-eval
def test_their_function_marks_our_predictions(tmp_path):
    picture(0).save(tmp_path / "0.png")
    rows = [{"id": "0", "question_id": str(n), "question": f"{n}?", "answer": "yes",
             "image": "0.png", "category": "random"} for n in range(4)]  # fmt: skip
    benchmark = load_benchmark("pope", data=write_rows(tmp_path, rows))
    found = rescore(benchmark, {"0": "yes", "1": "Yes, a dog", "2": "no", "3": "Yes"})
    assert (found.n, found.ours, found.theirs) == (4, 0.75, 0.5)


@needs_lmms
@pytest.mark.slow  # imports lmms-eval
@pytest.mark.parametrize("name", list(TASKS))
def test_their_function_takes_the_rows_of_every_benchmark_that_is_rescored(name, tmp_path):
    rows, right = PUBLISHED[name]
    benchmark = load_benchmark(name, data=write_copy(name, tmp_path / "copy", rows))
    first = benchmark.items[0].id
    said = right[0].upper().strip(".") if name == "realworldqa" else right[0]  # "a." is not theirs
    assert rescore(benchmark, {first: said}).theirs == pytest.approx(1.0)
    assert rescore(benchmark, {first: "Zebra!"}).theirs == 0.0


def test_a_benchmark_that_theirs_marks_as_a_whole_is_refused(colours):
    with pytest.raises(EvaluationError, match="marks no single rows of 'colours'"):
        rescore(load_benchmark(colours / "colours.yaml"), {})
