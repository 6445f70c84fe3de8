"""Recipes are found by name or path, in a checkout; the wheel is tested in `test_wheel`."""

from __future__ import annotations

import pytest

from mmlm.errors import ConfigError
from mmlm.recipes import KINDS, find_recipe, first_line, list_recipes, recipe_folder


def test_a_name_and_a_path_find_the_same_file():
    path = list_recipes("train")["quickstart"]
    assert find_recipe("train", "quickstart") == path == find_recipe("train", path)


def test_a_file_of_the_user_is_found_by_its_path(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {}\n")
    assert find_recipe("train", str(mine)) == mine


def test_a_name_of_ours_wins_over_a_folder_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_recipe("train", "quickstart") == list_recipes("train")["quickstart"]


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"No recipe is named 'quikstart'.* 'quickstart'\?"):
        find_recipe("train", "quikstart")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_folder(kind):
    assert recipe_folder(kind).is_dir()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_line_of_every_recipe_says_what_it_is(kind):
    silent = [name for name, path in list_recipes(kind).items() if not first_line(path)]
    assert silent == []
