"""One process or many: where to compute, and how ranks add up what they found.

    none            one process
    ddp             every rank holds the whole model
    fsdp2           weights, gradients and moments are spread over the ranks, by torch
    zero1           the moments are spread, by DeepSpeed
    zero2           and the gradients
    zero3           and the weights

Under ddp gradients are added up once in a step, in float32, after all rows of a rank, instead of
bucket by bucket under each backward pass. So ranks may have different numbers of rows, a part
that a rank never used is no problem, and nothing can hang on a batch without an image; what is
lost is the overlap of computing and sending within the last row. The others send while they
compute: every rank has to do the same passes, which `step` sees to. Process groups and devices
come from accelerate. How a model is spread is in `sharding` and `zero`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from mmlm.errors import ConfigError
from mmlm.training.recipe import RunConfig, Sharding

_BUCKET_ELEMENTS = 1 << 25


def missing_processes(environment: Mapping[str, str]) -> str | None:
    """Say so if accelerate was asked for several processes and started this one alone.

    Without GPUs for all of them, `accelerate launch` starts several only where `--multi_gpu` is
    said; else it leaves them to MPI, and sets an address for them and no rank.

    >>> missing_processes({"RANK": "0"}) is None
    True
    """
    asked = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys()
    if not asked or "RANK" in environment:
        return None
    return (
        "alone       accelerate was asked for several processes and started one: this one trains "
        "alone. Use mmlm train RECIPE --processes N, or accelerate launch --multi_gpu."
    )


class Engine:
    """The processes of a run.

    Args:
        run: Device and sharding.
    """

    def __init__(self, run: RunConfig) -> None:
        if run.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("run.device is cuda, but this machine has no CUDA device. Use auto.")
        self._state: Any = PartialState(cpu=run.device == "cpu" or not torch.cuda.is_available())
        self.device: torch.device = self._state.device
        self.rank: int = self._state.process_index
        self.world: int = self._state.num_processes
        self.warning = missing_processes(os.environ) if self.world == 1 else None
        """What a person should know before a run begins, or None."""
        if run.sharding == "none" and self.world > 1:
            raise ConfigError(
                f"run.sharding is none, but {self.world} processes were started. Use ddp or auto."
            )
        if run.offload and run.sharding not in ("zero2", "zero3"):
            raise ConfigError(
                f"run.offload is true, and run.sharding {run.sharding} keeps nothing in the memory "
                f"of the machine. Use run.sharding zero2 or zero3, or set run.offload to false."
            )
        spreads = run.sharding not in ("auto", "none", "ddp")
        if spreads and not torch.distributed.is_initialized():
            raise ConfigError(
                f"run.sharding {run.sharding} needs a launcher, even for one process: "
                f"mmlm train RECIPE --processes 1. Without one, use none or auto."
            )
        self.sharding: Sharding = run.sharding
        """How the model is spread; `auto` until `settle` has been called."""
        self.offload = run.offload
        """Whether float32 copies and moments lie in the memory of the machine."""

    def settle(self, sharding: Sharding, *, offload: bool = False) -> None:
        """Decide how the model is spread."""
        self.sharding, self.offload = sharding, offload

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed spreads the model."""
        return self.sharding.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        """Whether each parameter of the model is spread by torch."""
        return self.sharding == "fsdp2"

    @property
    def in_step(self) -> bool:
        """Whether all ranks have to do the same forward and backward passes."""
        return self.is_zero or self.shards_weights

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def add_up(self, numbers: list[float]) -> list[float]:
        """Return the sums of some numbers over all ranks."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def add_up_gradients(self, gradients: list[Tensor]) -> None:
        """Replace gradients by their sums over all ranks, many in one message."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for gradient in [*gradients, None]:
            full = gradient is None or size + gradient.numel() > _BUCKET_ELEMENTS
            if full and bucket:
                flat = torch.cat([one.reshape(-1) for one in bucket])
                torch.distributed.all_reduce(flat)
                for one, piece in zip(bucket, flat.split([b.numel() for b in bucket]), strict=True):
                    one.copy_(piece.view_as(one))
                bucket, size = [], 0
            if gradient is not None:
                bucket.append(gradient)
                size += gradient.numel()

    def most(self, number: int) -> int:
        """Return the largest of a number over all ranks."""
        if self.world == 1:
            return number
        found = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the lists of all ranks, one after another; plain values only."""
        if self.world == 1:
            return values
        lists: list[list[Any]] = [[] for _ in range(self.world)]
        torch.distributed.all_gather_object(lists, values)
        return [value for found in lists for value in found]

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank."""
        return self.add_up([float(flag)])[0] > 0

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            self._state.wait_for_everyone()
