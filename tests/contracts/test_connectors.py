"""What every connector promises. A new one is tested as soon as it is registered."""

from __future__ import annotations

import pytest
import torch

from mmlm.connectors import connectors, match_scale
from mmlm.features import Grid, VisionFeatures

VISION_WIDTH, TEXT_WIDTH = 12, 16
RAGGED = (Grid(1, 4, 4), Grid(1, 2, 6), Grid(2, 2, 2), Grid(1, 4, 4))


def features(dtype: torch.dtype = torch.float32) -> VisionFeatures:
    tokens = sum(grid.num_tokens for grid in RAGGED)
    values = torch.randn(tokens, VISION_WIDTH, generator=torch.Generator().manual_seed(0))
    return VisionFeatures(values.to(dtype), RAGGED)


@pytest.mark.parametrize("name", list(connectors))
class TestEveryConnector:
    @pytest.fixture
    def config(self, name):
        return connectors.read({"use": name}, origin="connector")

    @pytest.fixture
    def connector(self, config):
        torch.manual_seed(0)
        return config.build(vision_width=VISION_WIDTH, text_width=TEXT_WIDTH)

    def test_its_config_survives_json(self, config):
        assert connectors.read(config.to_dict(), origin="connector") == config

    def test_what_comes_out_is_what_its_config_says(self, config, connector):
        out = connector(features())
        assert out.grids == tuple(config.out_grid(grid) for grid in RAGGED)
        assert out.values.shape == (sum(grid.num_tokens for grid in out.grids), TEXT_WIDTH)

    def test_every_input_and_every_parameter_gets_a_gradient(self, connector):
        given = features()
        values = given.values.requires_grad_()
        connector(given).values.square().sum().backward()
        assert values.grad is not None
        assert values.grad.any(dim=1).all()
        idle = [n for n, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
        assert idle == []

    def test_an_item_alone_is_the_same_as_beside_others(self, connector):
        whole = features()
        out = connector(whole)
        for item, grid, together in zip(whole.items(), whole.grids, out.items(), strict=True):
            alone = connector(VisionFeatures(item, (grid,)))
            # A matrix product may add in another order for another number of rows (it did not
            # over 1000 seeds); a feature that sees its neighbours differs by more than 0.1.
            torch.testing.assert_close(alone.values, together, rtol=0, atol=1e-6)

    def test_it_works_in_bf16(self, connector):
        out = connector.to(torch.bfloat16)(features(torch.bfloat16))
        assert out.values.dtype == torch.bfloat16
        assert out.values.isfinite().all()

    def test_its_weights_come_back(self, config, connector):
        again = config.build(vision_width=VISION_WIDTH, text_width=TEXT_WIDTH)
        again.load_state_dict(connector.state_dict())
        torch.testing.assert_close(
            again(features()).values, connector(features()).values, rtol=0, atol=0
        )

    def test_its_output_reaches_the_scale_that_is_asked_for(self, connector):
        factor = match_scale(connector, features(), 0.03)
        if connector.last_linear() is None:
            assert factor == 1.0
        else:
            assert float(connector(features()).values.detach().std()) == pytest.approx(
                0.03, rel=1e-4
            )
