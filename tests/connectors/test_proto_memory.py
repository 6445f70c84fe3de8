"""`proto_memory` reads past samples, and through their prototypes alone (PMA-Net)."""

from __future__ import annotations

import copy

import pytest
import torch

from mmlm.assistant import load
from mmlm.connectors import connectors
from mmlm.connectors.proto_memory import k_means, values_of
from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures
from tests.tiny import compose_tiny, picture

WIDTH, TEXT_WIDTH = 12, 8
WORDS = {
    "use": "proto_memory", "depth": 1, "width": 8, "heads": 2, "prototypes": 3, "bank": 12,
    "per_item": 2, "every": 2,
}  # fmt: skip


def build(**words):
    torch.manual_seed(0)
    config = connectors.read(WORDS | words, origin="connector")
    return config.build(vision_width=WIDTH, text_width=TEXT_WIDTH)


def pictures(count: int, seed: int = 0) -> VisionFeatures:
    grid = Grid(1, 3, 3)
    values = torch.randn(count * grid.num_tokens, WIDTH, generator=torch.manual_seed(seed))
    return VisionFeatures(values, (grid,) * count)


def learnt(connector, *batches, steps: int = 1):
    """Show batches to a connector as one optimiser step, several times."""
    for _ in range(steps):
        connector.before_step()
        with torch.enable_grad():
            for batch in batches:
                connector.train()(batch)
        connector.after_step()
    return connector.eval()


def memory_of(connector):
    return connector.layers[0].reading.memory


@torch.no_grad()
def test_attention_reads_the_picture_and_the_prototypes():
    connector = learnt(build(), pictures(4))
    reading, memory = connector.layers[0].reading, memory_of(connector)
    tokens = torch.randn(1, 5, 8)
    own = reading.attention
    keys = torch.cat([own.key(tokens)[0] + reading.present, memory.prototype_keys + reading.past])
    values = torch.cat([own.value(tokens)[0], memory.prototype_values])
    wanted = []
    for query in own.query(tokens)[0]:
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            weights = (keys[:, head] @ query[head] / 4**0.5).softmax(0)
            heads.append(weights @ values[:, head])
        wanted.append(own.out(torch.cat(heads)))
    torch.testing.assert_close(reading(tokens)[0], torch.stack(wanted), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_bank_changes_the_answer_through_prototypes_alone():
    connector = learnt(build(every=2), pictures(4))  # the first step finds prototypes
    given, memory = pictures(1, seed=5), memory_of(connector)
    before, found = connector(given).values, memory.prototype_keys.clone()
    learnt(connector, pictures(4, seed=1))  # the second does not: the bank alone has moved
    assert memory.seen == 16
    assert torch.equal(memory.prototype_keys, found)
    assert torch.equal(connector(given).values, before)
    learnt(connector, pictures(4, seed=2))
    assert not torch.equal(memory.prototype_keys, found)
    after = connector(given).values
    assert (after - before).abs().max() > 1e-6
    memory.prototype_keys.copy_(found)
    assert not torch.equal(connector(given).values, after)


def test_the_bank_slides():
    memory = memory_of(build())
    rows = torch.arange(20.0)[:, None].expand(-1, 8)
    memory.put(rows[:10], rows[:10])
    memory.put(rows[10:15], rows[10:15] + 100)
    assert memory.keys[:, 0].tolist() == [12, 13, 14, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert memory.values[:3, 0].tolist() == [112, 113, 114]
    memory.put(rows, rows)  # more than it holds: the last twelve
    assert sorted(memory.keys[:, 0].tolist()) == list(range(8, 20))


def test_k_means_finds_clusters_and_values_are_those_of_the_nearest_keys():
    torch.manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = torch.cat([middle + 0.1 * torch.randn(20, 2) for middle in middles])
    centres = k_means(points, 3, rounds=10)
    torch.testing.assert_close(centres, middles, rtol=0, atol=0.2)
    torch.testing.assert_close(centres[0], points[:20].mean(0), rtol=0, atol=1e-5)
    values = torch.arange(60.0)[:, None]
    for centre, value in zip(centres, values_of(centres, points, values, 2), strict=True):
        near = sorted((float((centre - point).norm()), at) for at, point in enumerate(points))[:2]
        weights = torch.tensor([-distance for distance, _ in near]).softmax(0)
        wanted = sum(float(w) * at for w, (_, at) in zip(weights, near, strict=True))
        assert value.item() == pytest.approx(wanted, abs=1e-2)


def test_answering_and_repeated_steps_leave_no_trace_and_micro_batches_change_nothing():
    whole, halves = build(), build()
    both = pictures(4)
    split = both.values.split(2 * 9)
    parts = [VisionFeatures(values, both.grids[:2]) for values in split]
    learnt(whole, both)
    halves.train()(parts[0])  # a step that ran out of memory
    learnt(halves, *parts)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(halves.state_dict()[name], value, rtol=0, atol=1e-6)
    state = copy.deepcopy(whole.state_dict())
    whole(both)
    with torch.no_grad():
        whole.train()(both)
    whole.after_step()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())


def test_the_bank_survives_saving_and_loading(tmp_path):
    made = compose_tiny(tmp_path, connector=WORDS)
    connector = made.model.model.connector
    given = made.processor.image_processor.preprocess([picture(seed) for seed in range(4)])
    connector.train()(made.model.model.encode_images(torch.as_tensor(given["pixel_values"])))
    connector.after_step()
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu").model.model.connector
    assert memory_of(back).seen == 8
    for name, value in connector.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_a_bank_that_holds_no_prototypes_is_refused():
    with pytest.raises(ConfigError, match="bank 2 is smaller than prototypes 3"):
        build(bank=2)
