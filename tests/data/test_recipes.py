"""The field's sets have recipes that parse and say what binds; rows of their shape are read."""

import json
from pathlib import Path

import pytest

from mmlm.config import read_yaml
from mmlm.data.facts import facts_of
from mmlm.data.mixture import read_mixture
from mmlm.data.sources_built import BuiltConfig
from mmlm.errors import ConfigError
from mmlm.recipes import find_recipe, list_recipes
from tests.data.made import content, open_source, png, write_tar

PICTURE = {"bytes": png(), "path": "a.png"}
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
TEXTS = [{"user": "What?", "assistant": "A cat.", "source": "AI2D"}]

# A row of each set as its card, its paper or its own loader shows it.
ROWS = {
    "lcs_558k": {"id": "004539375", "image": "00453/004539375.jpg", "conversations": LLAVA},
    "llava_665k": {"id": "000000033471", "image": "coco/train2017/1.jpg", "conversations": LLAVA},
    "sharegpt4v": {"id": "1", "image": "sam/images/sa_1.jpg", "conversations": LLAVA},
    "sharegpt4v_pt": {"id": "1", "image": "coco/train2017/1.jpg", "conversations": LLAVA},
    "llava_next": {"id": "1", "conversations": LLAVA, "data_source": "x", "image": PICTURE},
    "llava_onevision": {"id": "1", "image": PICTURE, "conversations": LLAVA, "data_source": "x"},
    "m4_instruct": {
        "sample_id": 1, "image": ["a.jpg", "b.jpg"],
        "conversations": [{"from": "human", "value": "<image>\n<image>\nSame?"}, LLAVA[1]],
        "metadata": {"dataset": "x"},
    },
    "the_cauldron": {"images": [PICTURE], "texts": TEXTS},
    "finevision": {
        "images": [PICTURE], "texts": TEXTS[:1], "source": "chartqa", "relevance_ratings": [5],
        "relevance_min": 5, "visual_dependency_ratings": [4], "formatting_min": 3,
    },
    "viscon_100k": {"image": "1.jpg", "conversations": LLAVA},
}  # fmt: skip
FETCHED = ("pixmo_cap", "pixelprose")
FIELD = {name for name, path in list_recipes("sources").items() if "about:" in path.read_text()}


def test_every_recipe_with_facts_has_a_row_here():
    assert {*ROWS, *FETCHED} == FIELD


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_of_the_published_shape_becomes_a_sample(name, tmp_path):
    [(config, _, _)] = read_mixture(name, folder=tmp_path, find=find)
    reader = config.reader()
    sample = reader.read(ROWS[name], number=0, source=name, folder=tmp_path)
    assert [message.role for message in sample.messages] == ["user", "assistant"]
    assert sample.messages[0].images
    assert sample.messages[1].text == "A cat."


@pytest.mark.parametrize("name", FETCHED)
def test_shards_as_img2dataset_writes_them_are_read(name, tmp_path):
    about = {"url": "https://x.org/a.jpg", "key": "000000000", "status": "success", "width": 8,
             "error_message": None, "height": 8, "caption": "A cat.", "sha256": "0"}  # fmt: skip
    files = {"000000000.jpg": png(), "000000000.txt": "A cat.", "000000000.json": json.dumps(about)}
    words = read_yaml(find_recipe("sources", name))
    write_tar(tmp_path / words["path"].replace("*", "00000"), files)
    [(config, _, _)] = read_mixture(name, folder=tmp_path, find=find)
    source = config.open(tmp_path)
    turns = content(source.sample(0))
    assert turns == [("user", f"[{len(png())} bytes]", words["question"]), ("assistant", "A cat.")]


def find(name):
    kinds = ("mixtures", "sources")
    return find_recipe(next((k for k in kinds if name in list_recipes(k)), "sources"), name)


@pytest.mark.parametrize("kind", ["sources", "mixtures"])
def test_every_data_recipe_parses(kind, tmp_path):
    for name in list_recipes(kind):
        assert read_mixture(name, folder=tmp_path, find=find), name


def test_the_data_sets_that_are_built_exist():
    from mmlm.data.builders import BUILDERS

    named = {
        config.name
        for kind in ("sources", "mixtures")
        for name in list_recipes(kind)
        for config, _, _ in read_mixture(name, folder=list_recipes(kind)[name].parent, find=find)
        if isinstance(config, BuiltConfig)
    }
    assert named == set(BUILDERS)


@pytest.mark.parametrize("name", sorted(FIELD))
def test_every_set_says_its_licence_and_what_was_not_checked(name):
    facts = facts_of(read_yaml(find_recipe("sources", name)), origin=name)
    said = "\n".join(facts.lines())
    assert facts.licence in said
    assert facts.home in said
    for fact in facts.unverified:
        assert fact == "shape" or getattr(facts, fact) is not None
    assert said.count("(unverified)") == len(set(facts.unverified) - {"shape"})
    if read_yaml(find_recipe("sources", name))["use"] != "hub":
        assert facts.fetch


def test_words_about_a_set_that_are_no_facts_are_refused(tmp_path):
    words = {"use": "jsonl", "path": "a.jsonl", "about": {"home": "me", "licence": "mit"}}
    assert read_mixture(words, folder=tmp_path)
    with pytest.raises(ConfigError, match="licens: no such key"):
        read_mixture({**words, "about": {**words["about"], "licens": "x"}}, folder=tmp_path)
    about = {**words["about"], "unverified": ["size"]}
    with pytest.raises(ConfigError, match="'size', which is no fact"):
        read_mixture({**words, "about": about}, folder=tmp_path)


def test_a_recipe_that_names_local_files_begins_where_it_stands(tmp_path):
    (tmp_path / "LLaVA-Pretrain" / "images" / "00453").mkdir(parents=True)
    (tmp_path / "LLaVA-Pretrain" / "images" / "00453" / "004539375.jpg").write_bytes(png())
    path = tmp_path / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json"
    path.write_text(json.dumps([ROWS["lcs_558k"]]))
    words = {k: v for k, v in read_yaml(find_recipe("sources", "lcs_558k")).items() if k != "about"}
    image = open_source(tmp_path, **words).sample(0).messages[0].images[0]
    assert Path(image).read_bytes() == png()
