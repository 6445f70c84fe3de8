"""One small random member of every family of image encoders in transformers and timm.

The families are the libraries' own lists: bare models of transformers whose input is pixels, and
modules of timm. Members are made small by taking few layers, or by taking timm's smallest names.
`UNFIT` holds the families that are no encoder in our sense, each with its reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmlm.errors import ConfigError
from mmlm.features import Size
from mmlm.vision import VisionEncoder, encoders
from mmlm.vision.probe import run_shapes

SMALL = ("test_", "atto", "femto", "pico", "nano", "xxs", "xxtiny", "tiny", "mini", "xs", "small")
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

UNFIT: dict[str, str] = {
    "hf:vit_mae": "hides most patches and shuffles the others (refused with that reason)",
    "hf:efficientnet": "untrained, its many normed layers let nothing of the picture through",
}
"""Families that cannot be checked here, and why."""

WORDS: dict[str, dict[str, Any]] = {}
"""What a family needs beside its name: timm's name of the member, or keys of the config."""


def timm_families() -> dict[str, str]:
    """Return the smallest-looking member of each module of timm, by the module's name."""
    import timm

    found: dict[str, str] = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if not names:
            continue
        size = {name: _smallness(name) for name in names}
        found[module] = min(names, key=lambda name: (size[name], len(name), name))
    return found


def _smallness(name: str) -> int:
    for place, word in enumerate(SMALL):
        if word in name:
            return place
    return len(SMALL)


def hf_families() -> dict[str, dict[str, Any]]:
    """Return a small config of each model type of transformers that speaks of pixels."""
    from mmlm.vision.hf_facts import image_model_types

    return {
        model_type: {"model_type": model_type, **shrunk(CONFIG_MAPPING[model_type]())}
        for model_type in image_model_types()
    }


def shrunk(config: Any) -> dict[str, Any]:
    """Return the keys that make a config shallow."""
    keys: dict[str, Any] = {}
    for name in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"):
        if isinstance(getattr(config, name, None), int) and not hasattr(config, "depths"):
            keys[name] = min(getattr(config, name), 2)
    if not hasattr(config, "hidden_sizes") and not hasattr(config, "depths"):
        small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
        keys |= {name: value for name, value in small.items() if hasattr(config, name)}
    for name in ("depths", "num_blocks", "layer_depths"):
        if isinstance(getattr(config, name, None), (list, tuple)):
            keys[name] = [min(depth, 2) for depth in getattr(config, name)]
    return keys


def words_of(library: str, family: str, member: Any) -> dict[str, Any]:
    """Return the words of a recipe for a member."""
    more = WORDS.get(f"{library}:{family}", {})
    if library == "timm":
        return {"use": "timm", "checkpoint": member, "pretrained": False} | more
    words = {"use": "hf", "config": member | more, "layer": "last", **HALF}
    names_a_side = getattr(CONFIG_MAPPING[family](), "image_size", None) is not None
    return words if names_a_side else words | {"side_px": 224}


def check(words: dict[str, Any]) -> str:
    """Hold a member to what every encoder promises; returns a line about it.

    Raises:
        AssertionError: naming the promise that is broken.
        ConfigError: if the encoder refuses the member.
    """
    torch.manual_seed(0)
    encoder = encoders.read(words, origin="vision").load()
    facts = encoder.facts
    side = facts.side_size
    shaped(encoder, side)
    refused(encoder)
    other, another = elsewhere(words, encoder)
    sizes = [f"{side.height}", "alone" if other is None else f"{another.height}x{another.width}"]
    chosen = encoder if other is None else other
    frozen(chosen, another)
    tuned(chosen, another)
    return f"{facts.grid} {facts.width} {facts.rule} " + " ".join(sizes)


def shaped(encoder: VisionEncoder, side: Size) -> None:
    """Grid × tokens at its default size, by shapes where the network allows it."""
    facts = encoder.facts
    out = run_shapes(encoder, lambda module, pixels: module(pixels), (1, facts.channels, *side))
    grid = facts.out_grid(side)
    assert out.grids == (grid,), f"{out.grids} at {side}, promised {grid}"
    assert out.values.shape == (grid.num_tokens, facts.width), out.values.shape


def frozen(encoder: VisionEncoder, side: Size) -> None:
    """Feed it at a size: grid × tokens, finite, and no graph when nothing learns."""
    facts = encoder.facts
    encoder.requires_grad_(False).train()
    out = encoder(torch.randn(1, facts.channels, *side))
    grid = facts.out_grid(side)
    assert out.grids == (grid,), f"{out.grids} at {side}, promised {grid}"
    assert out.values.shape == (grid.num_tokens, facts.width), out.values.shape
    assert out.values.isfinite().all(), "not finite"
    assert not out.values.requires_grad, "a graph without anything that learns"


def tuned(encoder: VisionEncoder, side: Size) -> None:
    """A gradient reaches every pixel's column when it is tuned; bf16 stays finite."""
    pixels = torch.randn(1, encoder.facts.channels, *side, requires_grad=True)
    out = encoder.requires_grad_(True).train()(pixels)
    (out.values * torch.randn_like(out.values)).sum().backward()
    assert pixels.grad is not None, "no gradient into the image"
    assert pixels.grad.isfinite().all(), "a gradient that is not finite"
    share = float((pixels.grad != 0).any(1).float().mean())
    assert share > 0.5, f"a gradient at {share:.0%} of the pixels"
    learnt = [name for name, weight in encoder.named_parameters() if weight.grad is not None]
    idle = encoder.idle_parameters()
    assert learnt, "nothing learns"
    assert not idle & set(learnt), f"named idle, but learns: {sorted(idle & set(learnt))[:3]}"
    low = encoder.requires_grad_(False).to(torch.bfloat16)
    with torch.no_grad():
        values = low(torch.randn(1, encoder.facts.channels, *side).bfloat16()).values
    assert values.dtype == torch.bfloat16, values.dtype
    assert values.isfinite().all(), "not finite in bf16"


def elsewhere(words: dict[str, Any], encoder: VisionEncoder) -> tuple[VisionEncoder | None, Size]:
    """Return the member at another size that it takes, or None and why not."""
    facts = encoder.facts
    if facts.rule == "multiple":
        step = facts.step * max(1, round(64 / facts.step))
        return encoder, Size(step, step + facts.step)
    for side_px in (64, 96, 128, 192, 256, 448):
        if side_px == facts.side[0]:
            continue
        try:
            other = encoders.read(words | {"side_px": side_px}, origin="vision").load()
        except ConfigError:
            continue
        return other, other.facts.side_size
    return None, facts.side_size


def refused(encoder: VisionEncoder) -> None:
    """A size that it does not take is refused, and sizes that work are named."""
    height, width = encoder.facts.side
    with pytest.raises(ConfigError, match=f"It takes {height} x {width}"):
        encoder.facts.out_grid(Size(height + 1, width))


def survey() -> None:
    """Print a line for every family; run by hand when a library is updated."""
    import sys
    import time

    families = {
        **{("timm", name): member for name, member in timm_families().items()},
        **{("hf", name): member for name, member in hf_families().items()},
    }
    chosen = sys.argv[1:]
    for (library, name), member in families.items():
        if (chosen and f"{library}:{name}" not in chosen) or f"{library}:{name}" in UNFIT:
            continue
        begin = time.process_time()
        try:
            line = check(words_of(library, name, member))
        except Exception as error:
            line = f"FAILS {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        shown = member if isinstance(member, str) else ""
        print(f"{library}:{name} {shown} {line} {time.process_time() - begin:.1f}s", flush=True)


if __name__ == "__main__":
    survey()
