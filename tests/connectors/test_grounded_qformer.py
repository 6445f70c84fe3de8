"""`grounded_qformer` is a Q-Former between layers of the language model (LG-QFormer)."""

from __future__ import annotations

import pytest
import torch

from mmlm.connectors import Seen, connectors
from mmlm.features import Grid, VisionFeatures
from mmlm.messages import ImagePart, Message, Text, user
from tests.tiny import compose_tiny, picture

WORDS = {
    "use": "grounded_qformer", "tokens": 3, "depth": 2, "width": 16, "heads": 2, "mlp_width": 32,
}  # fmt: skip


def encoded(made, *parts):
    return made.processor.encode_chat([user(*parts)], add_generation_prompt=True)


@torch.no_grad()
def test_the_queries_begin_as_hidden_states_and_end_as_such():
    torch.manual_seed(0)
    config = connectors.read(WORDS, origin="connector")
    connector = config.build(vision_width=12, text_width=8).eval()
    grids = (Grid(1, 2, 2), Grid(1, 3, 1))
    given = VisionFeatures(torch.randn(7, 12), grids)
    out = connector(given)
    assert torch.equal(out.values, connector.marks.repeat(2, 1))
    hidden, slots = torch.randn(1, 10, 8), torch.zeros(1, 10, dtype=torch.bool)
    slots[0, [1, 2, 3, 6, 7, 8]] = True
    written = connector.inject(0, hidden, Seen(out, slots, slots.long(), 0))
    assert torch.equal(written[~slots], hidden[~slots])
    for item, places in zip(given.items(), ([1, 2, 3], [6, 7, 8]), strict=True):
        state = hidden[0, places]
        mean, spread = state.mean(1, keepdim=True), state.var(1, unbiased=False, keepdim=True)
        state = connector.enter((state - mean) / (spread + 1e-5) ** 0.5)
        queries = connector.norm(connector.queries + state)[None]
        for layer in connector.layers:
            queries = layer(queries, item[None])
        torch.testing.assert_close(
            written[0, places], connector.project(queries)[0], rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_the_words_before_a_picture_change_what_is_read_from_it_and_those_behind_do_not(tmp_path):
    made = compose_tiny(tmp_path, connector=WORDS)
    inner = made.model.model
    assert inner.connector.places(2) == (1,)
    written = []
    inject = inner.connector.inject

    def listen(index, hidden, seen):
        out = inject(index, hidden, seen)
        written.append(out[seen.slots])
        return out

    inner.connector.inject = listen
    shown = ImagePart(picture(1))
    for before, behind in (("red", "one"), ("red", "two"), ("blue", "one")):
        words = (Text(before), shown, Text(behind))
        prompt = made.processor.encode_chat([Message("user", words)], add_generation_prompt=True)
        made.model(input_ids=torch.tensor([prompt.ids]), pixel_values=prompt.pixel_values)
    first, behind, before = written
    torch.testing.assert_close(first, behind, rtol=0, atol=1e-6)
    assert (first - before).abs().max() > 1e-4


@torch.no_grad()
def test_nothing_of_the_picture_is_known_below_its_place(tmp_path):
    made = compose_tiny(tmp_path, connector=WORDS)
    states = []
    for seed in (1, 2):
        prompt = encoded(made, "What?", [picture(seed)])
        out = made.model(
            input_ids=torch.tensor([prompt.ids]), pixel_values=prompt.pixel_values,
            output_hidden_states=True,
        )  # fmt: skip
        states.append(out.hidden_states)
    torch.testing.assert_close(states[0][0], states[1][0], rtol=0, atol=0)
    assert (states[0][-1] - states[1][-1]).abs().max() > 1e-4


def test_a_place_beyond_the_language_model_is_refused(tmp_path):
    from mmlm.errors import ConfigError

    with pytest.raises(ConfigError, match="writes before layer 7"):
        compose_tiny(tmp_path, connector=WORDS | {"place": 7})
