"""AdamW over float32 copies of what learns, with a rate for each part.

In bf16 the model computes with half-precision weights while the optimiser owns a float32
copy of every weight that learns: small updates are kept, and gradients of many rows are
added up in float32. In fp32 the copy is the weight itself. Where FSDP2 has spread the weights
over ranks, the optimiser of each rank moves its own pieces and knows no others. `Optimizer` is
what a stage needs of any optimiser; `zero` has the other one. Nothing here knows the data.

In fp16 gradients below 6e-8 would be nothing, so the loss is multiplied by a power of two and the
float32 sums divided by it (Micikevicius et al. 2018, arXiv 1710.03740). Where a gradient is too
large for float16, the step is taken again with half the factor: none is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmlm.language.four_bits import load_bitsandbytes
from mmlm.training.learning import plain_name
from mmlm.training.parallel import Engine

_FIRST_SCALE, _LARGEST_SCALE, _STEPS_BEFORE_RAISE = 2.0**16, 2.0**24, 1000
_SCALE = "loss//scale"


def stable_name(name: str) -> str:
    """Return a name that stays the same under wrappers and adapters; checkpoints use it."""
    return plain_name(name).replace(".base_layer.", ".")


class Moved(NamedTuple):
    """What a step of an optimiser did.

    Args:
        norm: The length of the gradient over all ranks, before it was shortened.
        moved: False if the gradient was not a number: the weights stand where they stood.
    """

    norm: float
    moved: bool


class Optimizer(Protocol):
    """What a stage needs of an optimiser. Every method is called on every rank."""

    def loss_of(
        self,
        objective: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items: float,
        *,
        is_last: bool,
    ) -> Tensor:
        """Return the loss of one row; `is_last` of the step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one row."""
        ...

    def step(self, factor: float, most: float | None, *, may_move: bool) -> Moved:
        """Shorten the gradient to `most`, move the weights, and forget the gradient."""
        ...

    def step_again(self) -> bool:
        """Whether a step that was not taken because of its gradient may be tried once more."""
        ...

    def forget(self) -> None:
        """Forget the gradient."""
        ...

    def masters(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Return what learns, whole, in float32, by stable name; nothing if not `keep`."""
        ...

    def state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Return the moments, whole, by name; nothing if not `keep`."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the moments of a checkpoint."""
        ...

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights, by stable name."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...


@dataclass
class Learnable:
    """One parameter that learns, and the float32 values that the optimiser moves.

    Where weights are spread over ranks, `master` is the piece of this rank.
    """

    name: str
    parameter: nn.Parameter
    master: Tensor
    peak_lr: float
    has_copy: bool

    @property
    def own(self) -> Tensor:
        """The part of the parameter that this rank holds, in the parameter's own memory."""
        return local(self.parameter.detach())

    def collect(self, scale: float = 1.0) -> None:
        """Move the gradient of the parameter, divided by `scale`, to the float32 values."""
        gradient = self.parameter.grad
        if gradient is None or self.master is self.parameter:
            return
        piece = local(gradient)
        if self.master.grad is None:
            total = piece.float()
            self.master.grad = total if scale == 1.0 else total.div_(scale)
        else:
            self.master.grad.add_(piece.float(), alpha=1.0 / scale)
        self.parameter.grad = None

    def whole(self, piece: Tensor) -> Tensor:
        """Return what all ranks hold of a value with the shape of this parameter."""
        parameter: Any = self.parameter
        if not isinstance(parameter, DTensor):
            return piece
        spread = DTensor.from_local(
            piece, parameter.device_mesh, parameter.placements, run_check=False,
            shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip
        return spread.full_tensor()

    def piece(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a value with the shape of this parameter."""
        parameter: Any = self.parameter
        if not isinstance(parameter, DTensor):
            return whole.to(parameter.device)
        return distribute_tensor(
            whole.to(parameter.device), parameter.device_mesh, parameter.placements,
            src_data_rank=None,
        ).to_local()  # fmt: skip


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds: all of it, unless it is spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MasterAdamW:
    """AdamW whose moments and weights are float32, whatever the model computes in.

    Args:
        parameters: Name and parameter of what learns.
        engine: Adds up over ranks.
        rates: The peak rate of each name.
        masters: What has learnt in an earlier stage or a checkpoint, by stable name.
        betas: Averaging.
        weight_decay: Decay of matrices; vectors have none.
        keep_copies: False moves the model's own weights, in their own precision.
        kind: `adamw`, or `adamw_8bit` for moments in 8 bits.

    Raises:
        MissingExtraError: if moments are to have 8 bits and bitsandbytes is not installed.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        engine: Engine,
        rates: Mapping[str, float],
        masters: Mapping[str, Tensor],
        betas: tuple[float, float],
        weight_decay: float,
        keep_copies: bool = True,
        kind: str = "adamw",
    ) -> None:
        self._engine, self._kind = engine, kind
        self.learnables = [
            _learnable(name, parameter, rates[name], masters, keep_copies)
            for name, parameter in parameters
        ]
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for one in self.learnables:
            decays = one.parameter.ndim >= 2
            groups.setdefault((one.peak_lr, decays), []).append(one.master)
        words = [
            {"params": tensors, "lr": peak, "peak_lr": peak,
             "weight_decay": weight_decay if decays else 0.0}
            for (peak, decays), tensors in groups.items()
        ]  # fmt: skip
        self.optimizer: Any = (
            torch.optim.AdamW(words, betas=betas, fused=True) if kind == "adamw"
            else eight_bit_adamw(words, betas)
        )  # fmt: skip
        is_half = all(one.parameter.dtype == torch.float16 for one in self.learnables)
        self.scale, self._good_steps = (_FIRST_SCALE if is_half else 1.0), 0

    def loss_of(
        self,
        objective: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items: float,
        *,
        is_last: bool,
    ) -> Tensor:
        """Return the loss of one row."""
        del is_last
        return objective.loss(model, inputs, num_items)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one row to the float32 sums."""
        # A row of text alone reaches nothing that learns while only the connector does.
        if loss.requires_grad:
            (loss if self.scale == 1.0 else loss * self.scale).backward()
            for one in self.learnables:
                one.collect(self.scale)

    def _gradients(self) -> list[Tensor]:
        """Return the gradient of every learnable, zeros where nothing reached it."""
        for one in self.learnables:
            if one.master.grad is None:
                one.master.grad = torch.zeros_like(one.master)
        return [one.master.grad for one in self.learnables if one.master.grad is not None]

    def _shorten(self, gradients: list[Tensor], most: float | None) -> float:
        """Shorten the gradient to `most`, if it is longer; return its length before that."""
        norm = torch.linalg.vector_norm(
            torch.stack([g.norm(dtype=torch.float32) for g in gradients])
        )
        if self._engine.shards_weights:
            norm = torch.tensor(math.sqrt(self._engine.add_up([float(norm) ** 2])[0]))
        if most is not None:
            factor = (most / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].device)
            for gradient in gradients:
                gradient.mul_(factor)
        return float(norm)

    def step(self, factor: float, most: float | None, *, may_move: bool) -> Moved:
        """Move the weights with `factor` times their peak rates, and forget the gradients."""
        gradients = self._gradients()
        if not self._engine.shards_weights:
            self._engine.add_up_gradients(gradients)
        norm = self._shorten(gradients, most)
        moved = may_move and math.isfinite(norm)
        if moved:
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            self.optimizer.step()
            for one in self.learnables:
                if one.has_copy:
                    one.own.copy_(one.master.data)
            self._good_steps += 1
            if self.scale > 1.0 and self._good_steps % _STEPS_BEFORE_RAISE == 0:
                self.scale = min(2 * self.scale, _LARGEST_SCALE)
        self.forget()
        return Moved(norm, moved)

    def step_again(self) -> bool:
        """Halve what the loss is multiplied by, if it is; the step may be tried once more."""
        if self.scale <= 1.0:
            return False
        self.scale, self._good_steps = self.scale / 2, 0
        return True

    def forget(self) -> None:
        """Forget the gradients."""
        for one in self.learnables:
            one.master.grad = None
            one.parameter.grad = None

    def masters(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Return what learns, in the precision of the optimiser, by stable name."""
        return self._whole({one.name: (one, one.master.detach()) for one in self.learnables}, keep)

    def state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Return the moments, by name."""
        tensors: dict[str, Tensor] = {}
        if self.scale > 1.0:
            tensors[_SCALE] = torch.tensor([self.scale, float(self._good_steps)])
        moments: dict[str, tuple[Learnable, Tensor]] = {}
        for one in self.learnables:
            for key, value in self.optimizer.state.get(one.master, {}).items():
                if key == "step":
                    tensors[f"{one.name}//{key}"] = torch.as_tensor(value)
                else:
                    moments[f"{one.name}//{key}"] = (one, value)
        return (tensors if keep else {}) | self._whole(moments, keep)

    def _whole(
        self, pieces: Mapping[str, tuple[Learnable, Tensor]], keep: bool
    ) -> dict[str, Tensor]:
        """Put values together from all ranks, one after another; on the CPU if they are spread."""
        if not self._engine.shards_weights:
            return {name: piece for name, (_, piece) in pieces.items()} if keep else {}
        found: dict[str, Tensor] = {}
        for name, (one, piece) in pieces.items():
            # Every rank waits for the values here, also one that does not keep them.
            whole = one.whole(piece).to("cpu", copy=True)
            if keep:
                found[name] = whole
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the moments of a checkpoint."""
        by_name: dict[str, dict[str, Any]] = {}
        if _SCALE in tensors:
            self.scale, self._good_steps = float(tensors[_SCALE][0]), int(tensors[_SCALE][1])
        for key, value in tensors.items():
            name, _, moment = key.rpartition("//")
            by_name.setdefault(name, {})[moment] = value
        for one in self.learnables:
            state = by_name.get(one.name)
            if state:
                self.optimizer.state[one.master] = {
                    key: one.piece(value) if key != "step" else self._count(value)
                    for key, value in state.items()
                }

    def _count(self, steps: Tensor) -> Tensor | int:
        """Return a count of steps as the optimiser keeps it."""
        return steps if self._kind == "adamw" else int(steps)

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights, by stable name."""
        with torch.no_grad():
            for one in self.learnables:
                if one.name in weights:
                    piece = one.piece(weights[one.name])
                    one.own.copy_(piece)
                    if one.has_copy:
                        one.master.copy_(piece)

    def close(self) -> None:
        """Nothing holds the model."""


def eight_bit_adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> Any:
    """Return AdamW with moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861).

    Raises:
        MissingExtraError: if bitsandbytes is not installed.
    """
    library = load_bitsandbytes("optimizer: adamw_8bit")
    return library.optim.AdamW8bit(groups, betas=betas)


def _learnable(
    name: str,
    parameter: nn.Parameter,
    peak_lr: float,
    masters: Mapping[str, Tensor],
    keep_copies: bool,
) -> Learnable:
    stable = stable_name(name)
    known = masters.get(stable)
    one = Learnable(stable, parameter, parameter, peak_lr, has_copy=False)
    if known is not None:
        known = one.piece(known)
        one.own.copy_(known)
    if parameter.dtype == torch.float32 or not keep_copies:
        if isinstance(parameter, DTensor):
            one.master = one.own.requires_grad_()
        return one
    source = one.own if known is None else known
    one.master, one.has_copy = source.float().clone().requires_grad_(), True
    return one
