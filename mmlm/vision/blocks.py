"""The blocks of a transformer tower, and what is done to its tokens between them.

Towers of transformers, timm and open_clip spell their blocks differently; what all have in
common is one list of equal modules, called one after another with tokens ``(tiles, tokens,
width)`` as their first argument. Additions (rolling, registers, tokens for each channel) hook in
there, so that they work on any of them.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmlm.errors import ConfigError
from mmlm.vision.base import VisionEncoder

_NAMES = ("layers", "layer", "blocks", "resblocks", "block")


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a transformer, in order.

    Raises:
        ConfigError: if the network has no single list of equal blocks.
    """
    found: list[list[nn.Module]] = []
    for name, module in network.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = list(module.children())
        alike = len({type(child) for child in children}) == 1
        if children and alike and name.rpartition(".")[2] in _NAMES:
            found.append(children)
    outer = [one for one in found if not any(_inside(one, other) for other in found)]
    if len(outer) != 1:
        raise ConfigError(
            f"This encoder has {len(outer)} lists of equal blocks; what is added between the "
            f"blocks of a plain transformer needs one. Use a ViT, such as CLIP, SigLIP or DINOv2."
        )
    return outer[0]


def _inside(one: list[nn.Module], other: list[nn.Module]) -> bool:
    """Whether a list of blocks stands inside a block of another list."""
    return one is not other and any(one[0] is module for each in other for module in each.modules())


def towers_of(encoder: VisionEncoder) -> list[VisionEncoder]:
    """Return the encoders that have a network of their own: of a mixture, each."""
    inner = [
        module
        for module in encoder.modules()
        if isinstance(module, VisionEncoder) and module is not encoder
    ]
    return inner or [encoder]


@contextmanager
def rolling(encoder: VisionEncoder, share: float) -> Generator[None]:
    """Let a part of each tile's tokens move on to the next tile before every block.

    The tiles of a batch are the frames of one clip. Of the tokens behind the prefix, every n-th
    moves, spread evenly; those of the last frame come to the first (All-in-one, Wang et al. 2022,
    arXiv 2203.07303). A single frame stays as it is.

    Args:
        encoder: A plain transformer, or several.
        share: Share of the tokens that move; 0 does nothing.

    Raises:
        ConfigError: if an encoder has no blocks of tokens.
    """
    hooks: list[Any] = []
    try:
        if share:
            for each in towers_of(encoder):
                skip = each.facts.num_prefix
                if each.packs_tiles:
                    raise ConfigError(
                        "video.roll moves tokens between tiles that stand under one another, and "
                        "this encoder packs them into one row. Use a ViT that takes one size."
                    )

                def roll(module: Any, given: Any, named: Any, skip: int = skip) -> Any:
                    del module
                    return with_tokens(given, named, lambda tokens: rolled(tokens, share, skip))

                refuse_recomputing(blocks_of(each), "video.roll")
                hooks += [
                    block.register_forward_pre_hook(roll, with_kwargs=True)
                    for block in blocks_of(each)
                ]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_recomputing(blocks: list[nn.Module], key: str) -> None:
    """Refuse gradient checkpointing, which would run a block again without what is done to it.

    Raises:
        ConfigError: naming the setting.
    """
    if any(
        module.training and getattr(module, "gradient_checkpointing", False)
        for block in blocks
        for module in block.modules()
    ):
        raise ConfigError(
            f"{key} changes tokens between the blocks of the encoder, and gradient checkpointing "
            f"would compute them again without it. Set run.gradient_checkpointing: false."
        )


def rolled(tokens: Tensor, share: float, skip: int) -> Tensor:
    """Move a share of the tokens behind the first `skip` to the next tile, the last's to the first.

    Shapes:
        tokens: ``(tiles, tokens, width)``
    """
    places = range(skip, tokens.shape[1])
    count = round(len(places) * share)
    moving = [places[(2 * n + 1) * len(places) // (2 * count)] for n in range(count)]
    moved = tokens.clone()
    moved[:, moving] = tokens[:, moving].roll(1, dims=0)
    return moved


def with_tokens(given: tuple[Any, ...], named: dict[str, Any], change: Any) -> Any:
    """Return the arguments of a block with its tokens changed.

    Raises:
        ConfigError: if the block does not take tokens ``(tiles, tokens, width)``.
    """
    if given and isinstance(given[0], Tensor) and given[0].ndim == 3:
        return (change(given[0]), *given[1:]), named
    states = named.get("hidden_states")
    if isinstance(states, Tensor) and states.ndim == 3:
        return given, named | {"hidden_states": change(states)}
    raise ConfigError(
        "The blocks of this encoder take no tokens (tiles, tokens, width), so nothing can be done "
        "to them. Use a ViT, such as CLIP, SigLIP or DINOv2."
    )
