"""The language model's head: logits for whoever asks, or the loss alone.

The loss needs no logits of positions without a label, and never all logits at once: `Head`
takes the labelled positions only, chunk by chunk, and computes the gradients in the same
pass, so that no logits are kept for the backward pass. The idea is that of fused linear
cross-entropy (Liger Kernel, Hsu et al. 2024, arXiv 2410.10989), here in plain PyTorch; where
Liger's own kernel can run, `head_liger` calls it. As the weight is read in the forward pass only,
it works where the weight is sharded (ZeRO-3, FSDP).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from mmlm.language import HeadRule
from mmlm.modeling.head_liger import fused_loss, missing

CHUNK_POSITIONS = 512
_watching: ContextVar[list[Tensor] | None] = ContextVar("watching", default=None)


@contextmanager
def watched_losses() -> Generator[list[Tensor]]:
    """Give a list that fills with the loss of each labelled position, in order, detached.

    It costs nothing more: these numbers are made on the way to their sum.
    """
    found: list[Tensor] = []
    token = _watching.set(found)
    try:
        yield found
    finally:
        _watching.reset(token)


class Head(nn.Linear):
    """A linear map to the vocabulary that can also compute the loss without keeping logits.

    Args:
        width: Width of the language model.
        vocabulary: Number of rows of the output embedding.
        rule: What the language model does to its logits (soft cap, scale).
        bias: Whether the head has a bias.
    """

    def __init__(self, width: int, vocabulary: int, *, rule: HeadRule, bias: bool = False) -> None:
        super().__init__(width, vocabulary, bias=bias)
        self.rule = rule

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden: Float[Tensor, "*batch width"],
        targets: Int[Tensor, " positions"] | None = None,
        weights: Float[Tensor, " positions"] | None = None,
    ) -> Tensor:
        """Return logits, or with `targets` the summed loss of labelled positions.

        Shapes:
            hidden: ``(…, width)``; with targets ``(positions, width)``
            targets: ``(positions,)``, no ignored values among them
            weights: ``(positions,)``, a factor for each position's loss
            returns: ``(…, vocabulary)``, or a scalar in float32
        """
        if targets is None:
            return self.rule.apply(linear(hidden, self.weight, self.bias))
        return head_loss(hidden, self.weight, self.bias, targets, weights, self.rule)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    rule: HeadRule,
) -> Tensor:
    """Return the summed cross-entropy of labelled positions, no logits kept.

    Shapes:
        hidden: ``(positions, width)``
        weight: ``(vocabulary, width)``
        targets: ``(positions,)``, no ignored values among them
        weights: ``(positions,)``, a factor for each position's loss; None counts each once
        returns: a scalar in float32
    """
    if weights is None:
        weights = torch.ones(targets.shape, dtype=torch.float32, device=targets.device)
    return _LossAlone.apply(hidden, weight, bias, targets, weights, rule)


def labelled_loss(
    loss_of: Callable[..., Tensor],
    hidden: Float[Tensor, "batch tokens width"],
    labels: Int[Tensor, "batch tokens"] | None,
    weights: Float[Tensor, "batch tokens"] | None,
    num_items: Tensor | float | int | None,
) -> Tensor:
    """Send only the positions that predict a label through the head; return the mean loss.

    Args:
        loss_of: From hidden states, targets and weights to the summed loss.
        hidden: The last hidden states.
        labels: What is learnt, not shifted; -100 is not.
        weights: A factor for each label's loss, beside the labels.
        num_items: What the sum is divided by; the labels or weights here when left out.
    """
    if labels is None:
        raise ValueError("`loss_only` needs `labels`.")
    learnt = labels[:, 1:] != -100
    targets = labels[:, 1:][learnt]
    factors = None if weights is None else weights[:, 1:][learnt]
    total = loss_of(hidden[:, :-1][learnt], targets, factors)
    if num_items is None:
        num_items = max(targets.numel(), 1) if factors is None else factors.sum().clamp(min=1e-9)
    return total / num_items


def without_first_of_each(labels: Tensor, borders: Tensor) -> Tensor:
    """The first token of a packed sample would be predicted from the sample before it."""
    labels = labels.clone()
    labels[0, borders[:-1].long()] = -100
    return labels


def loss_by_piece(
    hidden: Tensor, labels: Tensor, borders: Tensor | None, loss_of: Callable[..., Tensor]
) -> Tensor:
    """Return the summed cross-entropy of each piece: of a packed row, or of each padded one.

    Shapes:
        hidden: ``(batch, tokens, width)``
        labels: ``(batch, tokens)``, not shifted; -100 is not learnt
        borders: ``(pieces + 1,)`` of the one row, or None where each row is a piece
        returns: ``(pieces,)`` in float32

    Args:
        hidden: The last hidden states.
        labels: What is learnt.
        borders: Where the pieces of a packed row begin, and the end.
        loss_of: From hidden states and targets to the summed loss.
    """
    if borders is None:
        pieces = list(zip(hidden, labels, strict=True))
    else:
        lengths = borders.diff().tolist()
        pieces = list(zip(hidden[0].split(lengths), labels[0].split(lengths), strict=True))
    losses: list[Tensor] = []
    for states, wanted in pieces:
        learnt = wanted[1:] != -100
        losses.append(loss_of(states[:-1][learnt], wanted[1:][learnt]))
    return torch.stack(losses)


class _LossAlone(torch.autograd.Function):
    """Summed cross-entropy of `linear(hidden, weight, bias)`, gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        rule: HeadRule,
    ) -> Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            low = torch.get_autocast_dtype(hidden.device.type)
            compute = tuple(None if t is None else t.detach().to(low) for t in (weight, bias))
        else:
            compute = tuple(None if t is None else t.detach() for t in (weight, bias))
        wants = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
        sums = _Sums(hidden, weight, bias, wants)
        # Autocast is off inside: the chunk is cast once, here, and not again by every matmul.
        is_fused = missing(hidden.device, rule) is None
        size, chunk = (
            (max(targets.shape[0], 1), _all_fused) if is_fused else (CHUNK_POSITIONS, _chunk)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, targets.shape[0], size):
                rows = slice(start, start + size)
                sums.add(
                    rows, *chunk(hidden[rows], compute, targets[rows], weights[rows], rule, wants)
                )
        ctx.save_for_backward(*(t for t in sums.gradients() if t is not None))
        ctx.kept = [tensor is not None for tensor in sums.gradients()]
        return sums.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = iter(ctx.saved_tensors)
        gradients = [
            (tensor := next(saved)) * grad.to(tensor.dtype) if kept else None for kept in ctx.kept
        ]
        return (*gradients, None, None, None)


class _Sums:
    """The loss and the gradients, summed over chunks."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: list[bool]
    ) -> None:
        self.loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        self.of_hidden = torch.empty_like(hidden) if wants[0] else None
        self.of_weight: Tensor | None = None
        self.of_bias: Tensor | None = None
        self._dtypes = (weight.dtype, None if bias is None else bias.dtype)
        self._empty = (weight, bias, wants)

    def add(self, rows: slice, loss: Tensor, gradients: list[Tensor | None]) -> None:
        """Add one chunk."""
        self.loss += loss
        of_hidden, of_weight, of_bias = gradients
        if self.of_hidden is not None and of_hidden is not None:
            self.of_hidden[rows] = of_hidden
        # One chunk stays in its own precision; more are summed in float32, as one matmul would.
        if of_weight is not None:
            self.of_weight = _sum(self.of_weight, of_weight)
        if of_bias is not None:
            self.of_bias = _sum(self.of_bias, of_bias)

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of hidden, weight and bias, zeros where there was no chunk."""
        weight, bias, wants = self._empty
        of_weight, of_bias = self.of_weight, self.of_bias
        if wants[1] and of_weight is None:
            of_weight = torch.zeros_like(weight)
        if wants[2] and of_bias is None and bias is not None:
            of_bias = torch.zeros_like(bias)
        return [
            self.of_hidden,
            None if of_weight is None else of_weight.to(self._dtypes[0]),
            None if of_bias is None else of_bias.to(self._dtypes[1]),
        ]


def _sum(total: Tensor | None, chunk: Tensor) -> Tensor:
    if total is None:
        return chunk
    return total.float().add_(chunk)


def _chunk(
    hidden: Tensor,
    parameters: tuple[Tensor | None, ...],
    targets: Tensor,
    weights: Tensor,
    rule: HeadRule,
    wants: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss of one chunk and its gradients by hidden, weight and bias.

    The gradient of cross-entropy by the logits is the softmax less one at the target: it is made
    in the memory of the float32 logits, so that a chunk has one float32 copy of them and no more;
    what is read no more is let go before anything new is made.
    """
    weight, bias = parameters
    assert weight is not None
    hidden = hidden.detach().to(weight.dtype)
    with torch.enable_grad():
        raw = linear(hidden, weight, bias).requires_grad_(any(wants))
        logits = rule.apply(raw)
    shares = logits.detach().float()
    if logits is not raw and logits.dtype == torch.float32:
        shares = shares.clone()  # what bends the logits still needs them
    losses, shares = _softmax_loss(shares, targets)
    if (found := _watching.get()) is not None:
        found.append(losses)
    loss = (losses * weights).sum()
    if not any(wants):
        return loss, [None, None, None]
    dtype, bent = logits.dtype, None if logits is raw else (raw, logits)
    del raw, logits
    shares[torch.arange(targets.shape[0], device=targets.device), targets] -= 1.0
    of_raw = shares.mul_(weights[:, None].float()).to(dtype)
    del shares
    if bent is not None:
        (of_raw,) = torch.autograd.grad(bent[1], bent[0], of_raw)
    return loss, [
        of_raw @ weight if wants[0] else None,
        of_raw.T @ hidden if wants[1] else None,
        of_raw.sum(0) if wants[2] else None,
    ]


def _all_fused(
    hidden: Tensor,
    parameters: tuple[Tensor | None, ...],
    targets: Tensor,
    weights: Tensor,
    rule: HeadRule,
    wants: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return what `_chunk` returns, of all positions at once, by Liger's kernel."""
    weight, bias = parameters
    assert weight is not None
    losses, gradients = fused_loss(
        hidden.detach().to(weight.dtype), weight, bias, targets, weights.float(), rule, wants
    )
    if (found := _watching.get()) is not None:
        found.append(losses)
    return (losses * weights).sum(), gradients


def _softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Turn float32 logits into their softmax, in place; return each row's cross-entropy too.

    Shapes:
        logits: ``(positions, vocabulary)``; becomes the softmax
        targets: ``(positions,)``
        returns: ``(positions,)`` and ``(positions, vocabulary)``
    """
    at_target = logits.gather(1, targets[:, None])[:, 0]
    most = logits.amax(dim=1)
    logits.sub_(most[:, None]).exp_()
    total = logits.sum(dim=1)
    losses = total.log() + most - at_target
    return losses, logits.div_(total[:, None])
