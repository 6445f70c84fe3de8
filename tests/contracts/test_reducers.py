"""What every reducer promises. A new one is tested as soon as it is registered."""

from __future__ import annotations

import pytest
import torch

from mmlm.features import Grid, VisionFeatures
from mmlm.reducers import reducers

WIDTH = 12
RAGGED = (Grid(1, 8, 8), Grid(1, 4, 12), Grid(2, 8, 4), Grid(1, 8, 8))


def features(
    grids: tuple[Grid, ...] = RAGGED, dtype: torch.dtype = torch.float32
) -> VisionFeatures:
    tokens = sum(grid.num_tokens for grid in grids)
    values = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    return VisionFeatures(values.to(dtype), grids)


@pytest.mark.parametrize("name", list(reducers))
class TestEveryReducer:
    @pytest.fixture
    def config(self, name):
        return reducers.read({"use": name}, origin="reducer")

    @pytest.fixture
    def reducer(self, config):
        torch.manual_seed(0)
        return config.build(width=WIDTH)

    def test_its_config_survives_json(self, name, config):
        assert reducers.read(config.to_dict(), origin="reducer") == config

    def test_what_comes_out_is_what_its_config_says(self, config, reducer):
        out = reducer(features())
        assert out.grids == tuple(config.out_grid(grid) for grid in RAGGED)
        assert out.values.shape == (sum(g.num_tokens for g in out.grids), config.out_width(WIDTH))

    def test_it_never_makes_more(self, config):
        for grid in RAGGED:
            assert config.out_grid(grid).num_tokens <= grid.num_tokens

    def test_an_item_alone_is_the_same_as_beside_others(self, reducer):
        whole = features()
        out = reducer(whole)
        for item, grid, together in zip(whole.items(), whole.grids, out.items(), strict=True):
            alone = reducer(VisionFeatures(item, (grid,)))
            torch.testing.assert_close(alone.values, together, rtol=0, atol=0)

    def test_every_input_and_every_parameter_gets_a_gradient(self, reducer):
        given = features()
        values = given.values.requires_grad_()
        reducer(given).values.square().sum().backward()
        assert values.grad is not None
        assert values.grad.ne(0).all()
        idle = [n for n, p in reducer.named_parameters() if p.grad is None or not p.grad.any()]
        assert idle == []

    def test_it_works_in_bf16(self, reducer):
        out = reducer.to(torch.bfloat16)(features(dtype=torch.bfloat16))
        assert out.values.dtype == torch.bfloat16
        assert out.values.isfinite().all()

    def test_its_weights_come_back(self, config, reducer):
        again = config.build(width=WIDTH)
        again.load_state_dict(reducer.state_dict())
        torch.testing.assert_close(
            again(features()).values, reducer(features()).values, rtol=0, atol=0
        )
