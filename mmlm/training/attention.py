"""Which attention a run uses, chosen with a printed reason and proven on the model itself.

Packed rows need attention that stays inside each sample. Before the first step the run puts
two samples into one row, changes the first, and looks whether the second sees it, and whether
each has the loss that it has alone. A model for which that fails is not packed.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmlm.errors import ConfigError, TrainingError
from mmlm.modeling import SEGMENTS, MMLMForConditionalGeneration
from mmlm.training.recipe import RunConfig

_LENGTHS = (7, 12)
# Packing changes the order of additions and nothing else. A leak moves logits by whole units.
_LARGEST_LEAK = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class AttentionChoice(NamedTuple):
    """Which backend, whether rows are packed, and why."""

    backend: str
    packed: bool
    reason: str


class Isolation(NamedTuple):
    """What the proof measured, relative to the size of the logits."""

    leak: float
    difference: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the samples of a row are kept apart."""
        return max(self.leak, self.difference) <= self.limit


def choose_attention(
    model: MMLMForConditionalGeneration, run: RunConfig, device: torch.device
) -> AttentionChoice:
    """Choose and set the attention of the language model, and prove that it keeps samples apart.

    Raises:
        ConfigError: if packing was asked for and this model cannot be packed.
    """
    before = str(getattr(model.model.language.config, "_attn_implementation", "sdpa"))
    backend, reason = _backend(run, device)
    if run.packing == "padded":
        name = "sdpa" if backend == SEGMENTS else backend
        set_attention(model, name)
        return AttentionChoice(name, False, "padded, as the recipe says")
    try:
        set_attention(model, backend)
        isolation = prove_isolation(model)
        failure = None if isolation.holds else f"samples in one row see each other ({isolation})"
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        failure = f"the language model does not take packed rows ({error})"
    if failure is None:
        return AttentionChoice(backend, True, reason)
    if run.packing == "packed":
        raise ConfigError(f"run.packing is packed, but {failure}. Use run.packing: auto.")
    set_attention(model, before)
    return AttentionChoice(before, False, f"padded, because {failure}")


def _backend(run: RunConfig, device: torch.device) -> tuple[str, str]:
    names = {"auto": "", "segments": SEGMENTS, "flash": "flash_attention_2"}
    wanted = names.get(run.attention, run.attention)
    if wanted:
        return wanted, "as the recipe says"
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2", "flash-attn is installed"
    if device.type == "cuda":
        return SEGMENTS, "flash-attn is not installed (pip install 'mmlm[flash]' is faster)"
    return SEGMENTS, "one SDPA call for each sample is the fastest on a CPU"


def set_attention(model: MMLMForConditionalGeneration, backend: str) -> None:
    """Set the attention of the language model alone; the encoder keeps its own.

    Raises:
        ConfigError: if transformers knows no such backend or it is not installed.
    """
    try:
        model.model.language.set_attn_implementation(backend)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"run.attention {backend!r} cannot be used: {error}") from None


@torch.no_grad()
def prove_isolation(model: MMLMForConditionalGeneration) -> Isolation:
    """Measure whether two samples that share a row see each other, and differ from being alone."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = model.lm_head.weight.device
    draw = torch.Generator().manual_seed(0)
    most = model.config.text_config.vocab_size
    first, other, second = (
        _ids(length, most, model.config.image_token_id, draw).to(device)
        for length in (_LENGTHS[0], _LENGTHS[0], _LENGTHS[1])
    )
    together = _logits(model, [first, second])[0, _LENGTHS[0] :]
    changed = _logits(model, [other, second])[0, _LENGTHS[0] :]
    alone = model(input_ids=second, use_cache=False).logits[0]
    for module, training in modes.items():
        module.training = training
    scale = float(alone.float().abs().max()) + 1e-9
    leak = float((together.float() - changed.float()).abs().max()) / scale
    difference = float((together.float() - alone.float()).abs().max()) / scale
    return Isolation(leak, difference, _LARGEST_LEAK.get(model.dtype, 5e-2))


def _ids(length: int, most: int, forbidden: int, draw: torch.Generator) -> Tensor:
    ids = torch.randint(0, most, (1, length), generator=draw)
    return torch.where(ids == forbidden, (ids + 1) % most, ids)


def _logits(model: nn.Module, samples: list[Tensor]) -> Tensor:
    lengths = [sample.shape[1] for sample in samples]
    device = samples[0].device
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]).unsqueeze(0)
    borders = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    output: Any = model(
        input_ids=torch.cat(samples, dim=1), position_ids=positions, cu_seq_lens_q=borders,
        use_cache=False,
    )  # fmt: skip
    if output.logits.shape[1] != sum(lengths):
        raise TrainingError("The model gave another number of positions than it was asked for.")
    return output.logits
