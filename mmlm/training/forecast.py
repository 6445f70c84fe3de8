"""How much memory each sharding takes on a device, and which one `auto` chooses.

Pure arithmetic over a `MemoryPlan`; nothing is measured. With n devices, W weights, G gradients,
C float32 copies, M moments and A activations, one device holds

    none, ddp       W + G + C + M + A
    zero1           W + G + (C + M)/n + A
    zero2           W + (G + C + M)/n + A
    fsdp2, zero3    (W + G + C + M)/n + A, and two layers of weights that are gathered
    with offload    the same without G, C and M, which lie in the memory of the machine

(Rajbhandari et al. 2020, arXiv 1910.02054.)
"""

from __future__ import annotations

from typing import NamedTuple

from mmlm.training.memory import MemoryPlan
from mmlm.training.recipe import Sharding

_SHARE_OF_MEMORY = 0.9


def bytes_on_each(
    plan: MemoryPlan, sharding: Sharding, world: int, *, layer: int, offload: bool = False
) -> int:
    """Return what one device holds.

    Args:
        plan: What one device would hold alone.
        sharding: How it is spread.
        world: Over how many devices.
        layer: The bytes of the weights of the largest layer.
        offload: Whether gradients, float32 copies and moments lie in the memory of the machine;
            DeepSpeed adds gradients up where the copies are.

    >>> plan = MemoryPlan(weights=16, copies=32, gradients=32, moments=64, activations=5)
    >>> [bytes_on_each(plan, s, 8, layer=1) for s in ("ddp", "zero1", "zero2", "fsdp2")]
    [149, 65, 37, 25]
    """
    kept = 0 if offload else plan.copies + plan.moments
    gradients = 0 if offload else plan.gradients
    if sharding in ("none", "ddp", "auto"):
        return plan.total
    if sharding == "zero1":
        return plan.weights + gradients + kept // world + plan.activations
    if sharding == "zero2":
        return plan.weights + (gradients + kept) // world + plan.activations
    spread = (plan.weights + gradients + kept) // world
    return spread + plan.activations + 2 * layer


class Choice(NamedTuple):
    """How a model is to be spread, and why."""

    sharding: Sharding
    offload: bool
    reason: str


def choose_sharding(
    plan: MemoryPlan, world: int, memory: float, *, layer: int, has_deepspeed: bool = False
) -> Choice:
    """Return the fastest sharding that fits, and why.

    Args:
        plan: What one device would hold alone, in the stage that needs most.
        world: The number of devices.
        memory: Of one device, in bytes.
        layer: The bytes of the weights of the largest layer.
        has_deepspeed: Whether ZeRO can be chosen, where nothing else fits.

    >>> plan = MemoryPlan(weights=16, copies=32, gradients=32, moments=64, activations=5)
    >>> [choose_sharding(plan, 8, m, layer=1, has_deepspeed=True)[:2] for m in (200, 100, 20)]
    [('ddp', False), ('fsdp2', False), ('zero3', True)]
    """
    order: list[tuple[Sharding, bool]] = [("ddp" if world > 1 else "none", False)]
    if world > 1:
        order.append(("fsdp2", False))
    if world > 1 and has_deepspeed:
        order.append(("zero3", True))
    sizes = {
        (kind, offload): bytes_on_each(plan, kind, world, layer=layer, offload=offload)
        for kind, offload in order
    }
    fits = [one for one in order if sizes[one] <= _SHARE_OF_MEMORY * memory]
    kind, offload = fits[0] if fits else order[-1]
    listed = ", ".join(
        f"{kind}{' with offload' if offload else ''} {size / 2**30:.1f}"
        for (kind, offload), size in sizes.items()
    )
    reason = f"estimated GiB on each of {world}: {listed}, of {memory / 2**30:.1f}"
    return Choice(
        kind, offload, reason if fits else f"{reason}; nothing fits, and this needs least"
    )
