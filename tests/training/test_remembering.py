"""A connector that remembers samples: the bank is part of every checkpoint."""

from __future__ import annotations

from safetensors.torch import load_file

from tests.training.test_resume import assert_crashes_change_nothing
from tests.training.tiny_run import tiny_recipe


def test_a_run_with_a_memory_of_samples_goes_on_in_the_same_bits(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, checkpoint_every=1)
    recipe["stages"] = recipe["stages"][:1]
    recipe["model"]["connector"] = {
        "use": "proto_memory", "depth": 1, "width": 16, "heads": 2, "prototypes": 4, "bank": 24,
        "every": 2,
    }  # fmt: skip
    assert_crashes_change_nothing(recipe, tmp_path, monkeypatch, [("align", 3)])
    saved = load_file(tmp_path / "unbroken" / "model" / "model.safetensors")
    (seen,) = (value for name, value in saved.items() if name.endswith("memory.seen"))
    assert seen > 24
