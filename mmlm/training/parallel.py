"""One process or many: where to compute, and how ranks add up what they found.

Sharding `none` and `ddp` are here: every rank holds the whole model. Gradients are added up
once in a step, in float32, after all rows of a rank, instead of bucket by bucket under each
backward pass. So ranks may have different numbers of rows, a part that a rank never used
is no problem, and nothing can hang on a batch without an image; what is lost is the overlap of
computing and sending within the last row. Process groups and devices come from accelerate.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from mmlm.errors import ConfigError, TrainingError
from mmlm.training.recipe import RunConfig

_BUCKET_ELEMENTS = 1 << 25


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
        self.sharding = self._choose(run.sharding)

    def _choose(self, wanted: str) -> str:
        if wanted == "none" and self.world > 1:
            raise ConfigError(
                f"run.sharding is none, but {self.world} processes were started. Use ddp or auto."
            )
        if wanted in ("fsdp2", "zero1", "zero2", "zero3"):
            raise TrainingError(
                f"run.sharding {wanted} is not built yet. Use ddp, which keeps the whole model on "
                f"each device, or auto."
            )
        if wanted == "auto":
            return "ddp" if self.world > 1 else "none"
        return wanted

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

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank."""
        return self.add_up([float(flag)])[0] > 0

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            self._state.wait_for_everyone()
