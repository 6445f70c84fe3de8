"""A step rehearsed on tensors without contents: what it allocates.

PyTorch's fake tensors have shapes and no values. The same layers run on them as in the step that
is rehearsed, forward and backward, in a fraction of a second for each layer and in next to no
memory, also for a model that would not fit on this machine. Every allocation is counted while it
lives, so the highest count is the peak of the step; nothing about a family of models is assumed.

Not seen: what an allocator wastes, and scratch memory inside a kernel. Attention is rehearsed as
one causal call over the longest sample, whose kernel keeps no scores; how the samples of a row are
kept apart changes nothing about what is allocated.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmlm.features import VisionFeatures
from mmlm.modeling.attention import borders_given
from mmlm.training.precision import Precision

_REHEARSED = "mmlm_rehearsed"


@dataclass(frozen=True)
class RowShape:
    """What a row holds, as far as memory goes.

    Args:
        tokens: Its length.
        labels: How many of its positions are learnt.
        tiles: Image tiles that the encoder sees with it.
        encoded_at_once: Most tiles that the encoder takes in one pass; all of a row, if 0.
    """

    tokens: int
    labels: int
    tiles: int
    encoded_at_once: int = 0


@dataclass(frozen=True)
class Rehearsal:
    """What the steps allocate beside weights, float32 copies and moments, in bytes.

    Args:
        peak: The most, gradients included.
        gradients: What is left after a row: the gradients that wait for the optimiser.
    """

    peak: int
    gradients: int

    @property
    def activations(self) -> int:
        """The most beside the gradients that wait."""
        return max(self.peak - self.gradients, 0)


class Living(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside, as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.now, self.peak = 0, 0

    def never(self, tensors: Iterable[Tensor]) -> None:
        """Leave out what was there before."""
        self._known.update(tensor.untyped_storage() for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._see(one)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


class _Pass(nn.Module):
    """One row forward and backward, as far as it allocates: pixels to loss and gradients."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: RowShape, precision: Precision) -> None:
        """Compute the gradients of a row without contents.

        Both ways in one call, because layers that are computed twice run again on the way back.
        """
        with precision.context(torch.device("cpu")):
            loss = self._loss(row)
        if loss.requires_grad:
            loss.backward()

    def _loss(self, row: RowShape) -> Tensor:
        whole, parts = self.model, self.model.model
        embedding = parts.get_input_embeddings()
        ids = torch.zeros(1, row.tokens, dtype=torch.long)
        embedded = embedding(ids)
        features = self._features(row) if row.tiles else None
        if features is not None:
            seen = min(features.values.shape[0], row.tokens)
            start = features.values[:seen].to(embedded.dtype)[None]
            embedded = torch.cat([start, embedded[:, seen:]], dim=1)
        positions = torch.arange(row.tokens)[None]
        with borders_given(True):
            hidden = parts.language(
                inputs_embeds=embedded, position_ids=positions, use_cache=False
            ).last_hidden_state
        labels = max(1, min(row.labels, row.tokens))
        targets = torch.zeros(labels, dtype=torch.long)
        # Indexed as the real one, so that the same is copied and kept.
        chosen = hidden[:, torch.arange(labels)][0]
        return whole.lm_head(chosen, targets, None)

    def _features(self, row: RowShape) -> VisionFeatures:
        parts = self.model.model
        facts, side = parts.counter.facts, parts.counter.side
        at_once = row.encoded_at_once or row.tiles
        found: list[VisionFeatures] = []
        for start in range(0, row.tiles, at_once):
            num = min(at_once, row.tiles - start)
            pixels = torch.zeros(num, facts.channels, *side)
            found.append(parts.encode_images(pixels))
        grids = tuple(grid for one in found for grid in one.grids)
        values = torch.cat([one.values for one in found]) if len(found) > 1 else found[0].values
        return parts.connect(found[0] if len(found) == 1 else VisionFeatures(values, grids))


def rehearse(
    model: Any,
    learning: set[str],
    row: RowShape,
    *,
    precision: Precision,
    rows: int = 2,
) -> Rehearsal:
    """Rehearse rows of one step.

    Args:
        model: A composition of MMLM; its weights may be on any device, the meta device included.
        learning: Names of the parameters that learn.
        row: The largest row.
        precision: The number format, and whether gradients are added up in float32.
        rows: How many rows a step has; two stand for all that are more.

    Raises:
        RuntimeError: if a layer wants to know contents (a mixture of experts routes by them).
        NotImplementedError: for a composition that reads pictures between its layers.
    """
    if model.model.injection is not None or model.model.counter.is_flat:
        raise NotImplementedError("the language model reads this picture between its layers")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    living = Living()
    with _attention(model), fake:
        tensors = {
            f"model.{name}": _fake(parameter, precision.dtype, learns=name in learning)
            for name, parameter in model.named_parameters()
        }
        learnt = [tensors[f"model.{name}"] for name in sorted(learning)]
        stand_ins = tensors | {
            f"model.{name}": _fake(buffer, buffer.dtype) for name, buffer in model.named_buffers()
        }
        living.never(stand_ins.values())
        gradients: dict[int, Tensor] = {}
        with _flags(model, learning), living:
            for _ in range(min(rows, 2)):
                functional_call(_Pass(model), stand_ins, (row, precision))
                _collect(learnt, gradients, precision)
        return Rehearsal(living.peak, living.now)


def _collect(learnt: Sequence[Tensor], gradients: dict[int, Tensor], precision: Precision) -> None:
    """Add gradients up in float32, one after another, as the optimiser does after each row."""
    for number, one in enumerate(learnt):
        if one.grad is None or one.dtype == torch.float32 or not precision.keep_copies:
            continue
        if number in gradients:
            gradients[number].add_(one.grad)
        else:
            gradients[number] = one.grad.float()
        one.grad = None


def _fake(tensor: Tensor, dtype: torch.dtype, *, learns: bool = False) -> Tensor:
    """Return a stand-in on the CPU without contents; numbers that are not rounded keep theirs."""
    rounded = dtype if tensor.is_floating_point() else tensor.dtype
    made = torch.empty(tuple(tensor.shape), dtype=rounded)
    return nn.Parameter(made, requires_grad=True) if learns else made


@contextmanager
def _flags(model: nn.Module, learning: set[str]) -> Generator[None]:
    """Let the real parameters say what learns while their stand-ins compute, then as before."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in learning)
    model.train()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        for module, training in modes.items():
            module.training = training


@contextmanager
def _attention(model: Any) -> Generator[None]:
    """Set the attention of the language model that needs no borders, then as before."""
    language = model.model.language
    before = str(getattr(language.config, "_attn_implementation", "sdpa"))
    language.set_attn_implementation(_REHEARSED)
    try:
        yield
    finally:
        language.set_attn_implementation(before)


def _one_segment(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally over the whole row."""
    del module, attention_mask, kwargs
    grouped = query.shape[1] != key.shape[1]
    found = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    # The samples of a real row are put together by a copy.
    return torch.cat([found], dim=2).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_REHEARSED, _one_segment)
