"""What a stage costs on a named machine: which sharding fits, seconds a step, hours, dollars.

Nothing is measured. A step takes as long as its useful FLOPs at the share of the datasheet's rate
that is assumed to be reached, or as its traffic where that is hidden behind the computing and
longer; the optimiser adds what it reads and writes. The assumptions are listed with the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmlm.training.forecast import bytes_on_each, choose_sharding
from mmlm.training.foresight.machines import Hardware
from mmlm.training.memory import MemoryPlan
from mmlm.training.recipe import Sharding

REACHED = 0.4
"""The share of the datasheet's rate that packed image tuning reaches; published: 0.35 to 0.45."""

_OFTEN_IN_A_MACHINE = 8
_BETWEEN_MACHINES = 50e9
_OPTIMISER_BYTES = 30
_RECOMPUTED = 4 / 3
_SHARDINGS: tuple[Sharding, ...] = ("ddp", "zero1", "zero2", "fsdp2")


@dataclass(frozen=True)
class Work:
    """What a stage asks of a machine.

    Args:
        plan: What one device would hold alone.
        layer: Bytes of the weights of the largest layer.
        weights: How many there are.
        learnt: How many of them learn.
        flops: Useful FLOPs of a step over all devices.
        tokens: Of the whole stage; None if nobody knows.
        step_tokens: Tokens of a step.
        rows: Rows of a step over all devices.
        recomputes: Whether activations are computed twice.
    """

    plan: MemoryPlan
    layer: int
    weights: int
    learnt: int
    flops: float
    tokens: float | None
    step_tokens: int
    rows: int
    recomputes: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a stage costs there.

    Args:
        sharding: What fits and is fastest.
        offload: Whether the optimiser has to lie in the machine's own memory.
        fits: Whether it does fit.
        bytes_by_sharding: What one device would hold.
        step_seconds: Of one optimiser step.
        mfu: Useful FLOPs over the datasheet's rate.
        steps: Of the stage, or None.
        hours: Of the stage, or None.
        cost: In US dollars, or None.
    """

    sharding: Sharding
    offload: bool
    fits: bool
    bytes_by_sharding: dict[str, int]
    step_seconds: float
    mfu: float
    steps: int | None
    hours: float | None
    cost: float | None

    def lines(self, hardware: Hardware) -> list[str]:
        """Say it in a few lines."""
        sizes = ", ".join(
            f"{name} {size / 2**30:.1f}" for name, size in self.bytes_by_sharding.items()
        )
        chosen = f"{self.sharding}{' with offload' if self.offload else ''}"
        verdict = chosen if self.fits else f"{chosen}, and even that does not fit"
        lines = [
            f"on {hardware.text:8} needs {verdict}; GiB on each: {sizes}, of "
            f"{hardware.machine.memory / 2**30:.0f}",
            f"            {self.step_seconds:.3g} s a step, MFU {100 * self.mfu:.0f} %",
        ]
        if self.hours is not None and self.cost is not None:
            lines[1] += (
                f"; {self.steps:,} steps, {self.hours:.3g} h, about ${self.cost:,.2f} at "
                f"${hardware.machine.price:.2f} an hour and device"
            )
        return lines


def estimate(work: Work, hardware: Hardware, *, reached: float = REACHED) -> Estimate:
    """Return what a stage costs on a machine.

    Args:
        work: What the stage asks.
        hardware: The machine.
        reached: The share of its rate that the computing reaches.
    """
    count, machine = hardware.count, hardware.machine
    choice = choose_sharding(work.plan, count, machine.memory, layer=work.layer, has_deepspeed=True)
    sharding, offload = choice.sharding, choice.offload
    names = _SHARDINGS if count > 1 else ("none",)
    sizes = {name: bytes_on_each(work.plan, name, count, layer=work.layer) for name in names}
    held = bytes_on_each(work.plan, sharding, count, layer=work.layer, offload=offload)
    computing = work.flops / (count * machine.flops * reached)
    computing *= _RECOMPUTED if work.recomputes else 1.0
    link = machine.link if count <= _OFTEN_IN_A_MACHINE else min(machine.link, _BETWEEN_MACHINES)
    sending = traffic(work, sharding, count) / link
    spread = count if sharding not in ("none", "ddp") else 1
    moving = _OPTIMISER_BYTES * work.learnt / spread / machine.bandwidth
    hidden = sharding in ("fsdp2", "zero2", "zero3")
    step = (max(computing, sending) if hidden else computing + sending) + moving
    steps = None if work.tokens is None else max(1, round(work.tokens / work.step_tokens))
    hours = None if steps is None else steps * step / 3600
    return Estimate(
        sharding=sharding,
        offload=offload,
        fits=held <= 0.9 * machine.memory,
        bytes_by_sharding=sizes,
        step_seconds=step,
        mfu=work.flops / step / (count * machine.flops),
        steps=steps,
        hours=hours,
        cost=None if hours is None else hours * count * machine.price,
    )


def traffic(work: Work, sharding: Sharding, count: int) -> float:
    """Return the bytes that one device sends in a step; the table is in docs/scale.md."""
    share = (count - 1) / count
    rows = max(1, work.rows // count)
    if sharding == "ddp":
        return 8 * work.learnt * share
    if sharding == "zero1":
        return 6 * work.learnt * share
    if sharding == "zero2":
        return (4 * rows + 2) * work.learnt * share
    if sharding in ("fsdp2", "zero3"):
        return rows * (4 * work.weights + 4 * work.learnt) * share
    return 0.0


def assumptions(hardware: Hardware, reached: float = REACHED) -> str:
    """Say what the numbers stand on."""
    machine = hardware.machine
    return (
        f"assumed     {100 * reached:.0f} % of {machine.flops / 1e12:.0f} TFLOP/s dense bf16 "
        f"(--reached), {machine.bandwidth / 1e12:.2g} TB/s of memory, {machine.link / 1e9:.0f} GB/s"
        f" to its neighbours and {_BETWEEN_MACHINES / 1e9:.0f} GB/s for each device between "
        f"machines of {_OFTEN_IN_A_MACHINE}; data are never waited for; prices are round numbers "
        f"(--price)"
    )
