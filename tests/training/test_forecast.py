"""`auto` spreads a model as its memory plan says, on however many devices there are."""

import pytest

import mmlm.training.trainer as trainers
from mmlm.training.precision import choose_precision
from mmlm.training.recipe import Recipe
from mmlm.training.trainer import Trainer
from tests.tiny import compose_tiny
from tests.training.tiny_run import tiny_recipe


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    recipe = Recipe.from_dict(tiny_recipe(folder, row_tokens=64), origin="test")
    return folder, recipe, compose_tiny(folder).model


@pytest.mark.parametrize(
    ("world", "share", "deepspeed", "chosen"),
    [
        (1, 0.01, True, ("none", False)),
        (8, 8 * 1.2, True, ("ddp", False)),
        (8, 8 * 0.8, True, ("fsdp2", False)),
        (8, 8 * 0.01, True, ("zero3", True)),
        (8, 8 * 0.01, False, ("fsdp2", False)),
    ],
)
def test_auto_takes_the_fastest_sharding_that_fits(
    scene, monkeypatch, capsys, world, share, deepspeed, chosen
):
    folder, recipe, model = scene
    trainer = Trainer(recipe, folder, folder / "run")
    precision = choose_precision(recipe.run, trainer.engine.device)
    plans = [
        trainers.plan_memory(
            model, set(trainers.matching(model, stage.patterns)), precision=precision,
            row_tokens=64,
        ).total
        for stage in recipe.stages
    ]  # fmt: skip
    # The devices of a CPU share its memory, so eight of them have an eighth each.
    monkeypatch.setattr(trainers, "memory_here", lambda device: int(share * max(plans) / 0.9))
    monkeypatch.setattr(trainers, "find_spec", lambda name: name if deepspeed else None)
    trainer.engine.world = world
    trainer._settle(model, precision)
    assert (trainer.engine.sharding, trainer.engine.offload) == chosen
    if world > 1:
        told = capsys.readouterr().out
        assert f"sharding    {chosen[0]}: estimated GiB on each of {world}" in told
        assert ("nothing fits" in told) == (share < 1)
