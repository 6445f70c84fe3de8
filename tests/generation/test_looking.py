"""What an answer looked at equals the weights of eager attention, without running it."""

from __future__ import annotations

import pytest
import torch

from mmlm.errors import MMLMError
from mmlm.generation import GenerationSettings
from mmlm.generation.looking import look
from mmlm.generation.session import Sessions
from mmlm.messages import user
from tests.tiny import compose_tiny, picture

SETTINGS = GenerationSettings(max_new_tokens=10)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("remembered", [True, False], ids=["after-the-answer", "anew"])
def test_the_rows_are_those_of_eager_attention(tiny, remembered):
    sessions, talk = Sessions(tiny.model, tiny.processor), [user("?", [picture(1), picture(2)])]
    said = sessions.answer(talk, SETTINGS)[0] if remembered else "a fox 🦊 é"
    seen = look(sessions, talk, said)
    if not remembered:  # a random model's bytes need not be letters
        assert "".join(seen.tokens) == said
    prompt = tiny.processor.encode_chat(talk, add_generation_prompt=True)
    ids = prompt.ids + tiny.processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    config = tiny.model.model.language.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with torch.inference_mode():
            weights = tiny.model(
                input_ids=torch.tensor([ids]), pixel_values=prompt.pixel_values,
                output_attentions=True,
            ).attentions  # fmt: skip
    finally:
        config._attn_implementation = before
    upper = torch.stack(weights[len(weights) // 2 :])[:, 0].mean((0, 1))
    rows = upper[len(prompt.ids) - 1 : len(ids) - 1]
    columns = torch.cat([rows[:, first:end] for first, end in prompt.image_spans], 1)
    # Sums in another order: 1e-5 is a hundred times the spacing of float32 at these weights.
    torch.testing.assert_close(seen.heat, columns, atol=1e-5, rtol=1e-4)
    assert [end - first for first, end in seen.spans] == [
        end - first for first, end in prompt.image_spans
    ]


def test_looking_leaves_the_model_and_the_conversation_as_they_were(tiny):
    sessions, talk = Sessions(tiny.model, tiny.processor), [user("What?", [picture(1)])]
    said, _ = sessions.answer(talk, SETTINGS)
    before = tiny.model.model.language.config._attn_implementation
    look(sessions, talk, said)
    assert tiny.model.model.language.config._attn_implementation == before
    again, usage = sessions.answer(talk, SETTINGS)
    assert again == said
    assert usage.num_cached_tokens == usage.num_prompt_tokens - 1


def test_without_a_picture_or_an_answer_there_is_nothing_to_look_at(tiny):
    sessions = Sessions(tiny.model, tiny.processor)
    for talk, said in (([user("What?")], "a"), ([user("What?", [picture(1)])], "")):
        with pytest.raises(MMLMError, match="nothing to look at"):
            look(sessions, talk, said)
