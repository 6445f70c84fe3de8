"""Memory does not grow with the rows of a source, but for the few bytes that find each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.made import png
from tests.tiny import compose_tiny

ROOT = Path(__file__).parents[2]
LOOK = """
import json, sys
from pathlib import Path
from mmlm.data import open_mixture
from mmlm.data.planning import Planned, Planner
from mmlm.processing import MMLMProcessor

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

folder = Path(sys.argv[1])
processor = MMLMProcessor.from_pretrained(folder / "processor")
warm = open_mixture("warm.jsonl", folder=folder)
planner = Planner(warm, processor, max_tokens=600, max_tiles=64)
for position in range(300):
    planner.plan(position)
before = resident()
mixture = open_mixture(sys.argv[2], folder=folder)
planner = Planner(mixture, processor, max_tokens=600, max_tiles=64)
good = 0
for position in range(300):
    good += isinstance(planner.plan(position), Planned)
print(json.dumps({"grown": resident() - before, "good": good, "rows": mixture.epoch_rows}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own counts")
def test_a_million_rows_cost_a_few_bytes_each(tmp_path):
    eye = {"use": "patches", "patch_px": 8, "side_px": 16}
    processor = compose_tiny(tmp_path / "model", vision="patches", eye=eye).processor
    processor.save_pretrained(tmp_path / "processor")
    (tmp_path / "a.png").write_bytes(png())
    grown = {}
    for rows in (300, 10_000, 100_000, 1_000_000):
        name = "warm.jsonl" if rows == 300 else f"{rows}.jsonl"
        with (tmp_path / name).open("w") as file:
            for number in range(rows):
                answer = f"It is number {number}, and some more words besides."
                row = {"id": number, "image": "a.png", "question": "What?", "answer": answer}
                file.write(json.dumps(row) + "\n")
        if rows == 300:
            continue
        done = subprocess.run(
            [sys.executable, "-c", LOOK, str(tmp_path), name],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        said = json.loads(done.stdout.splitlines()[-1])
        assert (said["rows"], said["good"]) == (rows, 300)
        grown[rows] = said["grown"]
    # Beginning and end of a row are 16 bytes; finding them takes a chunk of the file at a time,
    # of which the allocator keeps some. The rows themselves are 105 bytes and would show.
    assert grown[1_000_000] - grown[10_000] < 64 * 1_000_000
    assert grown[100_000] - grown[10_000] < 16 << 20
