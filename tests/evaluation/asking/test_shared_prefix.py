"""Questions about one picture share its reading, and are answered as if each were alone."""

from __future__ import annotations

import pytest

from mmlm.errors import EvaluationError
from mmlm.evaluation.asking.backend import LocalBackend
from mmlm.evaluation.asking.shared_prefix import SharedPrefix
from mmlm.evaluation.benchmarks.conditions import Case
from mmlm.evaluation.benchmarks.items import Item
from mmlm.evaluation.scorers import Target
from mmlm.generation import GenerationSettings
from tests.tiny import compose_tiny, picture

QUESTIONS = ("What?", "What colour is the thing on the left of it?", "Why is that so? Say more.")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


def asked(num_pictures=3, seed=0):
    """Three questions about each of some pictures; one has two pictures."""
    made = []
    for number in range(num_pictures):
        shown = (picture(seed + number),) * (2 if number == 2 else 1)
        keys = tuple(f"p{number}-{place}" for place in range(len(shown)))
        for place, question in enumerate(QUESTIONS):
            item = Item(f"{number}-{place}", "x", {}, shown, keys, Target(("a",)))
            made.append(Case("made", "image", item, question, shown, keys, ()))
    return made


def alone(tiny, found, length):
    return [tiny.answer(case.prompt, case.images, max_new_tokens=length) for case in found]


def count_tokens(tiny, monkeypatch):
    """Count the positions that go through the language model."""
    counted = []
    language = tiny.model.model.language
    whole = language.forward

    def forward(*args, inputs_embeds=None, **kwargs):
        counted.append(inputs_embeds.shape[0] * inputs_embeds.shape[1])
        return whole(*args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(language, "forward", forward)
    return counted


def test_answers_are_those_of_each_question_alone(tiny):
    found = asked()
    answers = LocalBackend(tiny).answer(found, GenerationSettings(max_new_tokens=12))
    assert answers == alone(tiny, found, 12)
    assert len(set(answers)) > 3


def test_a_picture_is_read_once_for_all_its_questions_and_batches(tiny, monkeypatch):
    found, settings = asked(2), GenerationSettings(max_new_tokens=1)
    backend = LocalBackend(tiny)
    backend.answer(found[:3], settings)
    counted = count_tokens(tiny, monkeypatch)
    backend.answer(found[:3], settings)
    # The picture of the second batch is that of the first: only questions are read.
    longest = max(len(question) for question in QUESTIONS)
    assert sum(counted) <= 3 * (longest + 24)
    counted.clear()
    backend.answer(found[3:], settings)
    assert len(counted) == 2  # a picture, then three questions


def test_who_is_done_leaves_the_batch(tiny, monkeypatch):
    found, backend = asked(), LocalBackend(tiny)
    settings = GenerationSettings(max_new_tokens=12)
    (ids,) = backend._generate([found[0]], [backend._encode_talk(found[0])], settings)
    # The second token of the first answer ends the turn from now on.
    stops = (*tiny.processor.chat.stop_ids, ids[1])
    monkeypatch.setattr(tiny.processor.chat, "_stop_ids", stops)
    answers = backend.answer(found, settings)
    assert answers == alone(tiny, found, 12)


def test_no_memory_for_what_is_kept_changes_no_answer(tiny):
    found, settings = asked(), GenerationSettings(max_new_tokens=6)
    backend = LocalBackend(tiny)
    backend._shared = SharedPrefix(tiny.model, tiny.processor, budget_bytes=1)
    assert backend.answer(found, settings) == alone(tiny, found, 6)
    assert not backend._shared._kept


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.7}, {"num_beams": 2}, {"repetition_penalty": 1.2}, {"stop": ("a",)}],
)
def test_what_needs_more_than_the_likeliest_token_is_left_to_generate(tiny, change):
    shared = SharedPrefix(tiny.model, tiny.processor)
    assert shared.serves(GenerationSettings(), [])
    assert not shared.serves(GenerationSettings(**change), [])


def test_a_question_without_a_picture_is_left_to_generate(tiny):
    case = asked(1)[0]._replace(images=(), image_keys=())
    answers = LocalBackend(tiny).answer([case], GenerationSettings(max_new_tokens=4))
    assert answers == alone(tiny, [case], 4)


def test_logits_that_are_no_numbers_name_their_items(tmp_path):
    broken = compose_tiny(tmp_path)
    broken.model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(EvaluationError, match=r"made/0-0"):
        LocalBackend(broken).answer(asked(1), GenerationSettings(max_new_tokens=2))
