"""How much memory a run takes, counted from shapes before it starts.

Counted: weights, what the optimiser keeps, gradients, and the activations of one row. The last
two come from a rehearsal of the step on tensors without contents (`mmlm.training.foresight`).
Where a model cannot be rehearsed, the activations of a transformer layer are taken as what it
keeps for the backward pass, in widths a token; the constants stand below with their reason.
Not counted: what Python and its libraries take, and pictures that wait for their row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmlm.training.foresight.rehearsal import RowShape, rehearse
from mmlm.training.precision import Precision

# What one decoder layer keeps for each token: inputs of two norms and their results, of the
# query, key, value, output, gate, up and down projections, and the attention's output; the
# feed-forward width counts three times (gate, up, product).
_WIDTHS_KEPT = 8
_FEED_FORWARD_KEPT = 4
# Two moments of one byte a weight, and for each block of 256 the largest value of each in float32.
_MOMENTS_IN_8_BITS = 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a stage takes on one device."""

    weights: int
    copies: int
    gradients: int
    moments: int
    activations: int
    how: str = "rehearsed"
    """Where the activations come from, for a person."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.copies + self.gradients + self.moments + self.activations

    def line(self) -> str:
        """Return the plan in a line."""
        parts = {
            "weights": self.weights + self.copies,
            "gradients": self.gradients,
            "optimiser": self.moments,
            "activations": self.activations,
        }
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"about {self.total / 2**30:.2f} GiB ({listed})"


def plan_memory(
    model: Any,
    learning: set[str],
    *,
    precision: Precision,
    row_tokens: int,
    row: RowShape | None = None,
    rows: int = 2,
    optimizer: str = "adamw",
) -> MemoryPlan:
    """Count what a stage takes.

    Args:
        model: The joined model.
        learning: Names of the parameters that learn.
        precision: The number format.
        row_tokens: Length of a row.
        row: What a full row holds, for a rehearsal; None counts by a formula.
        rows: Rows of a step on one device.
        optimizer: As the stage names it.
    """
    size = torch.empty((), dtype=precision.dtype).element_size()
    # Weights held in 4 bits count as the bytes that they are packed into.
    weights = sum(p.numel() * min(size, p.element_size()) for p in model.parameters())
    learnt = sum(p.numel() for n, p in model.named_parameters() if n in learning)
    copies = learnt * 4 if precision.keep_copies and size < 4 else 0
    master = 4 if copies else size
    gradients, how = learnt * master, "the activations by a formula"
    activations = _activations(model, row_tokens, size)
    if row is not None:
        try:
            seen = rehearse(model, learning, row, precision=precision, rows=rows)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            how += f", because a rehearsal failed ({_first_line(error)})"
        else:
            activations, how = max(seen.peak - gradients, 0), "one step rehearsed"
    return MemoryPlan(
        weights=weights,
        copies=copies,
        gradients=gradients,
        moments=round(learnt * (_MOMENTS_IN_8_BITS if "8bit" in optimizer else 2 * master)),
        activations=activations,
        how=how,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _activations(model: nn.Module, row_tokens: int, size: int) -> int:
    text: Any = model.config.text_config  # type: ignore[union-attr]
    width = int(text.hidden_size)
    feed_forward = int(getattr(text, "intermediate_size", 0) or 4 * width)
    per_token = _WIDTHS_KEPT * width + _FEED_FORWARD_KEPT * feed_forward
    return row_tokens * int(text.num_hidden_layers) * per_token * size


def memory_here(device: torch.device) -> int:
    """Return the memory of a device in bytes: of a container, where there is one."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total
