"""What a stock model taken whole is called with beside ids and labels, packed and padded.

Its pictures travel as the stock processor prepares them. In a packed row every sample has the
positions that it has alone, on all axes that the class counts; whether packing holds for the
class is proven with pictures before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm.data.collate import collate_packed
from mmlm.data.planning import Planned
from mmlm.messages import assistant, user
from mmlm.whole import WholeModel, WholeProcessor
from mmlm.whole.processor import Look


def whole_inputs(
    model: Any,
    processor: WholeProcessor,
    samples: Sequence[Planned],
    looks: Sequence[Look],
    *,
    packed: bool,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return pictures, and positions where samples share a row.

    Args:
        model: The stock model taken whole, for the positions.
        processor: Its processor.
        samples: What shares the batch.
        looks: What the processor made of their pictures, in reading order.
        packed: Whether they share one row.
        device: Where the tensors go.
    """
    pictures = processor.image_processor
    waiting, counts = list(looks), list[int]()
    shown, positions = list[Look](), list[Tensor]()
    for sample in samples:
        # Pieces do not see one another; without sharing, each has pictures of its own.
        borders = np.cumsum(sample.pieces)[:-1]
        pieces = np.split(sample.ids, borders)
        count = len(sample.images) // len(pieces)
        for number, ids in enumerate(pieces):
            own, waiting = waiting[:count], waiting[count:]
            own = pictures.looks(sample.images[number * count :][:count], own) if own else []
            shown += own
            counts.append(count)
            if packed:
                seen = pictures.join(own, [count]) if own else {}
                positions.append(model.positions(torch.from_numpy(ids)[None], seen))
    inputs = pictures.join(shown, counts) if shown else {}
    if packed:
        inputs["position_ids"] = torch.cat(positions, dim=-1)
    return {name: value.to(device) for name, value in inputs.items()}


def probe_samples(processor: WholeProcessor) -> list[tuple[Planned, Look]]:
    """Return three samples with a picture each: two of one length, and another.

    The first two differ in picture and words, and may stand in for one another in a row.
    """
    found: list[tuple[Planned, Look]] = []
    words = (("What is it?", "aaaa"), ("Is it what", "bbbb"), ("Describe this.", "A dog, I see."))
    for number, (question, answer) in enumerate(words):
        draw = np.random.default_rng(number)
        picture = draw.integers(0, 256, (45, 60, 3), dtype=np.uint8)
        turns = [user(question, [picture]), assistant(answer)]
        encoded = processor.encode_chat(turns, with_pixels=False)
        ids = np.array(encoded.ids, dtype=np.int64)
        sample = Planned(number, "", number, str(number), ids, ids, (picture,), 1)
        found.append((sample, processor.image_processor.look(picture)))
    return found


@torch.no_grad()
def isolation_with_pictures(model: WholeModel) -> tuple[float, float]:
    """Measure whether samples with pictures see one another in a row, and differ from alone.

    Returns:
        How far the second sample moves when the first changes, and how far it is from what it is
        alone; relative to the size of its logits.
    """
    first, other, second = probe_samples(model.processor)
    together = _logits_of_last(model, [first, second])
    changed = _logits_of_last(model, [other, second])
    ids = torch.from_numpy(second[0].ids)[None].to(model.device)
    seen = model.processor.image_processor.join([second[1]], [1])
    alone = model(ids, **{name: value.to(model.device) for name, value in seen.items()})
    logits = alone.logits[0].float()
    scale = float(logits.abs().max()) + 1e-9
    leak = float((together - changed).abs().max()) / scale
    return leak, float((together - logits).abs().max()) / scale


def _logits_of_last(model: WholeModel, samples: Sequence[tuple[Planned, Look]]) -> Tensor:
    planned, looks = [one for one, _ in samples], [look for _, look in samples]
    row = {k: v.to(model.device) for k, v in collate_packed(planned).items() if k != "labels"}
    row |= whole_inputs(model, model.processor, planned, looks, packed=True, device=model.device)
    return model(**row).logits[0, -planned[-1].num_tokens :].float()
