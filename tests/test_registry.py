"""A registry files names, and a miss says which name was probably meant."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from mmlm.config import PartConfig
from mmlm.errors import ConfigError, RegistryError
from mmlm.registry import Registry


@pytest.fixture
def fruits() -> Registry[PartConfig]:
    registry = Registry[PartConfig]("fruit")

    @registry.register("apple")
    class AppleConfig(PartConfig):
        """A fruit."""

        seeds: int = 5
        """How many."""

    return registry


def test_a_name_gives_the_config_that_was_filed_under_it(fruits):
    assert fruits["apple"].__name__ == "AppleConfig"
    assert fruits["apple"].use == "apple"
    assert list(fruits) == ["apple"]
    assert "apple" in fruits


def test_a_misspelt_name_is_answered_with_the_nearest(fruits):
    with pytest.raises(RegistryError, match=r"'aple'.* Did you mean 'apple'\? Known: apple\."):
        fruits["aple"]


def test_two_parts_cannot_share_a_name(fruits):
    with pytest.raises(RegistryError, match=r"already taken by .*AppleConfig"):

        @fruits.register("apple")
        class OtherConfig(PartConfig):
            """Another."""


def test_the_same_part_may_be_filed_twice(fruits):
    config = fruits["apple"]
    assert fruits.register("apple")(config) is config


def test_words_of_a_recipe_become_a_config_and_back(fruits):
    config = fruits.read({"use": "apple", "seeds": 3}, origin="model.fruit")
    assert config.to_dict() == {"use": "apple", "seeds": 3}
    assert fruits.read(config.to_dict(), origin="again") == config


@pytest.mark.parametrize("words", [None, "apple", {"seeds": 3}, {"use": 3}], ids=repr)
def test_words_without_a_name_are_refused_with_an_example(fruits, words):
    with pytest.raises(
        ConfigError, match=r"model\.fruit must name a fruit, such as \{use: apple\}"
    ):
        fruits.read(words, origin="model.fruit")


def test_an_unknown_key_is_named_with_its_place(fruits):
    with pytest.raises(ConfigError, match=r"model\.fruit \(use: apple\)[\s\S]*peel: no such key"):
        fruits.read({"use": "apple", "peel": 1}, origin="model.fruit")


def test_parts_of_other_packages_are_loaded_when_a_name_is_missing(fruits, monkeypatch):
    def entry_points(group: str) -> list[EntryPoint]:
        assert group == "mmlm.fruits"

        class Plugin(EntryPoint):
            def load(self):
                fruits.register("pear")(type("PearConfig", (PartConfig,), {}))

        return [Plugin("pear", "elsewhere", group)]

    monkeypatch.setattr("mmlm.registry.entry_points", entry_points)
    assert fruits["pear"].__name__ == "PearConfig"
