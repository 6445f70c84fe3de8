"""The part of an encoder below what learns: computed once for each picture, then left out.

    pixels ──► stands still ──► values ──► learns ──► features
               └──── trunk ───┘     kept in the feature cache

A stage that tunes the upper layers of an encoder computes the lower ones again in every epoch,
to the same values. A `Trunk` finds the last layer that is called before any that learns, gives
its values for pictures, and runs the encoder from there: the modules below are called with nothing
to do, and the last of them hands on what was kept. No library has to know of it, and no encoder
is taken apart: the way between the modules stays the encoder's own. Whether the same features come
out is tried on noise before a stage relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmlm.features import VisionFeatures
from mmlm.vision import VisionEncoder

_TRIED = 2

_MOST_NUMBERS = 2.0
"""What is kept of a tile is at most so many times as much as its pixels."""


class Trunk:
    """The modules of an encoder that are called before any that learns.

    Args:
        encoder: The encoder.
        modules: Names of the modules in the order in which they are called.
        shapes: What each gives for one tile.
        dtypes: In which precision.
        owners: Names of the modules that hold what learns.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        modules: tuple[str, ...],
        shapes: tuple[torch.Size, ...],
        dtypes: tuple[torch.dtype, ...],
        owners: frozenset[str],
    ) -> None:
        self._encoder = encoder
        self.names = modules
        self.modules = nn.ModuleList(encoder.get_submodule(name) for name in modules)
        self._shapes, self._dtypes, self._owners = shapes, dtypes, owners
        self._channels_last = False

    @property
    def shape(self) -> torch.Size:
        """What is kept of one tile."""
        return self._shapes[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of what is kept."""
        return self._dtypes[-1]

    def weights(self) -> dict[str, Tensor]:
        """Return all weights of the encoder but those of modules that learn."""
        state = self._encoder.state_dict()
        return {n: value for n, value in state.items() if n.rpartition(".")[0] not in self._owners}

    def below(self, pixels: Tensor) -> Tensor:
        """Run the lower layers.

        Shapes:
            pixels:  ``(tiles, channels, height, width)``
            returns: ``(tiles, *shape)``
        """

        def stop(module: nn.Module, given: Any, output: Tensor) -> None:
            del module, given
            raise _Reached(output)

        hook = self.modules[-1].register_forward_hook(stop)
        try:
            with torch.no_grad():
                self._whole(pixels)
        except _Reached as reached:
            return reached.values
        finally:
            hook.remove()
        raise AssertionError(f"{self.names[-1]} was called while the trunk was found")

    def above(self, values: Tensor) -> VisionFeatures:
        """Run the upper layers.

        Shapes:
            values: ``(tiles, *shape)``
        """
        facts, tiles = self._encoder.facts, values.shape[0]
        if self._channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
        blank = values.new_zeros(()).expand(tiles, facts.channels, *facts.side)
        with _instead(self.modules, self._stand_ins(values)):
            return self._whole(blank)

    def _whole(self, pixels: Tensor) -> VisionFeatures:
        """Call the encoder as its class does, whatever `installed` put before it."""
        return type(self._encoder).forward(self._encoder, pixels)

    def _stand_ins(self, values: Tensor) -> list[Callable[..., Tensor]]:
        def give(output: Tensor) -> Callable[..., Tensor]:
            return lambda *args, **kwargs: output

        empty = [
            values.new_zeros((), dtype=dtype).expand(values.shape[0], *shape)
            for shape, dtype in zip(self._shapes[:-1], self._dtypes[:-1], strict=True)
        ]
        return [give(output) for output in (*empty, values)]

    @contextmanager
    def installed(self) -> Generator[None]:
        """Let the encoder take kept values where it takes pixels, which it still takes too."""

        def either(given: Tensor) -> VisionFeatures:
            return (self.above if given.shape[1:] == self.shape else self._whole)(given)

        with _instead([self._encoder], [either]):
            yield

    def agrees(self) -> bool:
        """Whether the features of two tiles of noise are the same, to the last bit, either way."""
        facts = self._encoder.facts
        first = next(self._encoder.parameters())
        noise = torch.randn(
            _TRIED, facts.channels, *facts.side,
            generator=torch.Generator().manual_seed(0),
        ).to(first)  # fmt: skip
        with torch.no_grad(), _standing_still(self._encoder):
            try:
                values = self.below(noise)
                # What is kept of a picture has lost how its numbers lay in the memory.
                self._channels_last = _is_channels_last(values)
                again = self.above(values.contiguous())
            except Exception:  # whatever an encoder raises, it cannot be run from there
                return False
            whole = self._whole(noise)
        return whole.grids == again.grids and torch.equal(whole.values, again.values)


def _is_channels_last(values: Tensor) -> bool:
    if values.ndim != 4 or values.is_contiguous():
        return False
    return values.is_contiguous(memory_format=torch.channels_last)


def find_trunk(encoder: VisionEncoder, learning: Collection[str]) -> Trunk | None:
    """Return the modules that are called before any that learns, or None.

    None, if nothing or everything learns, if layers that learn are called first, if much more would
    have to be kept than the pixels, or if the encoder cannot be run from the middle to the same
    features.

    Args:
        encoder: The encoder, which takes tiles of one size.
        learning: Names of the parameters that learn, as the encoder names them.
    """
    if not learning or encoder.facts.num_layers:
        return None
    calls = _calls(encoder)
    used = set(learning) - encoder.idle_parameters()
    owners = {name.rpartition(".")[0] for name in used}
    if not owners or not owners <= {call.name for call in calls}:
        return None  # what learns in a module that is not called itself may be used anywhere
    first = next(at for at, call in enumerate(calls) if call.name in owners)
    busy = {above for name in owners for above in _and_parents(name)}
    again = {call.name for call in calls[first:]}
    below = [
        call
        for call in calls[:first]
        if call.name not in busy and call.name not in again and call.name.rpartition(".")[0] in busy
    ]
    plain = [call for call in below if call.output is not None and len(call.output[0])]
    if not plain or len(plain) < len(below):
        return None
    # A module that is called twice gives two things; it is run as it is.
    names = [call.name for call in plain]
    outputs = {call.name: call.output for call in plain if names.count(call.name) == 1}
    if names[-1] not in outputs:
        return None
    known = {name: output for name, output in outputs.items() if output is not None}
    trunk = Trunk(
        encoder,
        tuple(known),
        tuple(shape for shape, _ in known.values()),
        tuple(dtype for _, dtype in known.values()),
        frozenset(owners),
    )
    pixels = torch.Size((encoder.facts.channels, *encoder.facts.side))
    if trunk.shape == pixels or trunk.shape.numel() > _MOST_NUMBERS * pixels.numel():
        return None
    return trunk if trunk.agrees() else None


class _Reached(Exception):  # noqa: N818  # no error: it carries the values out of the encoder
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values


class _Call(NamedTuple):
    name: str
    output: tuple[torch.Size, torch.dtype] | None
    """Shape without tiles, and precision; None for what is no plain tensor of all tiles."""


def _calls(encoder: VisionEncoder) -> list[_Call]:
    """Run two blank tiles; return the modules in the order in which they were entered."""
    found: list[_Call] = []
    open_calls: list[int] = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, given: Any) -> None:
            del module, given
            open_calls.append(len(found))
            found.append(_Call(name, None))

        return hook

    def leave(module: nn.Module, given: Any, output: Any) -> None:
        del module, given
        place = open_calls.pop()
        if isinstance(output, Tensor) and output.ndim and output.shape[0] == _TRIED:
            found[place] = found[place]._replace(output=(output.shape[1:], output.dtype))

    hooks: list[Any] = []
    for name, module in encoder.named_modules():
        if name:
            hooks += [
                module.register_forward_pre_hook(enter(name)),
                module.register_forward_hook(leave),
            ]
    first = next(encoder.parameters())
    blank = torch.zeros(_TRIED, encoder.facts.channels, *encoder.facts.side).to(first)
    try:
        with torch.no_grad(), _standing_still(encoder):
            encoder(blank)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _and_parents(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[:count]) for count in range(len(words) + 1)]


@contextmanager
def _instead(modules: Any, functions: list[Any]) -> Generator[None]:
    """Let modules do something else while they are called."""
    for module, function in zip(modules, functions, strict=True):
        module.forward = function
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@contextmanager
def _standing_still(encoder: nn.Module) -> Generator[None]:
    """Take every module out of training mode for a while."""
    modes = [(module, module.training) for module in encoder.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
