"""Whether questions about one picture may share its tokens on this model: proven, or not done.

Before the first step a stretch with two branches goes through the model. Each branch must give
what it gives when it stands behind the stretch alone, and must not change when the other does.
Where that fails, or the attention has no way to say it, or pictures are read between the layers,
every question gets its picture again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmlm.modeling import SEGMENTS, MMLMForConditionalGeneration
from mmlm.training.attention import AttentionChoice, Isolation

_HEAD, _FIRST, _SECOND = 7, 5, 6
_LARGEST = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def with_sharing(model: Any, choice: AttentionChoice) -> AttentionChoice:
    """Return the choice with what was found out about sharing pictures."""
    if not isinstance(model, MMLMForConditionalGeneration):
        return choice
    # What is read between the layers goes by the borders of the row, and a branch holds no picture.
    if not choice.packed or choice.backend != SEGMENTS or model.model.injection is not None:
        return choice
    if model.model.reads_question:
        return choice  # each question makes another picture of it
    try:
        proof = prove_sharing(model)
    except (ValueError, TypeError, NotImplementedError, RuntimeError):
        return choice
    return choice._replace(shares=proof.holds)


@torch.no_grad()
def prove_sharing(model: MMLMForConditionalGeneration) -> Isolation:
    """Measure whether two branches of a stretch see each other, and differ from being alone."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    draw = torch.Generator().manual_seed(1)
    most, forbidden = model.config.text_config.vocab_size, model.config.image_token_id
    device = model.lm_head.weight.device

    def words(length: int) -> Tensor:
        ids = torch.randint(0, most, (1, length), generator=draw)
        return torch.where(ids == forbidden, (ids + 1) % most, ids).to(device)

    head, first, other, second = (words(n) for n in (_HEAD, _FIRST, _FIRST, _SECOND))
    together = _branches(model, head, first, second)[0, -_SECOND:].float()
    changed = _branches(model, head, other, second)[0, -_SECOND:].float()
    whole = torch.cat([head, second], dim=1)
    alone = model(input_ids=whole, use_cache=False).logits[0, -_SECOND:].float()
    for module, training in modes.items():
        module.training = training
    scale = float(alone.abs().max()) + 1e-9
    leak = float((together - changed).abs().max()) / scale
    difference = float((together - alone).abs().max()) / scale
    return Isolation(leak, difference, _LARGEST.get(model.dtype, 5e-2))


def _branches(
    model: MMLMForConditionalGeneration, head: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Return the logits of a head with two branches."""
    device = head.device
    lengths = [head.shape[1], first.shape[1], second.shape[1]]
    starts = [0, _HEAD, _HEAD]
    positions = [
        torch.arange(start, start + n, device=device)
        for start, n in zip(starts, lengths, strict=True)
    ]
    borders = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    seen = torch.tensor([[0, 0], [0, _HEAD], [0, _HEAD]], dtype=torch.int32, device=device)
    output: Any = model(
        input_ids=torch.cat([head, first, second], dim=1),
        position_ids=torch.cat(positions)[None],
        cu_seq_lens_q=borders,
        seen_before=seen,
        use_cache=False,
    )
    return output.logits
