"""Pairs of answers as a source: what goes with them, and what does not."""

import pytest

from mmlm.data.schema import BadRowError
from mmlm.errors import ConfigError
from tests.data.made import open_source, write_lines

PAIR = {"id": "1", "question": "What?", "chosen": "A cat.", "rejected": "A dog."}


@pytest.mark.parametrize("words", [{"turns": "apart"}, {"learn": "all"}])
def test_what_would_part_a_pair_is_refused_with_the_mend(tmp_path, words):
    write_lines(tmp_path / "a.jsonl", [PAIR])
    ((key, value),) = words.items()
    with pytest.raises(ConfigError, match=f"`{key}: {value}` does not go with `use: pairs`.*Leave"):
        open_source(tmp_path, use="pairs", path="a.jsonl", **words)


def test_a_pair_is_two_last_answers_to_one_question(tmp_path):
    write_lines(tmp_path / "a.jsonl", [PAIR, {**PAIR, "rejected": "A cat."}])
    source = open_source(tmp_path, use="pairs", path="a.jsonl", turns="chain", learn="answers")
    sample = source.sample(0)
    assert [message.text for message in sample.messages] == ["What?", "A cat."]
    assert [message.text for message in sample.meta["rejected"]] == ["What?", "A dog."]
    with pytest.raises(BadRowError, match="are the same"):
        source.sample(1)


def test_a_table_of_pairs_may_name_its_answer_otherwise(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{**PAIR, "answer": 3}])
    source = open_source(tmp_path, use="pairs", path="a.jsonl", columns={"answer": "told"})
    assert source.sample(0).messages[-1].text == "A cat."
