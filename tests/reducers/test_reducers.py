"""Pixel shuffle and pooling against their definitions, and against transformers."""

from __future__ import annotations

import pytest
import torch

from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures
from mmlm.reducers import PixelShuffleConfig, PoolConfig, pixel_shuffle


def naive_pixel_shuffle(dense: torch.Tensor, factor: int) -> torch.Tensor:
    """The definition, written as loops; slow and plainly right."""
    *lead, height, width, channels = dense.shape
    rows, columns = -(-height // factor), -(-width // factor)
    out = dense.new_zeros(*lead, rows, columns, channels * factor**2)
    for row in range(height):
        for column in range(width):
            start = ((row % factor) * factor + column % factor) * channels
            place = out[..., row // factor, column // factor, :]
            place[..., start : start + channels] = dense[..., row, column, :]
    return out


@pytest.mark.parametrize("factor", [1, 2, 3], ids=lambda f: f"factor{f}")
@pytest.mark.parametrize("grid", [(6, 6), (6, 12), (7, 5), (1, 4)], ids=str)
def test_pixel_shuffle_agrees_with_its_definition(grid, factor):
    dense = torch.arange(2 * grid[0] * grid[1] * 5, dtype=torch.float32).reshape(2, *grid, 5)
    assert torch.equal(pixel_shuffle(dense, factor), naive_pixel_shuffle(dense, factor))


def test_pixel_shuffle_agrees_with_internvl():
    from transformers.models.internvl.modeling_internvl import InternVLModel

    dense = torch.randn(2, 6, 6, 5)
    theirs = InternVLModel.pixel_shuffle(None, dense, scale_factor=0.5)  # type: ignore[arg-type]
    assert torch.equal(pixel_shuffle(dense, 2), theirs)


def test_pixel_shuffle_agrees_with_idefics3():
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    text = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    config = Idefics3Config(
        scale_factor=2,
        vision_config={"hidden_size": 5},
        text_config={"model_type": "llama", "pad_token_id": 0, "intermediate_size": 8, **text},
    )
    dense = torch.randn(2, 6, 6, 5)
    theirs = Idefics3Connector(config).pixel_shuffle(dense.flatten(1, 2), 2)
    assert torch.equal(pixel_shuffle(dense, 2).flatten(1, 2), theirs)


def test_an_odd_grid_is_refused_with_the_mend():
    config = PixelShuffleConfig(factor=2)
    with pytest.raises(
        ConfigError, match=r"factor 2 does not divide the grid of 27 x 27.*pad: true"
    ):
        config.out_grid(Grid(1, 27, 27))
    values = VisionFeatures(torch.zeros(9, 4), (Grid(1, 3, 3),))
    with pytest.raises(ConfigError, match="does not divide"):
        config.build(width=4)(values)


def test_an_odd_grid_is_padded_with_zeros_where_asked():
    config = PixelShuffleConfig(factor=2, pad=True)
    dense = torch.randn(1, 3, 5, 4)
    out = config.build(width=4)(VisionFeatures(dense.reshape(-1, 4), (Grid(1, 3, 5),)))
    assert out.grids == (Grid(1, 2, 3),)
    assert torch.equal(out.values, naive_pixel_shuffle(dense, 2).reshape(-1, 16))


def test_pool_averages_equal_parts():
    dense = torch.randn(1, 4, 6, 3)
    out = PoolConfig(rows=2, columns=3).build(width=3)(
        VisionFeatures(dense.reshape(-1, 3), (Grid(1, 4, 6),))
    )
    wanted = torch.stack(
        [
            dense[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((0, 1))
            for row in range(2)
            for column in range(3)
        ]
    )
    # Four numbers are added in another order: 2.4e-7 was the most over 1000 seeds.
    torch.testing.assert_close(out.values, wanted, rtol=0, atol=1e-6)


def test_pool_refuses_to_make_more():
    with pytest.raises(ConfigError, match="cannot make more of the 2 x 8"):
        PoolConfig(rows=4, columns=4).out_grid(Grid(1, 2, 8))
