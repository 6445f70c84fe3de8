"""lmms-eval, as it comes, measures a model through our server."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.messages import user
from mmlm.serving.engine import Engine
from tests.serving.live import serving
from tests.tiny import compose_tiny, picture

pytestmark = pytest.mark.slow
pytest.importorskip("lmms_eval")
datasets = pytest.importorskip("datasets")
NUM = 40
"""More than lmms-eval sends at once."""

TASK = """
task: tiny_questions
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_visual: !function shown.visual
doc_to_text: !function shown.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
process_results: !function shown.results
metric_list:
  - {{metric: alike, aggregation: mean, higher_is_better: true}}
"""
SHOWN = """
import io
from PIL import Image

def visual(doc):
    return [Image.open(io.BytesIO(doc["file"])).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, said):
    return {"alike": float(said[0].strip() == doc["answer"])}
"""


def test_lmms_eval_gets_the_models_own_answers_to_all_questions(tmp_path):
    tiny = compose_tiny(tmp_path / "parts")
    sessions, settings = Sessions(tiny.model, tiny.processor), GenerationSettings(max_new_tokens=8)
    rows = []
    for number in range(NUM):
        file, text = io.BytesIO(), f"What is number {number}?"
        picture(number).save(file, "PNG")
        answer, _ = sessions.answer([user(text, [picture(number)])], settings)
        rows.append({"file": file.getvalue(), "question": text, "answer": answer})
    (tmp_path / "tasks").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "tasks/tiny_questions.yaml").write_text(TASK.format(file=tmp_path / "rows.parquet"))
    (tmp_path / "tasks/shown.py").write_text(SHOWN)
    engine = Engine(Sessions(tiny.model, tiny.processor), name="tiny")
    command = [
        sys.executable, "-m", "lmms_eval", "eval", "--model", "openai",
        "--model_args", "model_version=tiny,timeout=300", "--include_path", str(tmp_path / "tasks"),
        "--tasks", "tiny_questions", "--batch_size", "1", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    with serving([engine], keys=["key"]) as address:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1500,
            env={**os.environ, "OPENAI_API_BASE": f"{address}/v1", "OPENAI_API_KEY": "key",
                 "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    found = list((tmp_path / "out").rglob("*results.json"))
    assert found, done.stdout[-2000:] + done.stderr[-4000:]
    scores = json.loads(found[0].read_text())["results"]["tiny_questions"]
    assert scores["alike,none"] == 1.0
