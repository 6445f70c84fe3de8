"""A model that is spread over two processes learns what one process learns.

The tolerances: fp32 on a CPU, the same samples added up in another order. Adam divides by the
root of the second moment, so where a gradient is near zero a difference in the last bit can turn
a whole step of the peak rate; hence the mean difference of a weight is compared, not the largest.
"""

import importlib.util
import json
import os
import signal

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmlm.training import train
from tests.tiny import picture
from tests.training.launching import KILLED, group, launch
from tests.training.test_distillation import teacher
from tests.training.test_preference import recipe_of as preference_recipe
from tests.training.test_preference import write_pairs
from tests.training.test_resume import assert_same_bits
from tests.training.tiny_run import tiny_recipe, write_rows
from tests.whole.families import save_family

LOSS_RTOL, MEAN_WEIGHT_ATOL = 1e-4, 1e-4
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
# By default DeepSpeed leaves what is smaller than 100,000 whole, and so all of a tiny model.
ALL = {"run.deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
OFFLOAD = {"run.offload": True}
SHARDINGS = {
    "fsdp2": {},
    "zero1": {},
    "zero2": {},
    "zero2 with offload": OFFLOAD,
    "zero3": ALL,
    "zero3 with offload": ALL | OFFLOAD,
}


def every(names=SHARDINGS):
    """Return the names, with DeepSpeed's skipped where it is not installed."""
    marks = {name: [needs_deepspeed] if "zero" in name else [] for name in names}
    return [pytest.param(name, marks=marks[name], id=name) for name in names]


def words_of(name):
    return {"run.sharding": name.split()[0], **SHARDINGS[name]}


def log_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def weights(out, stage):
    (folder,) = (out / "checkpoints" / stage).glob("step-*")
    return load_file(folder / "weights.safetensors")


def assert_same_learning(one, two, stage="instruct"):
    logs = log_of(one), log_of(two)
    assert len(logs[0]) == len(logs[1])
    for first, second in zip(*logs, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=LOSS_RTOL)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=10 * LOSS_RTOL)
        assert second["tokens"] == first["tokens"]
    ours, theirs = weights(one, stage), weights(two, stage)
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
@pytest.mark.parametrize("sharding", every())
def test_a_model_spread_over_two_processes_learns_the_same_and_resumes_in_the_same_bits(
    tmp_path, one, sharding
):
    single, recipe = one
    spread = words_of(sharding)
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


@pytest.mark.slow
@pytest.mark.parametrize("sharding", every(["fsdp2", "zero2", "zero3"]))
def test_a_spread_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path, sharding):
    recipe = recipe_in(tmp_path)
    recipe["run"]["checkpoint_every"] = 1
    spread = words_of(sharding)
    kills = [(recipe, tmp_path / "killed", spread, lines) for lines in (1, 3, 5, 2)]
    statuses = launch(
        group((recipe, tmp_path / "unbroken", spread, None)),
        *(group(kill) for kill in kills),
        group((recipe, tmp_path / "killed", spread, None)),
    )
    assert [-signal.SIGKILL] * 2 in statuses
    assert_same_bits(tmp_path / "unbroken", tmp_path / "killed")


def uneven_recipe(folder, **stage):
    """Every row holds one sample: one rank sees text alone, the other one to four pictures."""
    rows = []
    for index in range(16):
        picture(index).save(folder / f"{index}.png")
        if index % 2 == 0:
            rows.append({"question": "Tell me of a hill and of rain. " * 2, "answer": "Two dogs."})
        else:
            names = [f"{number}.png" for number in range(1 + index // 2 % 4)]
            rows.append({"image": names, "question": "What is it?", "answer": "A cat."})
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = tiny_recipe(folder, row_tokens=130, pool_samples=1, feature_cache="off")
    only = {**recipe["stages"][1], "learn": ["vision.*", "connector.*", "language.*"],
            "step_tokens": 260, "shuffle": False, **stage}  # fmt: skip
    return {**recipe, "stages": [only]}


def counts_of(out, rank):
    text = out.with_name(f"{out.name}-pictures-{rank}").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", every(["fsdp2", "zero2", "zero3"]))
def test_ranks_with_text_alone_or_with_other_numbers_of_pictures_do_not_hang(tmp_path, sharding):
    recipe = uneven_recipe(tmp_path)
    train(recipe, tmp_path / "one", quiet=True)
    launch(group((recipe, tmp_path / "two", words_of(sharding), None)), most_seconds=600)
    first, second = (counts_of(tmp_path / "two", rank) for rank in range(2))
    assert any(sum(mine) == 0 < sum(theirs) for mine, theirs in zip(first, second, strict=True))
    assert len({sum(theirs) for theirs in second}) > 2
    assert_same_learning(tmp_path / "one", tmp_path / "two")


def assert_two_learn_as_one(folder, recipe, sharding):
    stage = recipe["stages"][0]["name"]
    train(recipe, folder / "one", quiet=True)
    launch(group((recipe, folder / "two", words_of(sharding), None)), most_seconds=600)
    assert_same_learning(folder / "one", folder / "two", stage)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", every(["fsdp2", "zero2", "zero3"]))
def test_pairs_are_learnt_against_the_model_without_its_adapters(tmp_path, sharding):
    write_pairs(tmp_path)
    recipe = preference_recipe(tmp_path, until={"steps": 3})
    # Rows of one or two pairs: how often the head is called differs from rank to rank.
    recipe["run"]["row_tokens"] = 200
    assert_two_learn_as_one(tmp_path, recipe, sharding)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", every(["fsdp2", "zero2", "zero3"]))
def test_an_encoder_learns_from_a_teacher_while_a_rank_has_no_picture(tmp_path, sharding):
    recipe = uneven_recipe(
        tmp_path, name="see", until={"steps": 3},
        objective={"use": "distillation", "teacher": teacher(tmp_path, "siglip"),
                   "next_token": 0.5},
    )  # fmt: skip
    assert_two_learn_as_one(tmp_path, recipe, sharding)
    assert not any(map(sum, counts_of(tmp_path / "two", 0)))


@pytest.mark.slow
@pytest.mark.parametrize("sharding", every(["fsdp2", "zero2", "zero3"]))
def test_a_stock_class_taken_whole_is_spread_while_a_rank_has_no_picture(tmp_path, sharding):
    folder = save_family(tmp_path / "onevision", "llava_onevision")
    recipe = uneven_recipe(tmp_path, name="tune", until={"steps": 3}, step_tokens=300)
    rows = [
        {"question": "Tell me of a hill and of rain. " * 3, "answer": "Two dogs."} if index % 2 == 0
        else {"image": f"{index}.png", "question": "What is it?", "answer": "A cat."}
        for index in range(12)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe["model"] = {"from": str(folder), "whole": True}
    recipe["run"]["row_tokens"] = 150
    assert_two_learn_as_one(tmp_path, recipe, sharding)
    first, second = (counts_of(tmp_path / "two", rank) for rank in range(2))
    assert any(sum(mine) == 0 < sum(theirs) for mine, theirs in zip(first, second, strict=True))
