"""`mmlm check` says before a training which class the folder will be, and who opens it."""

from __future__ import annotations

import re

import pytest

from mmlm.training.preflight import check
from mmlm.training.recipe import Recipe
from mmlm.training.trainer import Trainer
from tests.training.tiny_run import tiny_recipe

TOOLS = (
    "transformers", "pipeline", "transformers serve", "vLLM", "SGLang", "llama.cpp", "lmms-eval",
)  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "said"),
    [
        (2, r"stock class +yes +saved as LlavaForConditionalGeneration"),
        (3, r"stock class +no .*The nearest is LlavaForConditionalGeneration .*mlp has depth 3"),
    ],
    ids=["stock", "own"],
)
def test_a_check_names_the_class_or_the_nearest_one_and_every_tool(tmp_path, capsys, depth, said):
    recipe = tiny_recipe(tmp_path)
    recipe["model"]["connector"] = {"use": "mlp", "depth": depth}
    check(Trainer(Recipe.from_dict(recipe), tmp_path, tmp_path / "check"))
    told = capsys.readouterr().out.partition("opens in")[2]
    assert re.search(said, told), told
    for tool in TOOLS:
        assert re.search(rf"^  {re.escape(tool)} +(yes|no|untried) +\S", told, re.MULTILINE), tool
