"""How well is the peak memory of a training foreseen?  Predicted against measured, on the CPU.

    python benchmarks/memory_forecast.py               three shapes
    python benchmarks/memory_forecast.py --shapes all  one of them
    python benchmarks/memory_forecast.py --json FILE   the figures as JSON

Each shape is a whole `mmlm.train` in a process of its own: random weights, pictures of noise, some
steps, a checkpoint and a saved model. Before it the same process trains a model of a few
kilobytes, so that all libraries are loaded; what is resident then is the floor. Resident is the
highest resident memory of the second training above that floor, as Linux counts it (`VmHWM`,
reset by `clear_refs`). Allocated is the most that torch's tensors took at once in the same
training. Predicted is what `mmlm check` says for the stage that needs most. What lies between
allocated and resident is mostly kept by the C library's allocator: with
MALLOC_MMAP_THRESHOLD_=131072 in the environment it gives blocks back as soon as they are free, at
the price of page faults.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from letter_tokenizer import save_letter_tokenizer


@dataclass(frozen=True)
class Shape:
    """One training.

    Args:
        about: What it stands for.
        width: Of the language model.
        layers: Of the language model.
        vision_layers: Of the encoder, which is 384 wide.
        vocabulary: Of the language model.
        learn: What learns.
        row_tokens: Length of a row.
        rows: Rows of a step.
        run: Further words of `run:`.
    """

    about: str
    width: int
    layers: int
    vision_layers: int
    vocabulary: int
    learn: list[str]
    row_tokens: int
    rows: int
    run: dict[str, Any]


SHAPES = {
    "all": Shape(
        "language model and connector learn, float32", 384, 6, 2, 8_000,
        ["connector.*", "language.*"], 1024, 2, {"precision": "fp32"},
    ),
    "long": Shape(
        "the connector alone learns, bfloat16, long rows", 384, 8, 2, 8_000,
        ["connector.*"], 4096, 1, {"precision": "bf16", "feature_cache": "off"},
    ),
    "deep": Shape(
        "everything learns, bfloat16, activations computed twice", 512, 8, 2, 16_000,
        ["vision.*", "connector.*", "language.*"], 1024, 2,
        {"precision": "bf16", "gradient_checkpointing": True},
    ),
}  # fmt: skip
TINY = Shape("all libraries are loaded", 32, 2, 2, 300, ["*"], 256, 1, {"precision": "bf16"})


def recipe_of(folder: Path, shape: Shape) -> dict[str, Any]:
    """Write parts and data; return the recipe."""
    import numpy as np
    from PIL import Image
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        LlamaConfig,
        SiglipVisionConfig,
    )

    folder.mkdir(parents=True, exist_ok=True)
    text = LlamaConfig(
        hidden_size=shape.width, intermediate_size=3 * shape.width, vocab_size=shape.vocabulary,
        num_hidden_layers=shape.layers, num_attention_heads=shape.width // 32,
        num_key_value_heads=shape.width // 32, max_position_embeddings=8192,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(text).save_pretrained(folder / "language")
    save_letter_tokenizer(folder / "language")
    side = 384 if shape.width > 32 else 32
    vision = SiglipVisionConfig(
        hidden_size=side, intermediate_size=4 * side, num_hidden_layers=shape.vision_layers,
        num_attention_heads=side // 32, image_size=112, patch_size=16,
    )  # fmt: skip
    AutoModel.from_config(vision).save_pretrained(folder / "vision")
    draw = np.random.default_rng(0)
    for number in range(8):
        noise = draw.integers(0, 256, (112, 112, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    rows = [
        {"image": f"{number % 8}.png", "question": "What is it?",
         "answer": "".join(chr(97 + int(c)) for c in draw.integers(0, 26, 60 + number % 50))}
        for number in range(400)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": {
            "vision": {"use": "hf", "checkpoint": str(folder / "vision")},
            "connector": {"use": "mlp"},
            "language": {"use": "causal_lm", "checkpoint": str(folder / "language")},
        },
        "stages": [
            {"name": "learn", "learn": shape.learn, "data": str(folder / "rows.jsonl"),
             "until": {"steps": 3}, "step_tokens": shape.row_tokens * shape.rows, "peak_lr": 1e-4}
        ],
        "run": {"device": "cpu", "row_tokens": shape.row_tokens, "pool_samples": 16, **shape.run},
    }  # fmt: skip


def resident(field: str) -> int:
    """Return a line of this process's memory, in bytes: VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"this system does not say {field}")


def measure(name: str) -> dict[str, float]:
    """Foresee and train one shape in this process."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from mmlm.training import train
    from mmlm.training.foresight.rehearsal import Living
    from mmlm.training.preflight import plans_of
    from mmlm.training.recipe import read_recipe
    from mmlm.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["MMLM_CACHE"] = str(folder / "cache")
        train(recipe_of(folder / "tiny", TINY), folder / "tiny_run", quiet=True)
        recipe = recipe_of(folder / name, SHAPES[name])
        read, where, _ = read_recipe(recipe)
        plans = plans_of(Trainer(read, where, folder / "none", quiet=True))
        del read
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        floor = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        with Living() as living:
            train(recipe, folder / "run", quiet=True)
        measured = resident("VmHWM") - floor
    plan = max(plans, key=lambda one: one.total)
    return {
        "predicted": plan.total, "allocated": living.peak, "resident": measured,
        "weights": plan.weights,
        "copies": plan.copies, "gradients": plan.gradients, "moments": plan.moments,
        "activations": plan.activations,
    }  # fmt: skip


def main() -> None:
    """Print predicted against measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--one", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    print(f"{'':6s}{'predicted':>12s}{'allocated':>12s}{'resident':>12s}{'off by':>9s}")
    figures: dict[str, Any] = {}
    for name in options.shapes:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = figures[name] = json.loads(done.stdout.splitlines()[-1])
        off = found["predicted"] / found["resident"] - 1
        found["off"] = off
        print(
            f"{name:6s}{found['predicted'] / 2**20:8.0f} MiB{found['allocated'] / 2**20:8.0f} MiB"
            f"{found['resident'] / 2**20:8.0f} MiB"
            f"{100 * off:+8.1f}%  {SHAPES[name].about}",
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
