"""How much memory each sharding takes on a device, and which one `auto` chooses.

Pure arithmetic over a `MemoryPlan`; nothing is measured. With n devices, W weights, G gradients,
C float32 copies, M moments and A activations, one device holds

    none, ddp       W + G + C + M + A
    zero1           W + G + (C + M)/n + A
    zero2           W + (G + C + M)/n + A
    fsdp2           (W + G + C + M)/n + A, and two layers of weights that are gathered

(Rajbhandari et al. 2020, arXiv 1910.02054.)
"""

from __future__ import annotations

from mmlm.training.memory import MemoryPlan
from mmlm.training.recipe import Sharding

_SHARE_OF_MEMORY = 0.9


def bytes_on_each(plan: MemoryPlan, sharding: Sharding, world: int, *, layer: int) -> int:
    """Return what one device holds.

    Args:
        plan: What one device would hold alone.
        sharding: How it is spread.
        world: Over how many devices.
        layer: The bytes of the weights of the largest layer.

    >>> plan = MemoryPlan(weights=16, copies=32, gradients=32, moments=64, activations=5)
    >>> [bytes_on_each(plan, s, 8, layer=1) for s in ("ddp", "zero1", "zero2", "fsdp2")]
    [149, 65, 37, 25]
    """
    kept = plan.copies + plan.moments
    if sharding in ("none", "ddp", "auto"):
        return plan.total
    if sharding == "zero1":
        return plan.weights + plan.gradients + kept // world + plan.activations
    if sharding == "zero2":
        return plan.weights + (plan.gradients + kept) // world + plan.activations
    spread = (plan.weights + plan.gradients + kept) // world
    return spread + plan.activations + 2 * layer


def choose_sharding(
    plan: MemoryPlan, world: int, memory: float, *, layer: int
) -> tuple[Sharding, str]:
    """Return the fastest sharding that fits, and why.

    Args:
        plan: What one device would hold alone, in the stage that needs most.
        world: The number of devices.
        memory: Of one device, in bytes.
        layer: The bytes of the weights of the largest layer.

    >>> plan = MemoryPlan(weights=16, copies=32, gradients=32, moments=64, activations=5)
    >>> [choose_sharding(plan, 8, memory, layer=1)[0] for memory in (200, 100)]
    ['ddp', 'fsdp2']
    """
    whole: Sharding = "ddp" if world > 1 else "none"
    order: list[Sharding] = [whole, "fsdp2"] if world > 1 else [whole]
    sizes = {kind: bytes_on_each(plan, kind, world, layer=layer) for kind in order}
    fits: list[Sharding] = [kind for kind in order if sizes[kind] <= _SHARE_OF_MEMORY * memory]
    chosen: Sharding = fits[0] if fits else order[-1]
    listed = ", ".join(f"{kind} {size / 2**30:.1f}" for kind, size in sizes.items())
    reason = f"estimated GiB on each of {world}: {listed}, of {memory / 2**30:.1f}"
    return chosen, reason if fits else f"{reason}; nothing fits, and this needs least"
