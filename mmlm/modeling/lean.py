"""Norms and gated MLPs that keep less for the backward pass, with the same results.

An RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467) as transformers writes it keeps its input in
float32 and what it made of it; a gated MLP (Shazeer 2020, arXiv 2002.05202) keeps the bent gate
and the product. All of that is made again in the backward pass from what is kept anyway, which is
cheap: it is arithmetic on single numbers, no matrix product (Korthikanti et al. 2022, arXiv
2205.05198, call it selective recomputation). The forward pass has the same bits as before.

A layer is changed only if it is of a known form and gives those bits on random numbers; all others
stay what they are. Where whole layers are computed again (gradient checkpointing) the product is
kept: it lives for one layer alone. Compiled models gain nothing from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROBE_ROWS = 3
_ROWS_AT_ONCE = 512


def keep_less(model: nn.Module, *, recomputes: bool = False) -> int:
    """Let the norms and MLPs of a model keep less while it learns; return how many were changed.

    Weights, their names and the results stay. What was changed before is not changed again.

    Args:
        model: Any model.
        recomputes: Whether whole layers are computed again in the backward pass.
    """
    changed = 0
    proven: dict[Any, type[nn.Module] | None] = {}
    for module in model.modules():
        if isinstance(module, _Lean):
            continue
        for form in (LeanNorm, LeanMLP):
            if not form.suits(module):
                continue
            key = (form, *form.sort_of(module))
            if key not in proven:
                proven[key] = form.lean_class(module, recomputes=recomputes)
            lean = proven[key]
            if lean is not None:
                module.__class__ = lean
                changed += 1
    return changed


def keep_all(model: nn.Module) -> None:
    """Make the layers of a model again what they were before `keep_less`."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, _Lean):
            module.__class__ = type(module).plain  # type: ignore[assignment]


class _Lean(nn.Module):
    """A layer that keeps less.

    Attributes:
        plain: The class that it had before.
        rule: How it computes, where there are several ways.
    """

    plain: type[nn.Module]
    rule: str

    def _plainly(self, *arguments: Any) -> Tensor:
        return self.plain.forward(self, *arguments)


class LeanNorm(_Lean):
    """An RMS norm that keeps its input as it came, and one number a row."""

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether a module looks like an RMS norm."""
        own = dict(module.named_parameters(recurse=False))
        is_norm = type(module).__name__.endswith("RMSNorm") and list(own) == ["weight"]
        return is_norm and own["weight"].dim() == 1 and _eps_of(module) is not None

    @classmethod
    def sort_of(cls, module: Any) -> tuple[Any, ...]:
        """Return what decides about its form."""
        return type(module), module.weight.dtype, module.weight.shape[0] > 0

    @classmethod
    def lean_class(cls, module: nn.Module, *, recomputes: bool) -> type[nn.Module] | None:
        """Return the class with the rule that gives the module's bits, or None."""
        del recomputes
        rule = next((rule for rule in _RULES if cls._proven(module, rule)), None)
        return None if rule is None else _class_of(cls, type(module), rule)

    @classmethod
    @torch.no_grad()
    def _proven(cls, module: Any, rule: str) -> bool:
        plain: Any = copy.deepcopy(module)
        weight = plain.weight
        if weight.is_meta or weight.numel() == 0:
            return False
        draw = torch.Generator().manual_seed(0)
        weight.copy_(torch.randn(weight.shape, generator=draw))
        given = torch.randn(_PROBE_ROWS, *weight.shape, generator=draw)
        given = given.to(weight.device, weight.dtype)
        ours = _normed(given, weight, float(_eps_of(module) or 0.0), rule)[0]
        return _same_bits(plain(given), ours)

    def forward(self, hidden: Tensor) -> Tensor:
        """Norm the last axis; shapes stay."""
        if not torch.is_grad_enabled():
            return self._plainly(hidden)
        return _Norm.apply(hidden, self.weight, _eps_of(self), self.rule)


class LeanMLP(_Lean):
    """A gated MLP that keeps what its gate and its up projection gave, and no more."""

    @classmethod
    def suits(cls, module: Any) -> bool:
        """Whether a module has the parts of a gated MLP and no others that could be used."""
        children = {name for name, _ in module.named_children()}
        parts = {"gate_proj", "up_proj", "down_proj"}
        return parts <= children <= parts | {"act_fn"} and callable(getattr(module, "act_fn", None))

    @classmethod
    def sort_of(cls, module: Any) -> tuple[Any, ...]:
        """Return what decides about its form."""
        return type(module), type(module.act_fn), str(module.act_fn)

    @classmethod
    def lean_class(cls, module: nn.Module, *, recomputes: bool) -> type[nn.Module] | None:
        """Return the class, or None where the module does something else."""
        if not cls._proven(module):
            return None
        return _class_of(cls, type(module), "product kept" if recomputes else "product made again")

    @classmethod
    @torch.no_grad()
    def _proven(cls, module: Any) -> bool:
        weight = next(module.gate_proj.parameters(), None)
        width = getattr(module.gate_proj, "in_features", 0)
        if weight is None or weight.is_meta or weight.numel() == 0 or not width:
            return False
        dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
        draw = torch.Generator().manual_seed(0)
        given = torch.randn(_PROBE_ROWS, width, generator=draw).to(weight.device, dtype)
        product = module.act_fn(module.gate_proj(given)) * module.up_proj(given)
        return _same_bits(module(given), module.down_proj(product))

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the MLP to the last axis; shapes stay."""
        if not torch.is_grad_enabled():
            return self._plainly(hidden)
        parts: Any = self
        gate, up = parts.gate_proj(hidden), parts.up_proj(hidden)
        bent = _Bent(parts.act_fn)
        product = _Product.apply(gate, up, bent, parts.act_fn)
        if self.rule == "product kept":
            return parts.down_proj(product)
        with _made_again(product, gate.detach(), up.detach(), bent, parts.down_proj):
            return parts.down_proj(product)


def _eps_of(module: Any) -> float | None:
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in found if isinstance(value, float)), None)


@cache
def _class_of(form: type[_Lean], plain: type[nn.Module], rule: str) -> type[nn.Module]:
    """Return a class with the name of the plain one: others ask for names."""
    return type(plain.__name__, (form, plain), {"plain": plain, "rule": rule})


def _same_bits(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.dtype == other.dtype and torch.equal(one, other)


_RULES = ("cast, then weigh", "weigh, then cast", "weigh by one more, then cast")
"""How Llama, OLMo 2 and Gemma go from the normed float32 numbers to the result."""


def _normed(hidden: Tensor, weight: Tensor, eps: float, rule: str) -> tuple[Tensor, Tensor]:
    """Return the result of a norm, and the reciprocal length of each row.

    Shapes:
        hidden: ``(…, width)``
        weight: ``(width,)``
        returns: ``(…, width)`` and ``(…, 1)`` in float32
    """
    full = hidden.float()
    scale = torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + eps)
    normed = full * scale if full is hidden else full.mul_(scale)
    if rule == "cast, then weigh":
        return weight * normed.to(hidden.dtype), scale
    if rule == "weigh, then cast":
        return (weight * normed).to(hidden.dtype), scale
    return (normed * (1.0 + weight.float())).to(hidden.dtype), scale


class _Norm(torch.autograd.Function):
    """An RMS norm that keeps its input as it came; the backward pass computes in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, rule: str) -> Tensor:
        result, scale = _normed(hidden, weight, eps, rule)
        ctx.save_for_backward(hidden, weight, scale)
        ctx.rule = rule
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, scale = ctx.saved_tensors
        factor = weight.float() + 1.0 if ctx.rule == _RULES[2] else weight.float()
        width = hidden.shape[-1]
        rows, grads = hidden.reshape(-1, width), grad.reshape(-1, width)
        of_hidden = torch.empty_like(rows)
        of_weight = torch.zeros_like(factor)
        # Block by block, so that what is made on the way stays in the processor's cache.
        for block in _blocks(rows):
            scales = scale.reshape(-1, 1)[block]
            normed = rows[block].float() * scales
            given = grads[block].float()
            by_number = given * normed
            of_weight += by_number.sum(0)
            along = (by_number @ factor).div_(-width)
            given = given * factor
            of_hidden[block] = given.addcmul_(normed, along[:, None]).mul_(scales)
        return (
            of_hidden.view(hidden.shape) if ctx.needs_input_grad[0] else None,
            of_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = _ROWS_AT_ONCE if rows.device.type == "cpu" else max(rows.shape[0], 1)
    for start in range(0, rows.shape[0], size):
        yield slice(start, start + size)


class _Bent:
    """What an activation makes of a gate: made for the product, and kept until its gradient.

    It holds no gate: what the backward pass has used must be let go at once.

    Args:
        act: The activation.
    """

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        self._act = act
        self._made: tuple[Tensor, Tensor] | None = None

    def made(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gate as a leaf, and its activation with the way back to it."""
        if self._made is None:
            with torch.enable_grad():
                leaf = gate.detach().requires_grad_()
                self._made = leaf, self._act(leaf)
        return self._made

    def taken(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same and keep it no longer."""
        found, self._made = self.made(gate), None
        return found


class _Product(torch.autograd.Function):
    """``act(gate) * up`` that keeps gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, bent: _Bent, act: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.bent = bent
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        leaf, bent = ctx.bent.taken(gate)
        (of_gate,) = torch.autograd.grad(bent, leaf, grad * up)
        return of_gate, grad * bent.detach(), None, None


def _made_again(
    product: Tensor, gate: Tensor, up: Tensor, bent: _Bent, down: nn.Module
) -> saved_tensors_hooks:
    """Keep the parts of a product in place of it, for the down projection called inside."""
    storage = StorageWeakRef(product.untyped_storage())

    def pack(tensor: Tensor) -> Any:
        kept = StorageWeakRef(tensor.untyped_storage())
        if kept == storage:
            return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        for weight in down.parameters():
            # What is handed in is an alias. Where weights are spread (ZeRO-3) it would hold the
            # whole weight until the backward pass; the parameter itself is emptied and filled.
            if weight.shape == tensor.shape and StorageWeakRef(weight.untyped_storage()) == kept:
                return weight
        return tensor

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return (bent.made(gate)[1].detach() * up).as_strided(*kept)

    return saved_tensors_hooks(pack, unpack)
