"""The number of ordered image tokens is chosen when asking, from one set of weights."""

from __future__ import annotations

import pytest

from mmlm.connectors import check_visual_tokens, visual_tokens
from mmlm.errors import ConfigError
from mmlm.generation import GenerationSettings, Request
from mmlm.generation.session import Sessions
from mmlm.messages import user
from tests.tiny import compose_tiny, picture

ORDERED = {"use": "ordered_queries", "tokens": 8, "depth": 1, "heads": 4}
ASKED = user("What is it?", [picture(3), picture(4)])


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("ordered"), connector=ORDERED)


def cut_to(assistant, count):
    """Return the same weights as a model that has only the first queries, by hand."""
    from mmlm.modeling import MMLMConfig, MMLMForConditionalGeneration
    from mmlm.processing import MMLMImageProcessor, MMLMProcessor

    values = assistant.model.config.to_dict()
    values["connector"] = {**values["connector"], "tokens": count}
    config = MMLMConfig.from_dict(values)
    model = MMLMForConditionalGeneration(config)
    state = dict(assistant.model.state_dict())
    state["model.connector.queries"] = state["model.connector.queries"][:count]
    model.load_state_dict(state)
    tokenizer = assistant.processor.tokenizer
    processor = MMLMProcessor(MMLMImageProcessor.from_config(config), tokenizer)
    return type(assistant)(model.eval(), processor)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_answer_is_that_of_a_model_with_so_many_queries(assistant, count):
    asked = Request(messages=(ASKED,))
    shown = assistant.answers([asked], max_new_tokens=8, visual_tokens=count)[0]
    small = cut_to(assistant, count).answers([asked], max_new_tokens=8)[0]
    assert shown == small
    whole = assistant.answers([asked], max_new_tokens=8)[0]
    assert whole.num_prompt_tokens - shown.num_prompt_tokens == 2 * (8 - count)


def test_a_conversation_may_change_its_mind_and_keeps_what_stays_true(assistant):
    sessions = Sessions(assistant.model, assistant.processor)
    for count in (8, 3, 5, None):
        settings = GenerationSettings(max_new_tokens=6, visual_tokens=count)
        text, usage = sessions.answer([ASKED], settings)
        assert usage.num_image_tokens == 2 * (count or 8)
        assert (
            text == assistant.answer_all([Request(messages=(ASKED,))], **settings.model_dump())[0]
        )


def test_beams_follow_the_number(assistant):
    two = [Request(messages=(ASKED,)), Request("What?", [picture(5)])]
    together = assistant.answer_all(two, max_new_tokens=4, num_beams=2, visual_tokens=2)
    assert together == [
        assistant.answer_all([one], max_new_tokens=4, num_beams=2, visual_tokens=2)[0]
        for one in two
    ]


def test_an_evaluation_shows_as_many(assistant):
    from mmlm.evaluation.asking.backend import LocalBackend
    from mmlm.evaluation.benchmarks.conditions import Case

    case = Case("any", "image", None, "What is it?", (picture(3),), ("3",), ())
    settings = GenerationSettings(max_new_tokens=6, visual_tokens=2)
    (text,) = LocalBackend(assistant).answer([case], settings)
    assert text == assistant.answer("What is it?", [picture(3)], max_new_tokens=6, visual_tokens=2)


def test_the_api_takes_the_number(assistant):
    schema = pytest.importorskip("mmlm.serving.openai_schema")
    turns = [{"role": "user", "content": "What?"}]
    asked = schema.ChatRequest(messages=turns, visual_tokens=4)
    assert asked.settings(16).visual_tokens == 4


def test_tokens_without_an_order_are_refused(tmp_path):
    assistant = compose_tiny(tmp_path)
    with pytest.raises(ConfigError, match=r"connector 'mlp' are not ordered"):
        assistant.answer("What?", [picture(3)], visual_tokens=4)
    with pytest.raises(ConfigError, match="a stock class taken whole"):
        check_visual_tokens(4, None)


def test_more_than_there_are_is_refused(assistant):
    with pytest.raises(ConfigError, match=r"the connector gives 8\. Ask for 1 to 8"):
        assistant.answer("What?", [picture(3)], visual_tokens=9)


def test_the_choice_ends_with_the_block(assistant):
    counter = assistant.model.model.counter
    with visual_tokens(2):
        assert counter.tokens_per_tile == 2
    assert counter.tokens_per_tile == 8
