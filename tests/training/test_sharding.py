"""A model that is spread over two processes learns what one process learns.

The tolerances: fp32 on a CPU, the same samples added up in another order. Adam divides by the
root of the second moment, so where a gradient is near zero a difference in the last bit can turn
a whole step of the peak rate; hence the mean difference of a weight is compared, not the largest.
"""

import importlib.util
import json
import os

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmlm.training import train
from tests.training.launching import KILLED, group, launch
from tests.training.test_resume import assert_same_bits
from tests.training.tiny_run import tiny_recipe, write_rows

LOSS_RTOL, MEAN_WEIGHT_ATOL = 1e-4, 1e-4
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
SHARDINGS = ["fsdp2", pytest.param("zero1", marks=needs_deepspeed)]


def log_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def weights(out, stage):
    (folder,) = (out / "checkpoints" / stage).glob("step-*")
    return load_file(folder / "weights.safetensors")


def assert_same_learning(one, two):
    logs = log_of(one), log_of(two)
    assert len(logs[0]) == len(logs[1])
    for first, second in zip(*logs, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=LOSS_RTOL)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=10 * LOSS_RTOL)
        assert second["tokens"] == first["tokens"]
    ours, theirs = weights(one, "instruct"), weights(two, "instruct")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).abs().mean() < MEAN_WEIGHT_ATOL, name


def recipe_in(folder, **run):
    """Two stages; every fifth row is text alone, two pictures are missing, rows are short."""
    write_rows(folder, 24, bad=1)
    recipe = tiny_recipe(folder, row_tokens=100, checkpoint_every=2, **run)
    recipe["validation"] = {"data": str(folder / "rows.jsonl"), "every_steps": 4, "samples": 7,
                            "answers": 1, "max_new_tokens": 2}  # fmt: skip
    recipe["run"]["drop_budget"] = 0.9
    return recipe


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process learns from it, and the recipe."""
    folder = tmp_path_factory.mktemp("one")
    recipe = recipe_in(folder)
    os.environ["MMLM_CACHE"] = str(folder / "cache")
    train(recipe, folder / "run", quiet=True)
    return folder / "run", recipe


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_model_spread_over_two_processes_learns_the_same_and_resumes_in_the_same_bits(
    tmp_path, one, sharding
):
    single, recipe = one
    spread = {"run.sharding": sharding}
    statuses = launch(
        group((recipe, tmp_path / "two", spread, None)),
        group((recipe, tmp_path / "broken", spread, ["align", 3])),
        group((recipe, tmp_path / "broken", spread, ["instruct", 3])),
        group((recipe, tmp_path / "broken", spread, None)),
    )
    assert statuses == [[0, 0], [KILLED] * 2, [KILLED] * 2, [0, 0]]
    assert_same_learning(single, tmp_path / "two")
    drops = [(out / "quarantine.jsonl").read_text() for out in (single, tmp_path / "two")]
    assert drops[0] == drops[1]
    assert_same_bits(tmp_path / "two", tmp_path / "broken")
    # What it leaves behind is the stock folder that one process leaves behind.
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "two" / "model")
    reference = AutoModelForImageTextToText.from_pretrained(single / "model").state_dict()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    for name, value in model.state_dict().items():
        assert (value - reference[name]).abs().mean() < MEAN_WEIGHT_ATOL, name
