"""What every connector promises. A new one is tested as soon as it is registered.

`TINY` holds words for those whose defaults are too large for a test, or that have more than one
form; a connector that is not named there is tested with its defaults.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mmlm.connectors import Conditioning, Injecting, Picture, Seen, connectors
from mmlm.connectors.question import words_of
from mmlm.features import Grid, VisionFeatures

VISION_WIDTH, TEXT_WIDTH = 12, 16
RAGGED = (Grid(1, 4, 4), Grid(1, 3, 5), Grid(2, 2, 2), Grid(1, 1, 7), Grid(1, 4, 4))

BLOCK = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TINY = {
    "bridge": [{"layers": 2}],
    "c_abstractor": [{"rows": 2, "columns": 3, "depth": 1, "width": 8, "positions": 4}],
    "cross_attention": [
        {"blocks": 1, "tokens": 3, "heads": 4},
        {"blocks": 2, "interval": 1, "tokens": None, "heads": 4, "latest": False},
    ],
    "deepstack": [{"layers": 2, "depth": 1}],
    "dual_projector": [
        {"sentence_width": 6, "width": 8},
        {"sentence_width": 6, "width": 8, "depth": 3, "hidden_width": 9, "cls": True},
    ],
    "ep_alm": [{"layers": 2}, {"layers": 1, "shared": False}],
    "fiber": [
        {"blocks": 1, "tokens": 3, "heads": 4, "encoder_blocks": 2, "encoder_heads": 2}
        | {"reader_heads": 2},
    ],
    "frozen_block": [{"block": BLOCK}],
    "gated_mlp": [
        {},
        {"hidden_width": 10, "activation": "gelu", "bias": True},
        {"norm": True},
    ],
    "grounded_qformer": [
        {"tokens": 3, "depth": 2, "width": 8, "heads": 2, "mlp_width": 16},
        {"tokens": 2, "depth": 1, "width": 8, "heads": 2, "mlp_width": 16, "place": 1},
    ],
    "language_conditioned": [
        {"encoder_blocks": 2, "adapter_width": 8, "heads": 2, "reader_heads": 2},
    ],
    "ldpv2": [{"rows": 3, "columns": 3}],
    "level_merge": [{}, {"groups": [3]}, {"groups": [2, 1, 2]}],
    "mlp": [{}, {"depth": 1}, {"depth": 4, "activation": "gelu_pytorch_tanh", "bias": False}],
    "mov_adapter": [
        {"layers": 2, "depth": 2, "heads": 3, "rows": 3, "columns": 2, "reader_heads": 2},
        {"layers": 2, "widths": [12, 12], "depth": 1, "heads": 1, "reader_heads": 2},
    ],
    "norm_mlp": [
        {},
        {"depth": 1, "norm": "rms"},
        {"hidden_widths": [10, 14], "norms": 2},
        {"norms": 0, "bias": False},
    ],
    "ordered_queries": [
        {"tokens": 5, "heads": 2, "tail_drop": 0.9},
        {"tokens": 5, "heads": 2, "tail_drop": 0.0},
    ],
    "patch_merger": [{}, {"factor": 3, "bias": True, "eps": 1e-3}],
    "perceiver": [
        {"tokens": 3, "depth": 2, "heads": 4, "head_width": 6, "key_heads": 2},
        {"tokens": 3, "depth": 1, "heads": 2, "head_width": 8, "key_heads": 2, "init": "mimetic"},
    ],
    "proto_memory": [
        {"depth": 2, "width": 8, "heads": 2, "prototypes": 3, "bank": 12, "per_item": 2},
    ],
    "qformer": [
        {"tokens": 3, "depth": 3, "width": 8, "heads": 2, "mlp_width": 16},
        {"tokens": 3, "depth": 1, "width": 8, "heads": 2, "mlp_width": 16, "init": "mimetic"},
    ],
    "qladder": [{"queries": 3, "heads": 2}, {"queries": 3, "heads": 2, "layers": 2}],
    "reassemble": [
        {"layer_width": 6, "width": 8, "rows": 2, "columns": 2},
        {"factors": [2, 1, 0.5], "widths": [4, 6, 8], "width": 8, "rows": 3, "columns": 3},
    ],
    "semantic_tokens": [{"tokens": 3}, {"tokens": 3, "rounds": 1, "width": 10}],
    "temporal_align": [{"width": 8, "heads": 2}],
    "text_memory": [
        {"depth": 2, "heads": 2, "reader_heads": 2},
        {"depth": 2, "heads": 2, "width": 8, "keep": 1.0, "reader_depth": 0, "drop_after": 1},
    ],
    "token_packer": [
        {"width": 8, "heads": 2},
        {"width": 8, "heads": 2, "layers": 2, "factor": 3},
    ],
    "xformer": [
        {"tokens": 3, "depth": 1, "width": 8, "heads": 2, "mlp_width": 16, "rounds": 2},
    ],
}
CASES = [{"use": name, **words} for name in connectors for words in TINY.get(name, [{}])]


def name_of(words: dict) -> str:
    return json.dumps(words)[8:-1].replace('"', "")


def features(grids=RAGGED, layers: int = 0, dtype: torch.dtype = torch.float32) -> VisionFeatures:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(grid.num_tokens for grid in grids)
    maps = [
        VisionFeatures(torch.randn(tokens, VISION_WIDTH, generator=generator).to(dtype), grids)
        for _ in range(layers + 1)
    ]
    asked = [torch.randn(n, TEXT_WIDTH, generator=generator).to(dtype) for n in (3, 1, 0, 4, 2)]
    return VisionFeatures(maps[0].values, grids, layers=tuple(maps[1:]), words=tuple(asked))


def item_of(whole: VisionFeatures, index: int) -> VisionFeatures:
    """Return one item of a batch, with its layers."""
    layers = tuple(item_of(layer, index) for layer in whole.layers)
    words = None if whole.words is None else (whole.words[index],)
    return VisionFeatures(whole.items()[index], (whole.grids[index],), layers=layers, words=words)


def everything(connector, given: VisionFeatures) -> torch.Tensor:
    """Return a number that depends on all that a connector gives and writes between layers."""
    out = connector(given)
    total = out.values.square().sum()
    if isinstance(connector, Conditioning):
        tokens = torch.randn(len(given.grids), 4, VISION_WIDTH)
        words = words_of(given, connector.reader)
        for index in range(len(connector.places_in_encoder(12))):
            total = total + connector.condition(index, tokens, words).square().sum()
    if isinstance(connector, Injecting):
        slots = torch.ones(1, len(out.values), dtype=torch.bool)
        rows = [[Picture(at, 0, values) for at, values in enumerate(connector.kept(out))]]
        seen = Seen(out, slots, torch.zeros_like(slots, dtype=torch.long), 0, rows)
        hidden = torch.randn(1, len(out.values), TEXT_WIDTH)
        for index in range(len(connector.places(64))):
            total = total + connector.inject(index, hidden, seen).square().sum()
    return total


@pytest.mark.parametrize("words", CASES, ids=name_of)
class TestEveryConnector:
    @pytest.fixture
    def config(self, words):
        return connectors.read(words, origin="connector")

    @pytest.fixture
    def connector(self, config):
        torch.manual_seed(0)
        return config.build(vision_width=VISION_WIDTH, text_width=TEXT_WIDTH).eval()

    @pytest.fixture
    def given(self, config):
        return features(layers=getattr(config, "layers", 0))

    def test_its_config_survives_json(self, config):
        again = connectors.read(json.loads(json.dumps(config.to_dict())), origin="connector")
        assert again.to_dict() == config.to_dict()

    def test_every_field_has_a_sentence(self, config):
        fields = type(config).model_fields
        assert [key for key, field in fields.items() if not field.description] == []

    def test_what_comes_out_is_what_its_config_says(self, config, connector, given):
        out = connector(given)
        assert out.grids == tuple(config.out_grid(grid) for grid in RAGGED)
        assert out.values.shape == (sum(grid.num_tokens for grid in out.grids), TEXT_WIDTH)

    def test_every_input_and_every_parameter_gets_a_gradient(self, connector, given):
        torch.manual_seed(0)
        values = [kind.values.requires_grad_() for kind in (given, *given.layers)]
        with torch.no_grad():
            for name, weight in connector.named_parameters():
                if name.endswith("_gate"):  # closed gates let no gradient through
                    weight.fill_(1.0)
        everything(connector.train(), given).backward()
        # Where several layers are read, the features themselves may only be sampled, or idle.
        for each in values[1:] or values:
            assert each.grad is not None
            assert each.grad.any(dim=1).all()
        idle = {n for n, p in connector.named_parameters() if p.grad is None or not p.grad.any()}
        assert idle == connector.idle_parameters()

    def test_an_item_alone_is_the_same_as_beside_others(self, connector, given):
        together = connector(given).items()
        for index, beside in enumerate(together):
            alone = connector(item_of(given, index)).values
            # Matrix products may add in another order for another number of rows (at most
            # 2e-6 over 200 seeds); an item that sees its neighbours differs by more than 0.01.
            torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)

    def test_an_item_does_not_see_the_others(self, connector, given):
        offsets = given.offsets
        for index in range(len(RAGGED)):
            values = given.values.detach().clone()
            values[offsets[index] : offsets[index + 1]] += 1.0
            changed = replace(given, values=values)
            pairs = zip(connector(given).items(), connector(changed).items(), strict=True)
            for other, (before, after) in enumerate(pairs):
                if other != index:
                    torch.testing.assert_close(after, before, rtol=0, atol=0)

    def test_it_works_in_bf16(self, config, connector, given):
        low = features(layers=len(given.layers), dtype=torch.bfloat16)
        out = connector.to(torch.bfloat16)(low)
        assert out.values.dtype == torch.bfloat16
        assert out.values.isfinite().all()
        assert out.grids == tuple(config.out_grid(grid) for grid in RAGGED)

    def test_its_weights_come_back(self, config, connector, given):
        again = config.build(vision_width=VISION_WIDTH, text_width=TEXT_WIDTH).eval()
        again.load_state_dict(connector.state_dict())
        torch.testing.assert_close(again(given).values, connector(given).values, rtol=0, atol=0)

    def test_it_is_built_without_contents(self, config, connector, given):
        # As transformers builds a model before it reads a checkpoint into it.
        with torch.device("meta"):
            empty = config.build(vision_width=VISION_WIDTH, text_width=TEXT_WIDTH)
        again = empty.to_empty(device="cpu").eval()
        again.load_state_dict(connector.state_dict())
        torch.testing.assert_close(again(given).values, connector(given).values, rtol=0, atol=0)

    def test_a_prefix_does_not_depend_on_the_rest_where_it_says_so(self, config, connector, given):
        if not config.ordered:
            pytest.skip("its tokens have no order")
        whole = connector(given).items()
        for kept in range(1, config.tokens):
            less = connectors.read({**config.to_dict(), "tokens": kept}, origin="connector")
            short = less.build(vision_width=VISION_WIDTH, text_width=TEXT_WIDTH).eval()
            state = connector.state_dict()
            short.load_state_dict({**state, "queries": state["queries"][:kept]})
            for item, prefix in zip(whole, short(given).items(), strict=True):
                torch.testing.assert_close(item[:kept], prefix, rtol=0, atol=1e-6)
