"""What a language model can do, tried out on the model itself.

    packs           several samples in one row, positions restarting, none seeing another
    pads_left       a batch of unequal prompts, filled up on the left
    crops_cache     its cache can be cut back and used again
    static_cache    it takes a cache of fixed size

Each is tried with a dozen tokens and compared with the plain way. What fails stands in
`reasons`; callers fall back and print it. Nothing here decides what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from mmlm.config import Config

_FIRST, _SECOND = 5, 8
# Padding, packing and caching change the order of additions and nothing else: up to 2e-6 was seen
# over fourteen tiny families in float32, a leak or a shifted position moves logits by 1e-2 or more.
_FLOAT32, _HALVES = 2e-4, 6e-2


class LanguageTraits(Config):
    """What a language model can do."""

    packs: bool
    """Several samples share a row: positions restart and no mask is passed, as transformers reads
    packed rows, or else with a block mask."""

    packs_by: str
    """How: `positions`, `mask` or `nothing`."""

    pads_left: bool
    """Rows filled up on the left give the same answers."""

    crops_cache: bool
    """The cache can be cut back to a shorter prefix."""

    static_cache: bool
    """A cache of fixed size gives the same answers."""

    window: int | None = None
    """The shortest sliding window: a cache that has outgrown it can no longer be cut back."""

    reasons: dict[str, str]
    """For each trait that is missing: what happened when it was tried."""

    def why_not(self, trait: str) -> str:
        """Say in one clause why a trait is missing; empty if it is there."""
        return self.reasons.get(trait, "")


_known: WeakKeyDictionary[Any, dict[str, LanguageTraits]] = WeakKeyDictionary()


def traits_of(model: Any) -> LanguageTraits:
    """Try out what a causal language model can do; kept for each model and attention backend.

    Args:
        model: A causal LM of transformers, or the joined model.
    """
    backend = str(getattr(model.config, "_attn_implementation", ""))
    known = _known.setdefault(model, {})
    if backend not in known:
        known[backend] = _tried(model)
    return known[backend]


def _tried(model: Any) -> LanguageTraits:
    import torch

    probe = _Probe(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    reasons: dict[str, str] = {}

    def holds(trait: str, attempt: Callable[[], float]) -> bool:
        try:
            difference = attempt()
        except Exception as error:  # whatever a model raises: it does not have the trait
            first = (str(error).strip().splitlines() or [""])[0]
            reasons[trait] = f"{type(error).__name__}: {first}"
            return False
        if difference > probe.tolerance:
            reasons[trait] = (
                f"logits move by {difference:.1e} of their size (allowed {probe.tolerance:.0e})"
            )
        return difference <= probe.tolerance

    with torch.no_grad():
        by_positions = holds("packs", probe.pack_by_positions)
        by_mask = not by_positions and holds("packs", probe.pack_by_mask)
        if by_mask:
            del reasons["packs"]
        found = {
            "pads_left": holds("pads_left", probe.pad_left),
            "crops_cache": holds("crops_cache", probe.crop_cache),
            "static_cache": holds("static_cache", probe.static_cache),
        }
    for module, training in modes.items():
        module.training = training
    return LanguageTraits(
        packs=by_positions or by_mask,
        packs_by="positions" if by_positions else "mask" if by_mask else "nothing",
        window=_window(model.config.get_text_config()),
        reasons=reasons,
        **found,
    )


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    return int(window) if window and used else None


class _Probe:
    """A few random tokens, and the ways to run them. Each way returns a relative difference."""

    def __init__(self, model: Any) -> None:
        import torch

        self._model = model
        weight = model.get_input_embeddings().weight
        self._device = weight.device
        self.tolerance = _FLOAT32 if weight.dtype == torch.float32 else _HALVES
        generator = torch.Generator().manual_seed(0)
        most = min(int(weight.shape[0]), 4096)
        ids = torch.randint(most, (1, _FIRST + _SECOND), generator=generator)
        image = getattr(model.config, "image_token_id", None)
        ids[ids == image] = 0 if image != 0 else 1
        self._ids = ids.to(self._device)
        self._first, self._second = self._ids[:, :_FIRST], self._ids[:, _FIRST:]

    def pack_by_positions(self) -> float:
        """Two samples in one row, no mask: transformers reads the borders off the positions."""
        return self._packed(None)

    def pack_by_mask(self) -> float:
        """Two samples in one row, with a block mask."""
        import torch

        sample = torch.tensor([0] * _FIRST + [1] * _SECOND, device=self._device)
        mask = (sample[:, None] == sample[None, :]).tril()
        return self._packed(mask[None, None])

    def _packed(self, mask: Any) -> float:
        import torch

        lengths = (_FIRST, _SECOND)
        positions = torch.cat([torch.arange(n, device=self._device) for n in lengths])[None]
        packed = self._model(
            input_ids=self._ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).logits
        return max(
            self._distance(packed[:, :_FIRST], self._alone(self._first)),
            self._distance(packed[:, _FIRST:], self._alone(self._second)),
        )

    def pad_left(self) -> float:
        """A short row and a long one in a batch, the short one filled up on the left."""
        import torch

        missing = _SECOND - _FIRST
        filler = self._first[:, :1].expand(1, missing)
        ids = torch.cat([torch.cat([filler, self._first], dim=1), self._second])
        mask = torch.ones_like(ids)
        mask[0, :missing] = 0
        settings: dict[str, Any] = {}
        if _takes_positions(self._model):
            settings["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **settings).logits
        return max(
            self._distance(logits[:1, missing:], self._alone(self._first)),
            self._distance(logits[1:], self._alone(self._second)),
        )

    def crop_cache(self) -> float:
        """Read a row, read on, cut the cache back, and read something else."""
        import torch

        cache = self._model(input_ids=self._first, use_cache=True).past_key_values
        self._model(input_ids=self._second[:, :3], past_key_values=cache, use_cache=True)
        cache.crop(-3)
        if cache.get_seq_length() != _FIRST:
            raise ValueError(f"the cache kept {cache.get_seq_length()} positions of {_FIRST}")
        other = self._second.flip(1)
        logits = self._model(input_ids=other, past_key_values=cache, use_cache=True).logits
        whole = self._alone(torch.cat([self._first, other], dim=1))
        return self._distance(logits, whole[:, _FIRST:])

    def static_cache(self) -> float:
        """Read a row and two more tokens into a cache of fixed size."""
        import torch
        from transformers import StaticCache

        cache = StaticCache(config=self._model.config.get_text_config(), max_cache_len=64)
        pieces = [self._first, self._second[:, :1], self._second[:, 1:2]]
        logits: list[Any] = []
        for piece in pieces:
            output = self._model(input_ids=piece, past_key_values=cache, use_cache=True)
            logits.append(output.logits)
        if cache.get_seq_length() != _FIRST + 2:
            raise ValueError("the model left the cache empty")
        return self._distance(torch.cat(logits, dim=1), self._alone(torch.cat(pieces, dim=1)))

    def _alone(self, ids: Any) -> Any:
        return self._model(input_ids=ids, use_cache=False).logits

    def _distance(self, one: Any, other: Any) -> float:
        return float((one - other).float().abs().max() / other.float().abs().max().clamp_min(1e-9))


def _takes_positions(model: Any) -> bool:
    """Whether `forward` names positions; a model without them counts for itself."""
    import inspect

    return "position_ids" in inspect.signature(model.forward).parameters
