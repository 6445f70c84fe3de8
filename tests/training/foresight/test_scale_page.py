"""The numbers of `docs/scale.md` are those that the forecasts compute with."""

import re
from pathlib import Path

import pytest

from mmlm.training.forecast import bytes_on_each
from mmlm.training.foresight.estimate import Work, traffic
from mmlm.training.foresight.machines import MACHINES
from mmlm.training.memory import MemoryPlan

PAGE = (Path(__file__).parents[3] / "docs" / "scale.md").read_text()
NUM_WEIGHTS = 7_600_000_000
# Weights in bf16; copies, gradients and two moments in float32.
PLAN = MemoryPlan(
    weights=2 * NUM_WEIGHTS, copies=4 * NUM_WEIGHTS, gradients=4 * NUM_WEIGHTS,
    moments=8 * NUM_WEIGHTS, activations=0,
)  # fmt: skip


def rows_below(title):
    """The cells of the table whose first column has this title."""
    start = PAGE.index(f"| {title} |")
    table = PAGE[start:].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_memory_on_each_gpu_is_what_the_plan_says():
    rows = rows_below("GPUs")
    assert [int(row[0].replace(",", "")) for row in rows] == [8, 64, 256, 1024]
    for count, *stated in rows:
        world = int(count.replace(",", ""))
        found = [
            bytes_on_each(PLAN, kind, world, layer=0) / 2**30
            for kind in ("ddp", "zero1", "zero2", "fsdp2")
        ]
        assert found == pytest.approx([float(one) for one in stated], abs=0.051)


def test_what_is_sent_in_a_step_is_what_the_forecast_of_time_uses():
    rows, world = 3, 64
    work = Work(
        plan=PLAN, layer=0, weights=NUM_WEIGHTS, learnt=NUM_WEIGHTS, flops=1.0, tokens=None,
        step_tokens=1, rows=rows * world,
    )  # fmt: skip
    stated = {
        names: cell for names, cell in rows_below("sharding | sent in a step") if "·r" in cell
    }
    factors = {"ddp": 8, "zero1": 6, "zero2": 4 * rows + 2, "fsdp2": 8 * rows}
    assert len(stated) == 4
    for kind, factor in factors.items():
        assert any(kind in names for names in stated)
        sent = factor * NUM_WEIGHTS * (world - 1) / world
        assert traffic(work, kind, world) == pytest.approx(sent)


def test_the_shortest_row_that_hides_its_traffic():
    for _, link, stated in rows_below("link"):
        bandwidth = float(re.search(r"[\d.]+", link)[0]) * 1e9
        tokens = 8 * 0.4 * MACHINES["h100"].flops / (6 * bandwidth)
        assert float(re.search(r"[\d,]+", stated)[0].replace(",", "")) == pytest.approx(
            tokens, rel=0.03
        )
