"""The objective `word_match`: image tokens point to the words of their answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmlm.data.collate import collate_packed, collate_padded
from mmlm.data.planning import Planned
from mmlm.errors import ConfigError
from mmlm.messages import assistant, user
from mmlm.training.word_match import WordMatchConfig
from tests.tiny import compose_tiny, picture


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = compose_tiny(tmp_path_factory.mktemp("tiny"))
    made.model.get_input_embeddings().weight.requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def rows(tiny):
    """Three samples: two with a picture, one of text alone."""
    conversations = [
        [user("What?", [picture(1)]), assistant("a cat")],
        [user("Hello."), assistant("Good day.")],
        [user("What?", [picture(2)]), assistant("dog")],
    ]
    made = [tiny.processor.encode_chat(c, with_labels=True) for c in conversations]
    planned = [
        Planned(n, "", n, str(n), np.array(e.ids), np.array(e.labels),
                () if e.pixel_values is None else ("picture",), 1)
        for n, e in enumerate(made)
    ]  # fmt: skip
    pixels = torch.cat([e.pixel_values for e in made if e.pixel_values is not None])
    return planned, pixels


def objective(anchor=1.0):
    return WordMatchConfig(anchor=anchor).build(loss_weight="token")


def by_hand(tiny, rows, anchor, temperature=0.05):
    """The definition, written as loops over the pictures."""
    planned, pixels = rows
    table = tiny.model.get_input_embeddings().weight.float()
    centred = table - table.mean(0)
    total, number = torch.zeros(()), 0
    for sample in planned:
        if not sample.images:
            continue
        image = tiny.model.get_image_features(pixels[number : number + 1]).values.mean(0)
        number += 1
        pieces = [int(label) for label in sample.labels if label != -100][:-1]
        alike = torch.cosine_similarity((image - table.mean(0))[None], centred) / temperature
        total -= torch.stack([alike.log_softmax(0)[piece] for piece in pieces]).mean()
        gap = image - torch.stack([table[piece] for piece in pieces]).mean(0)
        total += anchor * (gap**2).sum() / (centred**2).sum(1).mean()
    return total / number


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_it_is_what_its_definition_says_packed_and_padded(tiny, rows, anchor):
    planned, pixels = rows
    wanted = by_hand(tiny, rows, anchor)
    factors, count = objective().weigh(planned)
    assert factors is None
    assert count == 2
    for batch in (collate_packed(planned), collate_padded(planned, pad_id=0)):
        got = objective(anchor).loss(tiny.model, {**batch, "pixel_values": pixels}, count)
        # The same sums in another order: largest difference seen 2e-6, a lost piece gives > 0.1.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_its_gradient_reaches_the_connector_and_not_the_language_model(tiny, rows):
    planned, pixels = rows
    batch = {**collate_packed(planned), "pixel_values": pixels}
    tiny.model.zero_grad()
    objective().loss(tiny.model, batch, 2).backward()
    moved = {tiny.model.part_of(n) for n, p in tiny.model.named_parameters() if p.grad is not None}
    assert "connector" in moved
    assert "language" not in moved
    assert "head" not in moved


def test_an_embedding_that_learns_is_refused_with_the_mend(tmp_path, rows):
    planned, pixels = rows
    other = compose_tiny(tmp_path)
    with pytest.raises(ConfigError, match=r"learn: \[connector"):
        objective().loss(other.model, {**collate_packed(planned), "pixel_values": pixels}, 2)


def test_rows_without_a_picture_count_nothing(tiny, rows):
    text = [sample for sample in rows[0] if not sample.images]
    assert objective().weigh(text)[1] == 0
    assert float(objective().loss(tiny.model, collate_packed(text), 1.0)) == 0.0
