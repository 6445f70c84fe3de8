"""AdamW over float32 copies of what learns, with a rate for each part.

In bf16 the model computes with half-precision weights while the optimiser owns a float32
copy of every weight that learns: small updates are kept, and gradients of many rows are
added up in float32. In fp32 the copy is the weight itself. Nothing here knows the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.training.learning import plain_name


def stable_name(name: str) -> str:
    """Return a name that stays the same under wrappers and adapters; checkpoints use it."""
    return plain_name(name).replace(".base_layer.", ".")


@dataclass
class Learnable:
    """One parameter that learns, and the float32 copy that the optimiser moves."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    peak_lr: float

    @property
    def has_copy(self) -> bool:
        """Whether the copy is another tensor than the parameter."""
        return self.master is not self.parameter


class MasterAdamW:
    """AdamW whose moments and weights are float32, whatever the model computes in.

    Args:
        parameters: Name and parameter of what learns.
        rates: The peak rate of each name.
        masters: What has learnt in an earlier stage or a checkpoint, by stable name.
        betas: Averaging.
        weight_decay: Decay of matrices; vectors have none.
        keep_copies: False moves the model's own weights, in their own precision.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        rates: Mapping[str, float],
        masters: Mapping[str, Tensor],
        betas: tuple[float, float],
        weight_decay: float,
        keep_copies: bool = True,
    ) -> None:
        self.learnables = [
            self._learnable(name, parameter, rates[name], masters, keep_copies)
            for name, parameter in parameters
        ]
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for one in self.learnables:
            decays = one.parameter.ndim >= 2
            groups.setdefault((one.peak_lr, decays), []).append(one.master)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": tensors, "lr": peak, "peak_lr": peak,
                 "weight_decay": weight_decay if decays else 0.0}
                for (peak, decays), tensors in groups.items()
            ],
            betas=betas,
            fused=True,
        )  # fmt: skip

    @staticmethod
    def _learnable(
        name: str,
        parameter: nn.Parameter,
        peak_lr: float,
        masters: Mapping[str, Tensor],
        keep_copies: bool,
    ) -> Learnable:
        stable = stable_name(name)
        known = masters.get(stable)
        if parameter.dtype == torch.float32 or not keep_copies:
            if known is not None:
                parameter.data.copy_(known)
            return Learnable(stable, parameter, parameter, peak_lr)
        source = parameter.detach() if known is None else known
        master = source.to(parameter.device, torch.float32)
        parameter.data.copy_(master)
        return Learnable(stable, parameter, master.clone().requires_grad_(), peak_lr)

    def collect(self) -> None:
        """Add the gradients of one backward pass to the float32 sums."""
        for one in self.learnables:
            if one.has_copy and one.parameter.grad is not None:
                gradient = one.parameter.grad
                if one.master.grad is None:
                    one.master.grad = gradient.float()
                else:
                    one.master.grad.add_(gradient)
                one.parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Return the gradient of every learnable, zeros where nothing reached it."""
        for one in self.learnables:
            if one.master.grad is None:
                one.master.grad = torch.zeros_like(one.master)
        return [one.master.grad for one in self.learnables if one.master.grad is not None]

    def clip(self, most: float | None) -> Tensor:
        """Shorten the gradient to `most`, if it is longer; return its length before that."""
        gradients = self.gradients()
        norm = torch.linalg.vector_norm(
            torch.stack([g.norm(dtype=torch.float32) for g in gradients])
        )
        if most is not None:
            factor = (most / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor)
        return norm

    def step(self, factor: float) -> None:
        """Move the weights with `factor` times their peak rates, and forget the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.step()
        for one in self.learnables:
            if one.has_copy:
                one.parameter.data.copy_(one.master.data)
        self.forget()

    def forget(self) -> None:
        """Forget the gradients."""
        for one in self.learnables:
            one.master.grad = None
            one.parameter.grad = None

    def masters(self) -> dict[str, Tensor]:
        """Return what learns, in the precision of the optimiser, by stable name."""
        return {one.name: one.master.detach() for one in self.learnables}

    def state(self) -> dict[str, Tensor]:
        """Return the moments, by name."""
        tensors: dict[str, Tensor] = {}
        for one in self.learnables:
            for key, value in self.optimizer.state.get(one.master, {}).items():
                tensors[f"{one.name}//{key}"] = torch.as_tensor(value)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the moments of a checkpoint."""
        by_name: dict[str, dict[str, Any]] = {}
        for key, value in tensors.items():
            name, _, moment = key.rpartition("//")
            by_name.setdefault(name, {})[moment] = value
        for one in self.learnables:
            state = by_name.get(one.name)
            if state:
                self.optimizer.state[one.master] = {
                    key: value if key == "step" else value.to(one.master.device)
                    for key, value in state.items()
                }
