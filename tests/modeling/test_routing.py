"""The language model chooses which encoders look at a picture, and only those run (MoVA)."""

from __future__ import annotations

import copy

import pytest
import torch

from mmlm.assistant import Request, load
from mmlm.errors import AlignmentError, ConfigError
from mmlm.messages import assistant as answered
from mmlm.messages import user
from mmlm.vision.experts import NOTHING, Choice, only
from tests.contracts.test_vision import HF
from tests.tiny import compose_tiny, picture
from tests.training.test_resume import assert_crashes_change_nothing
from tests.training.tiny_run import tiny_recipe

EYE = {
    "use": "mixture",
    "fuse": "experts",
    "encoders": [
        HF["clip"],
        HF["dinov2"] | {"about": "It sees what shape things have."},
        HF["siglip"] | {"side_px": 48, "about": "It reads text."},
    ],
}
CONNECTOR = {
    "use": "mov_adapter", "layers": 2, "depth": 1, "heads": 4, "rows": 3, "columns": 3,
    "reader_heads": 2,
}  # fmt: skip


def opened(made):
    with torch.no_grad():  # branches begin silent: open them, so that experts matter
        for name, weight in made.model.named_parameters():
            if name.endswith("_gate"):
                weight.fill_(1.0)
    return made


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return opened(compose_tiny(tmp_path_factory.mktemp("parts"), eye=EYE, connector=CONNECTOR))


@pytest.fixture
def made(shared):
    model, processor = copy.deepcopy(shared.model), shared.processor
    return type(shared)(model, processor)


def inputs(made, *prompts, text="What?", answer=None):
    talk = [user(text, prompts), *([] if answer is None else [answered(answer)])]
    encoded = made.processor.encode_chat(talk, add_generation_prompt=answer is None)
    return {
        "input_ids": torch.tensor([encoded.ids]),
        "pixel_values": encoded.pixel_values,
        **made.processor.image_processor.sizes(encoded.image_sizes),
    }


def choosing(made, *chosen):
    """Let the router choose this, picture by picture; return what it is asked with."""
    router, asked = made.model.model.router, []

    def letters(logits):
        asked.append(logits)
        return [list(each) for each in chosen]

    router.letters = letters
    return asked


def calls(made):
    """Count how many pictures each encoder sees."""
    counts = [0, 0, 0]
    for number, encoder in enumerate(made.model.model.vision.encoders):

        def count(_, given, number=number):
            counts[number] += len(given[0])

        encoder.tower.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        ([[], []], [2, 0, 0]),
        ([[1], []], [2, 0, 1]),
        ([[0], [0]], [2, 2, 0]),
        ([[1, 0], [1]], [2, 1, 2]),
    ],
)
@torch.no_grad()
def test_an_expert_that_is_not_chosen_does_not_run(made, chosen, seen):
    choosing(made, *chosen)
    counts = calls(made)
    made.model(**inputs(made, picture(1), picture(2)))
    assert counts == seen


@torch.no_grad()
def test_experts_that_are_known_are_not_asked_for(made):
    asked, counts = choosing(made, [0], [0]), calls(made)
    with only(made.model.model.vision, Choice([[1], []])):
        made.model(**inputs(made, picture(1), picture(2)))
    assert counts == [2, 0, 1]
    assert asked == []


@torch.no_grad()
def test_a_chosen_expert_changes_what_the_language_model_sees_of_its_picture_alone(made):
    given = inputs(made, picture(1), picture(2))
    seen = []
    for chosen in ([[], []], [[0], []], [[1], []], [[1, 0], []]):
        choosing(made, *chosen)
        seen.append(made.model(**given).image_hidden_states.split([9, 9]))
    for at, (one, other) in enumerate(seen):
        torch.testing.assert_close(other, seen[0][1], rtol=0, atol=1e-5)
        for earlier, _ in seen[:at]:
            assert (one - earlier).abs().max() > 1e-4


@torch.no_grad()
def test_the_language_model_is_asked_with_picture_and_question_and_never_with_an_answer(made):
    asked = choosing(made, [])
    for words in (
        {"text": "What?"}, {"text": "Which colour?"}, {"text": "What?", "answer": "A red ball."},
    ):  # fmt: skip
        made.model(**inputs(made, picture(1), **words))
    made.model(**inputs(made, picture(2)))
    first, question, answer, other = asked
    torch.testing.assert_close(first, answer, rtol=0, atol=1e-5)
    assert (first - question).abs().max() > 1e-4
    assert (first - other).abs().max() > 1e-4


def test_letters_above_none_are_chosen_the_best_first(made):
    router = made.model.model.router
    words = router.words
    logits = torch.zeros(4, 300)
    a, b = words.letters
    logits[1, a] = 1.0
    logits[2, [a, b]] = torch.tensor([1.0, 2.0])
    logits[3, [a, b, words.none]] = torch.tensor([1.0, 2.0, 1.5])
    assert router.letters(logits) == [[], [0], [1, 0], [1]]
    router.most = 1
    assert router.letters(logits) == [[], [0], [1], [1]]


def test_the_list_of_experts_is_put_in_the_language_models_own_words(made):
    words, tokenizer = made.model.model.router.words, made.processor.tokenizer
    assert tokenizer.decode(words.head) == "<|im_start|>user\n"
    assert "A. It sees what shape things have.\nB. It reads text." in tokenizer.decode(words.middle)
    assert tokenizer.decode(words.tail) == "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(words.letters) == "AB"


@torch.no_grad()
def test_answers_in_a_batch_and_in_a_chat_are_those_of_each_alone(made):
    two = [picture(2), picture(3)]
    asked = [("What?", [picture(1)]), ("And this longer one?", two), ("Hi", [])]
    alone = [made.answer(text, seen, max_new_tokens=5) for text, seen in asked]
    requests = [Request(text, seen) for text, seen in asked]
    assert made.answer_all(requests, max_new_tokens=5) == alone
    chat = made.chat(max_new_tokens=4)
    assert chat.ask("What?", images=[picture(1)]) == made.answer(
        "What?", [picture(1)], max_new_tokens=4
    )
    assert isinstance(chat.ask("And now?"), str)


def test_what_is_not_chosen_gets_no_gradient_and_what_is_gets_one(made):
    choosing(made, [1])
    made.model.requires_grad_(True).train()
    given = inputs(made, picture(1), answer="A red ball.")
    made.model(**given, labels=given["input_ids"]).loss.backward()
    (block,) = made.model.model.connector.blocks
    assert not block.reading[0].value.weight.grad.any()
    assert block.reading[1].value.weight.grad.any()
    _, unseen, seen = made.model.model.vision.encoders
    assert all(weight.grad is None for weight in unseen.parameters())
    assert any(weight.grad is not None and weight.grad.any() for weight in seen.parameters())


@torch.no_grad()
def test_it_comes_back_from_a_folder(made, tmp_path):
    given = inputs(made, picture(1))
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    assert back.model.model.router.words == made.model.model.router.words
    torch.testing.assert_close(
        back.model(**given).logits, made.model(**given).logits, rtol=0, atol=0
    )


@torch.no_grad()
def test_an_expert_that_was_not_chosen_leaves_no_tokens(made):
    vision = made.model.model.vision
    numbers = torch.randn(2, vision.facts.num_numbers(vision.facts.side_size))
    everything = vision(numbers)
    with only(vision, Choice([[1], []])):
        chosen = vision(numbers)
    assert chosen.layers[0].grids == (NOTHING, NOTHING)
    assert chosen.layers[1].grids == (everything.grids[0], NOTHING)
    torch.testing.assert_close(
        chosen.layers[1].values, everything.layers[1].items()[0], rtol=1e-4, atol=1e-5
    )
    with only(vision, Choice([[1]])), pytest.raises(AlignmentError, match="chosen for 1 tiles"):
        vision(numbers)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="mov_adapter"):
        compose_tiny(tmp_path, eye=EYE, connector={"use": "mlp"})
    silent = [EYE["encoders"][0], HF["dinov2"]]
    with pytest.raises(ConfigError, match="needs `about`"):
        compose_tiny(tmp_path, eye=EYE | {"encoders": silent}, connector=CONNECTOR)


@pytest.mark.slow
def test_a_run_with_adapters_goes_on_in_the_same_bits(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, checkpoint_every=1)
    recipe["model"] |= {"vision": EYE, "connector": CONNECTOR}
    align = recipe["stages"][0]
    align |= {"until": {"steps": 3}}
    lora = {
        "name": "lora", "learn": ["connector.*", "language.*"], "adapters": {"use": "lora"},
        "data": align["data"], "until": {"steps": 4}, "step_tokens": 256, "peak_lr": 1e-3,
    }  # fmt: skip
    recipe["stages"] = [align, lora]
    assert_crashes_change_nothing(recipe, tmp_path, monkeypatch, [("align", 1), ("lora", 2)])
    assert isinstance(load(tmp_path / "unbroken").answer("What?", [picture()]), str)
