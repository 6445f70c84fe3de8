"""Keeps the batch that broke a run, so that somebody can look at it.

One JSON file names the samples; tensors go beside it as safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mmlm.data.pipeline import Step
from mmlm.training.batches import Batcher


def save_batch(folder: Path, step: Step, batcher: Batcher, *, rank: int, loss: float) -> None:
    """Write the samples of this rank: what they are, and the tensors that the model got."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    names: list[list[dict[str, object]]] = []
    for number, row in enumerate(step.rows):
        names.append([{"source": s.source, "row": s.row, "id": s.id} for s in row.samples])
        if row.samples:
            for key, value in batcher.inputs(row).items():
                tensors[f"row{number}.{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / f"rank{rank}.safetensors")
    text = json.dumps({"loss": str(loss), "rows": names}, indent=1, ensure_ascii=False)
    (folder / f"rank{rank}.json").write_text(text + "\n", encoding="utf-8")
