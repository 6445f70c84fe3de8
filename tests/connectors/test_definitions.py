"""The connectors that no stock class computes, against their definitions written as loops."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from mmlm.assistant import load
from mmlm.connectors import Seen, connectors
from mmlm.connectors.attention import Attention, mimetic_
from mmlm.errors import AlignmentError, ConfigError
from mmlm.features import Grid, VisionFeatures
from mmlm.reducers import reducers
from tests.tiny import compose_tiny, picture, save_language

WIDTH, TEXT_WIDTH = 12, 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(**words):
    config = connectors.read(words, origin="connector")
    return config.build(vision_width=WIDTH, text_width=TEXT_WIDTH).eval()


def one(grid: Grid, layers: int = 0) -> VisionFeatures:
    maps = [VisionFeatures(torch.randn(grid.num_tokens, WIDTH), (grid,)) for _ in range(layers)]
    return VisionFeatures(torch.randn(grid.num_tokens, WIDTH), (grid,), layers=tuple(maps))


def close(got, wanted):
    # Sums of at most 50 products of numbers near one, added in another order.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [Grid(1, 4, 6), Grid(1, 5, 7)], ids=["even", "odd"])
def test_token_packer_reads_the_square_of_each_coarse_token(grid):
    connector = build(use="token_packer", width=6, heads=1, layers=2)
    given = one(grid, layers=2)
    stacked = torch.cat([layer.values for layer in given.layers], 1).reshape(*grid[1:], -1)
    dense = given.values.reshape(*grid[1:], WIDTH)
    coarse = functional.interpolate(
        dense.movedim(-1, 0)[None], (math.ceil(grid.rows / 2), math.ceil(grid.columns / 2)),
        mode="bilinear",
    )[0].movedim(0, -1)  # fmt: skip
    weight, bias = connector.attention.in_proj_weight, connector.attention.in_proj_bias
    to_query, to_key, to_value = zip(weight.chunk(3), bias.chunk(3), strict=True)
    wanted = []
    for row in range(coarse.shape[0]):
        for column in range(coarse.shape[1]):
            square = stacked[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(0, 1)
            query = connector.query_norm(connector.query(coarse[row, column]))
            query = functional.linear(query, *to_query)
            keys = functional.linear(connector.key_norm(connector.key(square)), *to_key)
            values = functional.linear(connector.value_norm(connector.value(square)), *to_value)
            weights = (keys @ query / 6**0.5).softmax(0)
            wanted.append(connector.project(connector.attention.out_proj(weights @ values)))
    close(connector(given).values, torch.stack(wanted))


def test_a_coarse_token_does_not_see_beyond_its_square():
    connector = build(use="token_packer", width=6, heads=2)
    given = one(Grid(1, 4, 4))
    changed = given.values.clone()
    changed[0] += 1.0  # in the first square alone
    before, after = (connector(each).values for each in (given, given.with_values(changed)))
    moved = (before != after).any(1).tolist()
    assert moved == [True, False, False, False]


def test_semantic_tokens_are_weighted_means_of_the_places():
    connector = build(use="semantic_tokens", tokens=3, rounds=1)
    given = one(Grid(1, 2, 5))
    places = connector.norm(given.values)
    tokens = []
    for column in range(3):
        scores = torch.stack([place @ connector.filters.weight[column] for place in places])
        weights = scores.exp() / scores.exp().sum()
        parts = [w * connector.value(p) for w, p in zip(weights, places, strict=True)]
        tokens.append(torch.stack(parts).sum(0))
    mixed = connector.transformers[0](torch.stack(tokens)[None])[0]
    close(connector(given).values, connector.project(connector.out_norm(mixed)))


def test_semantic_tokens_do_not_depend_on_the_order_of_places():
    connector = build(use="semantic_tokens", tokens=3)
    given = one(Grid(1, 3, 4))
    shuffled = given.with_values(given.values[torch.randperm(12)])
    close(connector(shuffled).values, connector(given).values)


def test_ldpv2_pools_and_adds_its_neighbours():
    connector = build(use="ldpv2", rows=2, columns=2)
    given = one(Grid(1, 4, 4))
    projected = connector.mlp(given.values).reshape(4, 4, TEXT_WIDTH)
    pooled = torch.stack(
        [
            torch.stack([projected[r : r + 2, c : c + 2].mean((0, 1)) for c in (0, 2)])
            for r in (0, 2)
        ]
    )
    kernel = connector.places.weight[:, 0]  # (width, 3, 3)
    wanted = []
    for row in range(2):
        for column in range(2):
            total = pooled[row, column] + connector.places.bias
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < 2 and 0 <= column + right < 2:
                        near = pooled[row + down, column + right]
                        total = total + kernel[:, down + 1, right + 1] * near
            wanted.append(total)
    close(connector(given).values, torch.stack(wanted))


def test_qladder_keeps_the_features_and_appends_its_queries():
    connector = build(use="qladder", queries=3, heads=2, layers=2)
    given = one(Grid(1, 2, 3), layers=2)
    out = connector(given)
    close(out.values[:6], connector.project(given.values))
    queries = connector.queries[None]
    for rung, layer in zip(connector.rungs, given.layers, strict=True):
        queries = rung(queries, layer.values[None])
    close(out.values[6:], connector.project(queries[0]))


@pytest.mark.parametrize(
    "words",
    [
        {"use": "qladder", "queries": 3, "heads": 2, "layers": 2},
        {"use": "token_packer", "width": 6, "heads": 2, "layers": 2},
        {"use": "reassemble", "factors": [1, 1], "width": 4},
    ],
    ids=lambda words: words["use"],
)
def test_a_missing_layer_is_an_error_and_no_guess(words):
    for layers in (0, 1, 3):
        with pytest.raises(AlignmentError, match=rf"reads 2 layers .* gave {layers}"):
            build(**words)(one(Grid(1, 4, 4), layers=layers))


def test_a_grid_smaller_than_the_pool_keeps_its_own():
    for name in ("ldpv2", "c_abstractor"):
        config = connectors.read({"use": name}, origin="connector")
        assert config.out_grid(Grid(2, 5, 24)) == (2, 5, 12)


def test_a_blanked_tail_is_blank_and_the_head_is_untouched():
    connector = build(use="ordered_queries", tokens=6, heads=2, tail_drop=1.0)
    given = VisionFeatures(torch.randn(40 * 4, WIDTH), (Grid(1, 2, 2),) * 40)
    whole = connector(given).values.reshape(40, 6, -1)
    blanked = connector.train()(given).values.reshape(40, 6, -1)
    tail = (blanked == connector.blank).all(-1)
    kept = (~tail).sum(1)
    assert set(kept.tolist()) == {1, 2, 3, 4, 5, 6}
    assert all(row.tolist() == sorted(row.tolist()) for row in tail)  # only ever the tail
    torch.testing.assert_close(blanked[~tail], whole[~tail], rtol=0, atol=0)


def test_mimetic_products_are_identities_beside_noise():
    width, heads = 32, 4
    attention = Attention(width, width, heads=heads)
    mimetic_(attention, noise=(0.0, 0.0))
    query, key = (each.weight.reshape(heads, 8, width) for each in (attention.query, attention.key))
    for head in range(heads):
        # Of a head's rank: the product is a projection, scaled by the factor of the identity.
        product = query[head].T @ key[head] / 0.7
        close(product @ product, product)
        assert float(product.detach().trace()) == pytest.approx(8, abs=1e-4)
    close(attention.out.weight @ attention.value.weight, -0.4 * torch.eye(width))


def test_mimetic_queries_find_their_own_place():
    torch.manual_seed(3)
    tokens = torch.randn(1, 10, 64)
    share = {}
    for kind in ("normal", "mimetic"):
        connector = connectors.read(
            {"use": "ordered_queries", "tokens": 10, "depth": 1, "heads": 2, "init": kind},
            origin="connector",
        ).build(vision_width=WIDTH, text_width=64)
        attention = connector.layers[0].attention
        scores = attention.query(tokens)[..., :32] @ attention.key(tokens)[..., :32].mT / 32**0.5
        share[kind] = float(scores.softmax(-1).diagonal(dim1=1, dim2=2).mean().detach())
    assert share["normal"] < 0.2  # about one in ten
    assert share["mimetic"] > 0.5


def test_settings_that_cannot_work_are_refused():
    for words, complaint in [
        ({"use": "perceiver", "heads": 4, "key_heads": 3}, "does not divide heads 4"),
        ({"use": "perceiver", "init": "mimetic"}, "set key_heads to 16"),
        ({"use": "qformer", "width": 10, "heads": 3}, "does not divide the width 10"),
        ({"use": "norm_mlp", "depth": 2, "hidden_widths": [3, 4]}, "leave depth out"),
        ({"use": "norm_mlp", "norms": 3}, "exceeds the 2 layers"),
        ({"use": "reassemble", "factors": [3.5]}, r"0.5, 0.25, …; got 3.5"),
        ({"use": "reassemble", "factors": [1, 2], "widths": [4]}, "1 widths do not fit 2 factors"),
        ({"use": "ordered_queries", "tokens": 4, "least": 5}, "exceeds the 4 tokens"),
        ({"use": "gated_mlp", "activation": "swish"}, "no such activation"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            connectors.read(words, origin="connector")
    with pytest.raises(ConfigError, match="does not divide the width of the encoder, 12"):
        build(use="qladder", heads=5)


def test_average_pool_divides_an_odd_border_by_what_it_holds():
    config = reducers.read({"use": "average_pool", "frames": 2}, origin="reducer")
    given = one(Grid(3, 3, 5))
    dense = given.values.reshape(3, 3, 5, WIDTH)
    wanted = [
        dense[f : f + 2, r : r + 2, c : c + 2].reshape(-1, WIDTH).mean(0)
        for f in (0, 2)
        for r in (0, 2)
        for c in (0, 2, 4)
    ]
    close(config.build(width=WIDTH)(given).values, torch.stack(wanted))
    assert config.out_grid(Grid(3, 3, 5)) == (2, 2, 3)


def test_interpolating_an_even_grid_to_half_is_the_mean_of_four():
    given = one(Grid(2, 4, 6))
    half = reducers.read({"use": "interpolate"}, origin="r").build(width=WIDTH)
    mean = reducers.read({"use": "average_pool"}, origin="r").build(width=WIDTH)
    close(half(given).values, mean(given).values)


def test_pool_shortens_a_clip():
    config = reducers.read({"use": "pool", "rows": 2, "columns": 2, "frames": 2}, origin="r")
    given = one(Grid(4, 4, 4))
    wanted = given.values.reshape(2, 2, 2, 2, 2, 2, WIDTH).mean((1, 3, 5)).reshape(8, WIDTH)
    close(config.build(width=WIDTH)(given).values, wanted)
    assert config.out_grid(Grid(1, 4, 4)) == (1, 2, 2)


def loud(connector):
    """Give a connector weights with which every part of it shows in what comes out."""
    for weight in connector.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return connector


def attended(layer: Attention, query: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """One head of attention for one query, written out."""
    keys, values = layer.key(context), layer.value(context)
    weights = (keys @ layer.query(query) / keys.shape[-1] ** 0.5).softmax(0)
    return layer.out(weights @ values)


def test_a_bridge_norms_the_sum_at_placeholders_and_leaves_words_alone():
    connector = build(use="bridge", layers=2)
    given = one(Grid(1, 1, 3), layers=2)
    out = connector(given)
    hidden = torch.randn(1, 5, TEXT_WIDTH)
    slots = torch.tensor([[False, True, True, True, False]])
    seen = Seen(out, slots, torch.zeros_like(slots, dtype=torch.long), 0)
    for index in range(2):
        linear, norm = connector.stack[index].last_linear(), connector.norms[index]
        got = connector.inject(index, hidden, seen)
        assert torch.equal(got[0, [0, 4]], hidden[0, [0, 4]])
        for place in range(3):
            total = hidden[0, 1 + place] + linear(given.layers[index].values[place])
            close(got[0, 1 + place], norm(total))
    nothing = Seen(None, slots, torch.zeros_like(slots, dtype=torch.long), 5)
    assert torch.equal(connector.inject(0, hidden, nothing), hidden)  # a later step of an answer


def test_xformer_lets_details_read_queries_and_queries_read_details():
    words = {"use": "xformer", "tokens": 2, "depth": 1, "width": 6, "heads": 1, "mlp_width": 9}
    connector, given = loud(build(**words)), one(Grid(1, 2, 3), layers=2)
    turn, details = connector.rounds[0], given.layers[1].values
    queries = connector.after_layers(given.layers[0].values[None])[0]
    told = [turn.telling_norm(attended(turn.telling, each, queries) + each) for each in details]
    wanted = []
    for query in queries:
        read = turn.reading_norm(attended(turn.reading, query, torch.stack(told)) + query)
        wanted.append(connector.project(turn.mlp_norm(turn.mlp(read) + read)))
    close(connector(given).values, torch.stack(wanted))


def test_the_queries_of_xformer_read_both_encoders_and_not_the_features():
    words = {"use": "xformer", "tokens": 2, "depth": 1, "width": 6, "heads": 1, "mlp_width": 9}
    connector, given = loud(build(**words)), one(Grid(1, 2, 3), layers=2)
    before = connector(given).values
    for changed in range(2):
        layers = list(given.layers)
        layers[changed] = layers[changed].with_values(layers[changed].values + torch.randn(WIDTH))
        after = connector(VisionFeatures(given.values, given.grids, layers=tuple(layers))).values
        assert (after - before).abs().max() > 1e-3
    elsewhere = VisionFeatures(given.values + 1, given.grids, layers=given.layers)
    assert torch.equal(connector(elsewhere).values, before)


def test_temporal_align_is_its_definition():
    connector = loud(build(use="temporal_align", width=6, heads=1))
    given, (layer,) = one(Grid(3, 1, 2)), connector.layers
    frames = connector.enter(given.values).unflatten(0, (3, 2))
    present, earlier = frames[2], []
    for frame in frames[:2]:
        for place in range(2):
            alike = functional.cosine_similarity(frame[place], present[place], dim=0)
            earlier.append(frame[place] + alike * connector.alike)
    normed = layer.attention_norm(present)
    mixed = present + torch.stack([attended(layer.attention, each, normed) for each in normed])
    past = layer.earlier_norm(torch.stack(earlier))
    read = [attended(layer.reading, each, past) for each in layer.reading_norm(mixed)]
    read = mixed + torch.stack(read)
    close(connector(given).values, connector.project(read + layer.mlp(layer.mlp_norm(read))))


def test_a_missing_earlier_picture_is_the_present_one():
    connector = loud(build(use="temporal_align", width=6, heads=2))
    alone = one(Grid(1, 2, 3))
    twice = VisionFeatures(alone.values.repeat(2, 1), (Grid(2, 2, 3),))
    other = VisionFeatures(torch.cat([alone.values + 1, alone.values]), (Grid(2, 2, 3),))
    close(connector(twice).values, connector(alone).values)
    assert (connector(other).values - connector(alone).values).abs().max() > 1e-3
    assert connector(twice).grids == (Grid(1, 2, 3),)


def test_a_frozen_block_is_the_layer_of_a_language_model_without_mask_and_places(tmp_path):
    folder = save_language(tmp_path / "llama")
    connector = build(use="frozen_block", checkpoint=str(folder), layer=0)
    language = AutoModelForCausalLM.from_pretrained(folder).model.eval()
    given = one(Grid(1, 2, 3))
    tokens = connector.enter(given.values)[None]
    still = torch.ones(1, 6, 8), torch.zeros(1, 6, 8)  # the cosines and sines of no rotation
    layer = language.layers[0](tokens, position_embeddings=still, attention_mask=None)
    # The stock layer without a mask is causal: the last feature alone sees all there.
    layer = layer if isinstance(layer, torch.Tensor) else layer[0]
    whole = connector.project(connector.leave(layer))
    close(connector(given).values[-1], whole[0, -1])
    order = torch.tensor([5, 1, 0, 2, 4, 3])
    moved = VisionFeatures(given.values[order], given.grids)
    close(connector(moved).values, connector(given).values[order])


def test_a_frozen_block_comes_from_its_checkpoint_and_is_not_learnt(tmp_path):
    words = {"use": "frozen_block", "checkpoint": str(save_language(tmp_path / "block", seed=5))}
    made = compose_tiny(tmp_path, connector=words)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "block").model.layers[-1].state_dict()
    made.save(tmp_path / "model")
    shutil.rmtree(tmp_path / "block")  # a saved model needs it no more
    again = load(tmp_path / "model", device="cpu")
    for each in (made, again):
        connector = each.model.model.connector
        assert not [n for n, _ in connector.named_parameters() if n.startswith("block.")]
        held = connector.block.layers[0].state_dict()
        assert all(torch.equal(held[name], value) for name, value in wanted.items())
    question = ("What is it?", [picture(3)])
    assert again.answer(*question, max_new_tokens=6) == made.answer(*question, max_new_tokens=6)
    assert str(tmp_path) not in (tmp_path / "model/config.json").read_text()


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has 2 layers"):
        build(use="frozen_block", checkpoint=str(save_language(tmp_path)), layer=7)
