"""Log-probabilities of a reference model, written into the rows of a preference set once.

With them a stage may learn all weights: nothing has to be kept of the model that it began with.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mmlm.assistant import load
from mmlm.data import open_mixture
from mmlm.data.pairs import PairPlanner
from mmlm.data.pipeline import PreparedRow
from mmlm.data.schema import Drop
from mmlm.storage import write_atomic
from mmlm.training.batches import Batcher
from mmlm.training.preference import log_probabilities

_MOST_TOKENS = 1 << 20


@torch.no_grad()
def write_references(
    model: str | Path, pairs: str | Path, out: str | Path, *, device: str | None = None
) -> int:
    """Copy a file of pairs, with ``reference: [log p(chosen), log p(rejected)]`` in each row.

    Args:
        model: The folder or Hub id of the reference model.
        pairs: The JSON lines.
        out: The copy. Paths of images stay as they are, so it belongs beside `pairs`.
        device: Where to compute; a GPU if there is one when left out.

    Returns:
        How many rows have a reference now; those that cannot be used are copied as they are.
    """
    assistant = load(model, device=device)
    path = Path(pairs).absolute()
    mixture = open_mixture({"use": "pairs", "path": str(path)}, folder=path.parent, shuffle=False)
    planner = PairPlanner(
        mixture, assistant.processor, max_tokens=_MOST_TOKENS, max_tiles=_MOST_TOKENS
    )
    batcher = Batcher(
        assistant.model, assistant.processor, packed=False, cache=None,
        device=assistant.model.device,
    )  # fmt: skip
    lines, known = path.read_text(encoding="utf-8").splitlines(), 0
    rows = [number for number, line in enumerate(lines) if line.strip()]
    for position, number in enumerate(rows):
        planned = planner.plan(position)
        if isinstance(planned, Drop):
            continue
        row = PreparedRow([planned], [batcher.pixels(image) for image in planned.images])
        inputs = batcher.inputs(row)
        inputs.pop("reference", None)
        values = log_probabilities(assistant.model, inputs).tolist()
        lines[number] = json.dumps({**json.loads(lines[number]), "reference": values})
        known += 1
    write_atomic(Path(out), "\n".join(lines) + "\n")
    return known
