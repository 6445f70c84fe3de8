"""A recipe says what it means, and single lines of it can be changed."""

import pytest

from mmlm.errors import ConfigError
from mmlm.recipes import list_recipes
from mmlm.training import read_recipe
from mmlm.training.folder import changed, resolved_text
from mmlm.training.schedules import rate


def words(**changes):
    stage = {"name": "align", "learn": ["connector.*"], "data": "a.jsonl", "until": {"epochs": 1}}
    model = {"vision": {"use": "patches"}, "language": {"use": "causal_lm", "checkpoint": "x"}}
    return {"model": model, "stages": [stage], **changes}


@pytest.mark.parametrize("name", list(list_recipes("train")))
def test_every_recipe_of_the_house_can_be_read(name):
    recipe, _, found = read_recipe(name)
    assert found == name
    assert recipe.stages


def test_one_line_can_be_changed_by_its_name():
    recipe, _, _ = read_recipe(
        words(),
        [
            "stages.align.peak_lr=5e-4",
            "run.seed=3",
            "model.connector.depth=1",
            "stages.0.betas=[0.9, 0.95]",
        ],
    )
    assert recipe.stages[0].peak_lr == 5e-4
    assert recipe.run.seed == 3
    assert recipe.model["connector"] == {"depth": 1}
    assert recipe.stages[0].betas == (0.9, 0.95)


def test_the_words_of_the_command_line_are_read_as_yaml():
    recipe, _, _ = read_recipe(words(), {"stages.align.until": "{steps: 3}", "run.ask": "null"})
    assert recipe.stages[0].until.steps == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.alignn.peak_lr=1", "Did you mean 'align'"),
        ("stages.align.peek_lr=1", "peek_lr: no such key"),
        ("run.seed=x", "run.seed"),
        ("model.visoin.use=x", "did you mean 'vision'"),
        ("stages.align.until={epochs: 1, steps: 2}", "exactly one"),
        ("stages.align.learn=[]", "names nothing"),
        ("run", "not KEY=VALUE"),
        ("run.seed.deep=1", "stays"),
    ],
)
def test_a_wrong_change_says_what_is_wrong(change, message):
    if message == "stays":
        with pytest.raises(ConfigError):
            read_recipe(words(run={"seed": 1}), [change])
        return
    with pytest.raises(ConfigError, match=message):
        read_recipe(words(), [change])


def test_two_stages_may_not_share_a_name():
    stage = words()["stages"][0]
    with pytest.raises(ConfigError, match="two stages are named 'align'"):
        read_recipe(words(stages=[stage, stage]))


def test_a_model_needs_vision_and_language():
    with pytest.raises(ConfigError, match=r"model\.language is missing"):
        read_recipe(words(model={"vision": {"use": "patches"}}))


def test_a_resolved_recipe_reads_back_to_the_same(tmp_path):
    recipe, _, _ = read_recipe(words())
    path = tmp_path / "recipe.resolved.yaml"
    path.write_text(resolved_text(recipe.to_dict()))
    assert read_recipe(path)[0] == recipe


def test_what_changed_is_named_line_by_line():
    old = read_recipe(words())[0].to_dict()
    new = read_recipe(words(), ["stages.align.peak_lr=0.5", "run.checkpoint_minutes=1"])[0]
    assert changed(old, new.to_dict()) == ["stages.align.peak_lr: 0.001 -> 0.5"]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_schedule_rises_and_never_exceeds_the_peak(schedule):
    recipe, _, _ = read_recipe(
        words(), {"stages.align.schedule": schedule, "stages.align.warmup": 0.1}
    )
    stage = recipe.stages[0]
    rates = [rate(stage, progress=i / 100, step=i) for i in range(101)]
    assert rates[0] == 0.0
    assert max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[-1] == (1.0 if schedule == "constant" else 0.0)


def test_warm_up_can_be_counted_in_steps():
    recipe, _, _ = read_recipe(
        words(), {"stages.align.warmup": 4, "stages.align.schedule": "constant"}
    )
    rates = [rate(recipe.stages[0], progress=0.5, step=i) for i in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
