"""What the joined model promises: a stock class to its users, and the same loss without logits."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from mmlm.errors import AlignmentError
from mmlm.generation import Request
from mmlm.messages import ImagePart, Message, Text, assistant, system, user
from mmlm.modeling import SEGMENTS, MMLMForConditionalGeneration
from tests.tiny import compose_tiny, picture

# Float32 on CPU: the same sums in another order. Largest difference seen is below 2e-6 in
# the loss and 3e-5 in a gradient; a wrong mask or a shifted label moves both by more than 1e-2.
ATOL = 1e-4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


def batch_of(tiny, conversations, with_labels=True):
    """Right-padded tensors of several conversations."""
    rows = [tiny.processor.encode_chat(c, with_labels=with_labels) for c in conversations]
    width = max(len(row.ids) for row in rows)
    pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
    return {
        "input_ids": torch.tensor([r.ids + [0] * (width - len(r.ids)) for r in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in rows]
        ),
        "labels": torch.tensor([r.labels + [-100] * (width - len(r.labels)) for r in rows]),
        "pixel_values": torch.cat(pixels) if pixels else None,
    }


CONVERSATIONS = [
    [user("What is it?", [picture(1)]), assistant("A cat on a mat.")],
    [user("Only text?"), assistant("Yes.")],
    [system("Be short."), user("Two?", [picture(2), picture(3, 30, 90)]), assistant("Two.")],
    [
        Message("user", (Text("See "), ImagePart(picture(4)), Text(" and say."))),
        assistant("Noise."),
        user("More?"),
        assistant("No more to be seen."),
    ],
]


class TestTheLoss:
    def test_alone_equals_the_loss_with_logits(self, tiny):
        batch = batch_of(tiny, CONVERSATIONS)
        full = tiny.model(**batch).loss
        alone = tiny.model(**batch, loss_only=True)
        assert alone.logits is None
        torch.testing.assert_close(alone.loss, full, rtol=0, atol=ATOL)

    def test_alone_gives_the_same_gradients(self, tiny):
        batch = batch_of(tiny, CONVERSATIONS)
        gradients = []
        for loss_only in (False, True):
            tiny.model.zero_grad()
            tiny.model(**batch, loss_only=loss_only).loss.backward()
            gradients.append(
                {n: p.grad.clone() for n, p in tiny.model.named_parameters() if p.grad is not None}
            )
        tiny.model.zero_grad()
        assert gradients[0].keys() == gradients[1].keys()
        for name, grad in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], grad, rtol=0, atol=ATOL, msg=name)

    def test_is_normalised_by_the_number_that_is_passed(self, tiny):
        batch = batch_of(tiny, CONVERSATIONS)
        number = int((batch["labels"][:, 1:] != -100).sum())
        mean = tiny.model(**batch, loss_only=True).loss
        tenth = tiny.model(**batch, loss_only=True, num_items_in_batch=10 * number).loss
        torch.testing.assert_close(tenth * 10, mean, rtol=1e-6, atol=0)

    def test_counts_each_position_by_its_weight(self, tiny):
        batch = batch_of(tiny, CONVERSATIONS[:1])
        number = int((batch["labels"][:, 1:] != -100).sum())
        mean = tiny.model(**batch, loss_only=True).loss
        weights = torch.full(batch["labels"].shape, 3.0)
        thrice = tiny.model(
            **batch, loss_only=True, loss_weights=weights, num_items_in_batch=number
        ).loss
        torch.testing.assert_close(thrice, mean * 3, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("attention", ["sdpa", SEGMENTS])
    def test_of_a_packed_row_equals_that_of_separate_rows(self, tiny, attention):
        batch = batch_of(tiny, CONVERSATIONS)
        apart = tiny.model(**batch, loss_only=True).loss
        lengths = batch["attention_mask"].sum(-1)
        real = batch["attention_mask"].bool()
        packed = {
            "input_ids": batch["input_ids"][real][None],
            "labels": batch["labels"][real][None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seq_lens_q": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
            "pixel_values": batch["pixel_values"],
        }
        decoder = tiny.model.get_decoder()
        decoder.set_attn_implementation(attention)
        together = tiny.model(**packed, loss_only=True).loss
        decoder.set_attn_implementation("sdpa")
        torch.testing.assert_close(together, apart, rtol=0, atol=ATOL)


class TestFusion:
    @pytest.mark.parametrize("change", [-1, 1], ids=["one image less", "one image more"])
    def test_refuses_a_wrong_number_of_images(self, tiny, change):
        batch = batch_of(tiny, CONVERSATIONS)
        pixels = batch["pixel_values"]
        batch["pixel_values"] = pixels[:-1] if change < 0 else torch.cat([pixels, pixels[:1]])
        with pytest.raises(AlignmentError, match="placeholders"):
            tiny.model(**batch)

    def test_the_picture_changes_the_answer(self, tiny):
        batch = batch_of(tiny, CONVERSATIONS[:1])
        other = batch | {"pixel_values": batch["pixel_values"].flip(-1)}
        assert (tiny.model(**batch).logits - tiny.model(**other).logits).abs().max() > 1e-3

    def test_features_computed_earlier_give_the_same_logits(self, tiny):
        batch = batch_of(tiny, CONVERSATIONS)
        features = tiny.model.model.encode_images(batch["pixel_values"])
        later = {k: v for k, v in batch.items() if k != "pixel_values"}
        later |= {"vision_values": features.values, "vision_grids": torch.tensor(features.grids)}
        torch.testing.assert_close(
            tiny.model(**later).logits, tiny.model(**batch).logits, rtol=0, atol=0
        )


REQUESTS = [
    Request("What is it?", [picture(1)]),
    Request("Only text?"),
    Request("Two of them, or more than two?", [picture(2), picture(3, 30, 90)]),
    Request(messages=(user("A?", [picture(5)]), assistant("B."), user("C?"))),
]


class TestGeneration:
    def test_of_a_batch_equals_one_by_one(self, tiny):
        together = tiny.answer_all(REQUESTS, batch_size=4, max_new_tokens=12)
        alone = [tiny.answer_all([r], max_new_tokens=12)[0] for r in REQUESTS]
        assert together == alone
        assert len(set(together)) > 1

    def test_uses_the_pixels_when_the_first_step_gets_an_empty_cache(self, tiny):
        inputs = tiny.model.prepare_inputs_for_generation(
            torch.ones(1, 4, dtype=torch.long),
            past_key_values=DynamicCache(config=tiny.model.config.get_text_config()),
            pixel_values=torch.ones(1),
            attention_mask=torch.ones(1, 4, dtype=torch.long),
        )
        assert inputs["pixel_values"] is not None

    @pytest.mark.parametrize(
        "options",
        [
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"cache_implementation": "offloaded"},
        ],
        ids=["no cache", "static", "offloaded"],
    )
    def test_does_not_depend_on_the_cache(self, tiny, options):
        if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
            pytest.skip("an offloaded cache needs an accelerator")
        inputs = generation_inputs(tiny, REQUESTS[2])
        plain = tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        other = tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
        assert other.tolist() == plain.tolist()

    def test_with_beams_sees_the_right_images_in_every_row(self, tiny):
        one = generation_inputs(tiny, REQUESTS[2])
        beams = tiny.model.generate(**one, max_new_tokens=6, num_beams=3, do_sample=False)
        both = generation_inputs(tiny, REQUESTS[2], REQUESTS[0])
        together = tiny.model.generate(**both, max_new_tokens=6, num_beams=3, do_sample=False)
        assert together[0, -6:].tolist() == beams[0, -6:].tolist()

    def test_samples_repeatably_with_a_seed(self, tiny):
        ask = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
        assert tiny.answer("What?", [picture(1)], **ask) == tiny.answer(
            "What?", [picture(1)], **ask
        )

    def test_streams_what_it_would_answer_at_once(self, tiny):
        chat = tiny.chat(max_new_tokens=10)
        pieces = list(chat.ask("What is it?", [picture(1)], stream=True))
        assert "".join(pieces).strip() == tiny.answer(
            "What is it?", [picture(1)], max_new_tokens=10
        )
        assert [m.role for m in chat.messages] == ["user", "assistant"]

    def test_stops_when_nobody_listens(self, tiny):
        pieces = tiny.chat(max_new_tokens=500).ask("Count.", stream=True)
        next(pieces)
        pieces.close()


def generation_inputs(tiny, *requests):
    from mmlm.generation.batch import model_inputs

    prompts = [
        tiny.processor.encode_chat(r.conversation(), add_generation_prompt=True) for r in requests
    ]
    return model_inputs(prompts, tiny.processor, tiny.model)


def test_casting_rounds_what_is_stored_and_nothing_else(tmp_path):
    model = compose_tiny(tmp_path).model.cast(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32


def test_every_parameter_has_a_part(tiny):
    parts = {
        MMLMForConditionalGeneration.part_of(name) for name, _ in tiny.model.named_parameters()
    }
    assert parts == {"vision", "connector", "language", "head"}
    assert MMLMForConditionalGeneration.part_of("base_model.model.model.vision.x") == "vision"


def test_saved_and_loaded_it_is_the_same(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    again = MMLMForConditionalGeneration.from_pretrained(tmp_path)
    batch = batch_of(tiny, CONVERSATIONS)
    torch.testing.assert_close(again(**batch).logits, tiny.model(**batch).logits, rtol=0, atol=0)
