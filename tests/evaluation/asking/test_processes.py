"""Several processes: each answers its share, and no answer is lost whichever is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmlm.evaluation.asking.answers import read_answers
from mmlm.evaluation.asking.processes import Processes
from tests.evaluation.conftest import Parrot, sees
from tests.evaluation.test_runner import run

TWO = """
import sys
sys.path.insert(0, {tests!r})
from conftest import Parrot, sees
from mmlm.evaluation import evaluate

model = Parrot(sees)
result = evaluate(model, {yaml!r}, {out!r}, quiet=True, batch_size=2)
print(len(model.asked), result.score("colours", "choice").score)
"""


def test_batches_are_dealt_and_none_is_left():
    dealt = [Processes(rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(number for share in dealt for number in share) == list(range(10))


def test_logs_of_a_killed_run_of_several_are_taken_over(colours, tmp_path):
    out = tmp_path / "out"
    run(Parrot(sees), colours, out, conditions=("image",))
    lines = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (out / "answers.jsonl").write_bytes(b"".join(lines[::2]))
    (out / "answers.rank1.jsonl").write_bytes(b"".join(lines[1::2]) + b'{"cut')

    again = Parrot(sees)
    run(again, colours, out, conditions=("image",))
    assert again.asked == []
    assert not (out / "answers.rank1.jsonl").exists()
    assert len(read_answers(out / "answers.jsonl")) == len(lines)


@pytest.mark.slow  # two fresh processes and their rendezvous
def test_two_processes_share_the_work(colours, tmp_path):
    code = TWO.format(
        tests=str(Path(__file__).parents[1]),
        yaml=str(colours / "colours.yaml"),
        out=str(tmp_path / "out"),
    )
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533",
              "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **launch, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=300)[0].split() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert [score for _, score in told] == ["1.0", "1.0"]
    asked = [int(count) for count, _ in told]
    alone = Parrot(sees)
    run(alone, colours, tmp_path / "alone")
    assert sum(asked) == len(alone.asked)
    assert min(asked) > 0
