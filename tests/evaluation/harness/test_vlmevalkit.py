"""Our model inside VLMEvalKit itself, which a package of PyPI brings (`pip install ms-vlmeval`).

It runs in a process of its own, because importing it switches gradients off for good.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmlm.assistant import load
from mmlm.evaluation.scorers.reading import anls
from mmlm.evaluation.scorers.yes_no import read_yes_no
from tests.evaluation.harness.test_against_lmms_eval import answers
from tests.tiny import compose_tiny, picture

pytestmark = [
    pytest.mark.slow,  # a process that imports VLMEvalKit
    pytest.mark.skipif(find_spec("vlmeval") is None, reason="needs VLMEvalKit (ms-vlmeval)"),
]
ROOT = Path(__file__).parents[3]
ASK = """
import json, sys
from functools import partial
from pathlib import Path
import pandas as pd
from vlmeval.config import supported_VLM
from vlmeval.dataset import build_dataset
from vlmeval.dataset.utils.vqa_eval import anls_compute
from vlmeval.dataset.utils.yorn import YOrN_Extraction
from vlmeval.inference import infer_data_job
from vlmeval.smp import load
from mmlm.evaluation.harness.vlmevalkit_model import MMLM
model, out, texts = sys.argv[1:]
supported_VLM["mmlm"] = partial(MMLM, model_path=model, max_new_tokens=6)
dataset = build_dataset("TinyQuestions")
prompts = [dataset.build_prompt(dataset.data.iloc[row]) for row in range(len(dataset.data))]
infer_data_job("mmlm", out, "mmlm", dataset)
(answered,) = Path(out).glob("mmlm_TinyQuestions.*")
texts = json.loads(Path(texts).read_text())
print("HEARD" + json.dumps({
    "prompts": prompts,
    "answers": [str(text) for text in pd.DataFrame(load(str(answered)))["prediction"]],
    "yes_no": [YOrN_Extraction(text) for text in texts],
    "distances": [anls_compute(text, other) for text, other in zip(texts, texts[1:])],
}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Let VLMEvalKit ask a tiny model about three pictures, and read made-up answers."""
    place = tmp_path_factory.mktemp("vlmevalkit")
    compose_tiny(place / "parts").save(place / "model")
    with (place / "TinyQuestions.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image", "question", "answer", "A", "B"])
        for number in range(3):
            buffer = io.BytesIO()
            picture(number, 48, 48).save(buffer, "PNG")
            coded = base64.b64encode(buffer.getvalue()).decode()
            writer.writerow([number, coded, f"Which is number {number}?", "A", "red", "blue"])
    texts = [text for text in answers(7) if text.strip()][:2000]
    (place / "texts.json").write_text(json.dumps(texts))
    (place / "out").mkdir()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Their usual format, Excel, writes some characters otherwise.
    own = {"LMUData": str(place), "PRED_FORMAT": "json", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", ASK, "model", "out", "texts.json"],
        cwd=place, env={**os.environ, "HF_HUB_OFFLINE": "1", **own}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return place, texts, json.loads(done.stdout.partition("HEARD")[2].splitlines()[0])


def test_vlmevalkit_asks_our_model(told):
    place, _, heard = told
    model = load(place / "model")
    assert len(heard["answers"]) == 3
    for parts, answer in zip(heard["prompts"], heard["answers"], strict=True):
        shown = [part["value"] for part in parts if part["type"] == "image"]
        (text,) = [part["value"] for part in parts if part["type"] == "text"]
        assert "A. red\nB. blue" in text
        assert answer == model.answer(text, shown, max_new_tokens=6)


def test_yes_and_no_are_read_as_there(told):
    _, texts, heard = told
    ours = [read_yes_no(text, dialect="vlmevalkit") or "unknown" for text in texts]
    wrong = [
        (text, mine, theirs)
        for text, mine, theirs in zip(texts, ours, heard["yes_no"], strict=True)
        if mine != theirs.lower()
    ]
    assert not wrong, f"{len(wrong)} differ, such as {wrong[:5]}"


def test_distances_of_texts_are_those_of_there(told):
    _, texts, heard = told
    wrong = []
    for text, other, theirs in zip(texts, texts[1:], heard["distances"], strict=False):
        # Theirs is a distance from 0 to 1; what is half or more apart counts nothing.
        ours, wanted = anls(other, [text], dialect="vlmevalkit"), 1 - theirs
        if ours != pytest.approx(wanted if wanted >= 0.5 else 0.0):
            wrong.append((text, other, ours, wanted))
    assert not wrong, f"{len(wrong)} differ, such as {wrong[:5]}"
