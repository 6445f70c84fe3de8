"""AMBER's files: what is missing or is another file is said before anything is answered."""

from __future__ import annotations

import json

import pytest

from mmlm.errors import ConfigError, MMLMError
from mmlm.evaluation import load_benchmark
from tests.evaluation.benchmarks.test_published import PUBLISHED, write_copy


@pytest.fixture
def described(tmp_path):
    """The published layout of AMBER's descriptions, and its file of rows."""
    return tmp_path, write_copy(
        "amber_describe", tmp_path / "query", PUBLISHED["amber_describe"][0]
    )


def make_ready(name, rows):
    for scorer in load_benchmark(name, data=rows).scorers.values():
        scorer.ready()


def refused(rows, match, name="amber_describe", error=MMLMError):
    with pytest.raises(error, match=match):
        make_ready(name, rows)


def test_without_the_annotations_their_place_is_named(described):
    folder, rows = described
    (folder / "annotations.json").unlink()
    refused(rows, r"no second table at .*annotations\.json\. `dataset\.join\.path` names it")


def test_annotations_of_other_pictures_are_refused(described):
    folder, rows = described
    other = [{"id": n, "truth": ["dog"], "hallu": ["cat"]} for n in (1, 7)]
    (folder / "annotations.json").write_text(json.dumps(other))
    refused(rows, "1 of 2 rows name no row of the second table by 'id', such as '2'")


def test_annotations_of_the_other_task_are_refused(described):
    folder, rows = described
    other = [{"id": n, "type": "discriminative-relation", "truth": "yes"} for n in (1, 2)]
    (folder / "annotations.json").write_text(json.dumps(other))
    refused(rows, "no list in the column hallu")
    other = [{"id": n, "type": "generative", "truth": ["dog"], "hallu": ["cat"]} for n in (1, 2)]
    (folder / "annotations.json").write_text(json.dumps(other))
    refused(rows, r"must be yes or no \(got 'dog'\)", name="amber")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (None, "they cannot be read"),
        ("{", "they cannot be read"),
        ("[]", "holds no words"),
        ('[{"id": 1, "truth": "yes"}]', "holds no words"),
        ('{"dog": "puppy"}', "'dog' must have a list of words"),
        ('{"dog": [1]}', "'dog' must have a list of words"),
    ],
)
def test_a_missing_or_another_file_of_related_words_is_refused(described, written, said):
    pytest.importorskip("textblob")
    folder, rows = described
    (folder / "relation.json").unlink()
    if written is not None:
        (folder / "relation.json").write_text(written)
    refused(rows, rf"relation\.json and safe_words\.txt of AMBER.*{said}", error=ConfigError)


def test_a_missing_file_of_safe_words_is_refused(described):
    pytest.importorskip("textblob")
    folder, rows = described
    (folder / "safe_words.txt").unlink()
    refused(rows, r"they cannot be read: .*safe_words\.txt", error=ConfigError)
