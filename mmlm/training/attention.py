"""Which attention a run uses, chosen with a printed reason and proven on the model itself.

Packed rows need attention that stays inside each sample. Before the first step the run puts
two samples into one row, changes the first, and looks whether the second sees it, and whether
each has the loss that it has alone. A model for which that fails is not packed. An encoder that
reads pictures of all sizes as one sequence is tried in the same way; if it mixes them, the run
is refused, because padding would not part them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmlm.errors import ConfigError, TrainingError
from mmlm.features import ClipSize, Size
from mmlm.modeling import SEGMENTS, MMLMForConditionalGeneration
from mmlm.modeling.backends import AttentionBackend, attention_backends, by_speed, is_known
from mmlm.training.recipe import RunConfig
from mmlm.training.whole_inputs import isolation_with_pictures
from mmlm.whole import WholeModel

_LENGTHS = (7, 12)
# Packing changes the order of additions and nothing else. A leak moves logits by whole units.
_LARGEST_LEAK = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class AttentionChoice(NamedTuple):
    """Which backend, whether rows are packed, and why."""

    backend: str
    packed: bool
    reason: str
    shares: bool = False
    """Whether questions about one picture share its tokens; see `mmlm.training.sharing`."""


class Isolation(NamedTuple):
    """What the proof measured, relative to the size of the logits."""

    leak: float
    difference: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the samples of a row are kept apart."""
        return max(self.leak, self.difference) <= self.limit


Proof = Callable[[Any], Isolation]
"""Measures on a model whether the samples of a row are kept apart."""


def choose_attention(
    model: MMLMForConditionalGeneration,
    run: RunConfig,
    device: torch.device,
    proof: Proof | None = None,
) -> AttentionChoice:
    """Choose and set the attention of the language model, and prove that it keeps samples apart.

    With `run.attention: auto` the fastest is taken that can be set and passes the proof.

    Args:
        model: The model, on its device and in its precision.
        run: What the recipe says.
        device: Where to compute.
        proof: What measures the isolation; `prove_isolation` when left out.

    Raises:
        ConfigError: if packing was asked for and this model cannot be packed, or a backend was
            named that is not here.
        TrainingError: if the encoder lets pictures of one row see each other.
    """
    with _computing(run, device):
        _refuse_mixed_pictures(model)
    before = str(getattr(model.model.language.config, "_attn_implementation", "sdpa"))
    wanted = list(_candidates(model, run, device))
    if run.packing == "padded":
        name = wanted[0][0]
        set_attention(model, "sdpa" if name == SEGMENTS else name)
        return AttentionChoice(
            "sdpa" if name == SEGMENTS else name, False, "padded, as the recipe says"
        )
    failures: list[str] = []
    for name, reason in wanted:
        failure = _failure(model, run, device, name, proof or prove_isolation)
        if failure is None:
            reason = "; ".join([reason, *failures])
            return AttentionChoice(name, True, reason)
        failures.append(failure if len(wanted) == 1 else f"not {name}: {failure}")
    if run.packing == "packed":
        raise ConfigError(
            f"run.packing is packed, but {'; '.join(failures)}. Use run.packing: auto."
        )
    set_attention(model, before)
    return AttentionChoice(before, False, f"padded, because {'; '.join(failures)}")


def _failure(
    model: MMLMForConditionalGeneration,
    run: RunConfig,
    device: torch.device,
    name: str,
    proof: Proof,
) -> str | None:
    """Set a backend and prove it; return what is in the way, or None.

    Raises:
        ConfigError: if a backend that the recipe names cannot be set.
    """
    try:
        set_attention(model, name)
    except ConfigError as error:
        if run.attention != "auto":
            raise
        return str(error)
    try:
        with _computing(run, device):
            isolation = proof(model)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        return f"the language model does not take packed rows ({_first_line(error)})"
    return None if isolation.holds else f"samples in one row see each other ({isolation})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _computing(run: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    if run.precision == "bf16_autocast":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


_SHORT = {"flash": "flash_attention_2", "flash3": "flash_attention_3"}


def _candidates(
    model: MMLMForConditionalGeneration, run: RunConfig, device: torch.device
) -> Iterator[tuple[str, str]]:
    """Give transformers' names of what may be used, best first, each with its reason.

    Raises:
        ConfigError: if the recipe names a backend that nobody knows, or that cannot run here.
    """
    dtype = torch.bfloat16 if run.precision == "bf16_autocast" else model.dtype
    if run.attention == "auto":
        yield from ((one.implementation, reason) for one, reason in usable(device, dtype))
        return
    name = _SHORT.get(run.attention, run.attention)
    if name not in attention_backends and is_known(name):
        yield name, "as the recipe says"
        return
    backend = attention_backends[name]
    missing = backend.missing(device, dtype)
    if missing is not None:
        mend = f" {backend.mend}." if backend.mend and device.type == "cuda" else ""
        raise ConfigError(
            f"run.attention is {run.attention}, and {missing}.{mend} Or use run.attention: auto."
        )
    yield backend.implementation, "as the recipe says"


def usable(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[type[AttentionBackend], str]]:
    """Give the backends that `auto` would try on a device, fastest first, each with its reason."""
    for one in by_speed():
        if one.missing(device, dtype) is None:
            quick = "the fastest on a CPU" if device.type == "cpu" else "the fastest that is here"
            yield one, f"{one.about.split(';')[0]} is {quick}"


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
def prove_isolation(model: MMLMForConditionalGeneration | WholeModel) -> Isolation:
    """Measure whether two samples that share a row see each other, and differ from being alone.

    With pictures where the model is a stock class, which may treat them as it likes.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    if isinstance(model, WholeModel):
        measured = isolation_with_pictures(model)
        model.train(modes[model])
        _put_back(modes)
        return Isolation(*measured, _LARGEST_LEAK.get(model.dtype, 5e-2))
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
    _put_back(modes)
    scale = float(alone.float().abs().max()) + 1e-9
    leak = float((together.float() - changed.float()).abs().max()) / scale
    difference = float((together.float() - alone.float()).abs().max()) / scale
    return Isolation(leak, difference, _LARGEST_LEAK.get(model.dtype, 5e-2))


@torch.no_grad()
def prove_pictures_apart(model: MMLMForConditionalGeneration) -> Isolation:
    """Measure whether two pictures of different sizes that are encoded together see each other.

    For models whose image policy leaves pictures their own size; through encoder, reducer and
    connector, on numbers drawn at random.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    counter = model.model.counter
    step = counter.step
    first, second = Size(4 * step, 6 * step), Size(6 * step, 4 * step)
    draw = torch.Generator().manual_seed(0)
    one, other, last = (
        torch.randn(counter.length(size), generator=draw) for size in (first, first, second)
    )
    num = counter.count(second)
    together = _features(model, [one, last], [first, second])[-num:]
    changed = _features(model, [other, last], [first, second])[-num:]
    alone = _features(model, [last], [second])
    _put_back(modes)
    scale = float(alone.abs().max()) + 1e-9
    leak = float((together - changed).abs().max()) / scale
    difference = float((together - alone).abs().max()) / scale
    return Isolation(leak, difference, _LARGEST_LEAK.get(model.dtype, 5e-2))


def _features(
    model: MMLMForConditionalGeneration, numbers: list[Tensor], sizes: list[Size]
) -> Tensor:
    rows = [list(size) for size in sizes]
    if model.model.counter.video is not None:
        rows = [[*row, *[0] * (len(ClipSize._fields) - len(row))] for row in rows]
    device = model.lm_head.weight.device
    found = model.get_image_features(
        torch.cat(numbers).to(device), image_sizes=torch.tensor(rows, device=device)
    )
    assert found is not None
    return found.values.float()


def _refuse_mixed_pictures(model: MMLMForConditionalGeneration | WholeModel) -> None:
    if isinstance(model, WholeModel) or not model.config.image_policy.ragged:
        return
    isolation = prove_pictures_apart(model)
    if not isolation.holds:
        raise TrainingError(
            f"The encoder lets pictures of one row see each other ({isolation}), so what is learnt "
            f"of one would depend on its neighbours. Use another `model.vision`, or an image "
            f"policy that gives every picture the encoder's own size, such as `letterbox`."
        )


def _put_back(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


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
