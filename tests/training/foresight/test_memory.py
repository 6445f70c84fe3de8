"""The memory that is foreseen is the memory that a real training takes.

Measured is every byte that torch allocates while a whole `train` runs - weights, float32 copies,
gradients, moments, activations, the saved model - as long as it lives. Resident memory of whole
processes, allocator and all, is measured by `benchmarks/memory_forecast.py`.
"""

import pytest
import torch

from mmlm.training import train
from mmlm.training.foresight.machines import measured_rate
from mmlm.training.foresight.rehearsal import Living
from mmlm.training.preflight import plans_of
from mmlm.training.recipe import read_recipe
from mmlm.training.trainer import Trainer
from tests.training.tiny_run import tiny_recipe, write_rows

_SHAPES = {
    "all learns in float32": (["connector.*", "language.*"], {"precision": "fp32"}),
    "all learns in bfloat16": (
        ["vision.*", "connector.*", "language.*"],
        {"precision": "bf16", "gradient_checkpointing": True},
    ),
    "the connector alone": (["connector.*"], {"precision": "bf16", "feature_cache": "off"}),
}


@pytest.mark.parametrize("shape", _SHAPES)
def test_the_peak_is_foreseen_within_fifteen_percent(tmp_path, shape):
    learn, run = _SHAPES[shape]
    write_rows(tmp_path, 60)
    stage = {"name": "only", "learn": learn, "data": str(tmp_path / "rows.jsonl"),
             "until": {"steps": 3}, "step_tokens": 4096}  # fmt: skip
    recipe = tiny_recipe(tmp_path, stages=[stage], row_tokens=2048, **{"pool_samples": 40, **run})
    read, folder, _ = read_recipe(recipe)
    (plan,) = plans_of(Trainer(read, folder, tmp_path / "nowhere", quiet=True))
    assert plan.how == "one step rehearsed"
    measured_rate("cpu", torch.bfloat16)  # once in a process, so that it is no part of the run
    measured_rate("cpu", torch.float32)
    with Living() as living:
        train(recipe, tmp_path / "run", quiet=True)
    assert plan.total == pytest.approx(living.peak, rel=0.15)
