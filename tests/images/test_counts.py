"""The number of tokens that is counted from a size is the number that comes out, for any size."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm import load
from mmlm.errors import AlignmentError
from mmlm.features import Size, VisionFeatures
from mmlm.generation import Request
from mmlm.messages import user
from mmlm.modeling.pictures import arrange, encode_numbers
from tests import tiny

POLICIES = [
    {"use": "squash"},
    {"use": "tiles", "rule": "anyres"},
    {"use": "tiles", "rule": "anyres", "layout": "newline"},
    {"use": "tiles", "rule": "anyres", "layout": "plain", "thumbnail": "none"},
    {"use": "tiles", "rule": "ratio"},
    {"use": "tiles", "rule": "ratio", "layout": "newline", "thumbnail": "first"},
    {"use": "tiles", "rule": "area", "max_tiles": 6},
    {"use": "tiles", "rule": "longest"},
    {"use": "tiles", "rule": "longest", "longest_tiles": 2, "thumbnail": "first"},
    {"use": "native"},
    {"use": "native", "rule": "fit", "max_tokens": 64, "layout": "row_ends"},
    {"use": "native", "rule": "long_side", "long_side_px": 256, "layout": "framed"},
]
SIDES = st.one_of(st.integers(1, 64), st.integers(1, 3000), st.integers(1, 65_535))
PIXELS = [(1, 1), (1, 300), (300, 1), (33, 47), (64, 32), (211, 97)]


def name(words: dict) -> str:
    return "-".join(str(value) for value in words.values())


@functools.cache
def made(words: tuple):
    folder = Path(tempfile.mkdtemp())
    return tiny.compose_tiny(
        folder, "patches", image=dict(words), connector={"use": "mlp", "depth": 1}
    )


@pytest.mark.parametrize("words", POLICIES, ids=name)
class TestEveryPolicy:
    @pytest.fixture
    def assistant(self, words):
        return made(tuple(words.items()))

    @settings(max_examples=200, deadline=None)
    @given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3))
    def test_as_many_tokens_are_put_in_order_as_were_counted(self, words, sizes):
        assistant = made(tuple(words.items()))
        counter = assistant.model.model.counter
        sizes = [Size(*size) for size in sizes]
        tiles = [tile for size in sizes for tile in counter.plan(size).tiles]
        grids = tuple(counter.grid_of_tile(tile.size) for tile in tiles)
        values = torch.zeros(sum(grid.num_tokens for grid in grids), 32)
        features = VisionFeatures(values, grids)
        if assistant.model.model.marks is not None:
            features = arrange(features, counter, sizes, assistant.model.model.marks)
        assert features.values.shape[0] == sum(counter.count(size) for size in sizes)

    def test_pictures_go_through_processor_and_model(self, assistant):
        pictures = [tiny.picture(seed, *size) for seed, size in enumerate(PIXELS)]
        looks = assistant.processor.image_processor
        counts = [assistant.processor.count_tokens(picture) for picture in pictures]
        seen = looks.together([looks.look(picture) for picture in pictures])
        with torch.no_grad():
            together = assistant.model.get_image_features(**seen).values
            alone = [
                assistant.model.get_image_features(**looks.together([looks.look(each)])).values
                for each in pictures
            ]
        assert [each.shape[0] for each in alone] == counts
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [1, 7, 10], ids=lambda number: name(POLICIES[number]))
class TestEndToEnd:
    def test_it_answers_learns_and_comes_back(self, number, tmp_path):
        torch.manual_seed(0)
        assistant = tiny.compose_tiny(tmp_path, "patches", image=POLICIES[number])
        pictures = [tiny.picture(1, 40, 90), tiny.picture(2, 31, 33)]
        words = assistant.answer("What?", images=pictures, max_new_tokens=5)
        requests = [Request("What?", pictures), Request("Who?", pictures[:1])]
        assert assistant.answer_all(requests, max_new_tokens=5)[0] == words
        chat = assistant.chat(max_new_tokens=5)
        assert chat.ask("What?", images=pictures) == words

        encoded = assistant.processor.encode_chat(
            [user("What?", pictures)], add_generation_prompt=True
        )
        given = {
            "input_ids": torch.tensor([encoded.ids]),
            "pixel_values": encoded.pixel_values,
            **assistant.processor.image_processor.sizes(encoded.image_sizes),
        }
        model = assistant.model
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
        assert model.model.marks.weight.grad.abs().sum() > 0
        assert model.part_of("model.marks.weight") == "connector"
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with torch.no_grad():
            after = model(**given).logits
            assert model(**given, labels=given["input_ids"]).loss < loss
            assistant.save(tmp_path / "saved")
            back = load(tmp_path / "saved", device="cpu")
            torch.testing.assert_close(back.model(**given).logits, after, rtol=0, atol=0)
            beams = model.generate(**given, num_beams=2, max_new_tokens=4, do_sample=False)
        assert beams.shape[0] == 1


def test_pixels_of_other_pictures_than_the_sizes_are_an_error():
    assistant = made(tuple(POLICIES[9].items()))
    counter = assistant.model.model.counter
    with pytest.raises(AlignmentError, match="image_sizes"):
        encode_numbers(assistant.model.model.vision, torch.zeros(10), counter, [Size(64, 64)])
