"""Encoding pictures: MMLM against calling transformers or timm directly, in one run.

    python benchmarks/encode.py                   the whole comparison
    python benchmarks/encode.py --json out.json   the same, and the figures as JSON

Two questions. First, what does MMLM's encoder cost on top of the network that it wraps: the same
weights and the same batch of 224 px pictures, once through the stock model, once through
`VisionEncoder`, in turn. Second, what does packing save where pictures have sizes of their own:
SigLIP 2 (NaFlex) of base shape on a batch of mixed proportions and sizes, once padded to the
longest as the stock processor does it, once packed. Weights are random; float32 on the CPU,
bfloat16 on a GPU. A ratio above 1 says that MMLM is faster; the features are compared as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

BATCH = 4
LARGEST_PATCHES, SMALLEST_PATCHES = 1024, 36
PATCH = 16


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--tiny", action="store_true", help="small shapes: shows that it runs")
    return parser.parse_args(words)


def shapes(tiny: bool) -> dict[str, Any]:
    """Return the shapes of a base ViT, or of a toy."""
    if tiny:
        return {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }  # fmt: skip
    return {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }  # fmt: skip


def encoders_to_compare(tiny: bool) -> dict[str, dict[str, Any]]:
    """Return the words of the encoders."""
    vit = {"image_size": 64 if tiny else 224, "patch_size": 16, **shapes(tiny)}
    timm = {"use": "timm", "pretrained": False}
    return {
        "siglip, last": {
            "use": "hf", "config": {"model_type": "siglip_vision_model", **vit}, "layer": "last",
        },
        "clip, layer -2": {
            "use": "hf", "config": {"model_type": "clip_vision_model", **vit}, "layer": -2,
        },
        "timm vit": timm | {"checkpoint": "test_vit" if tiny else "vit_small_patch16_224"},
        "timm convnext": timm | {"checkpoint": "test_convnext" if tiny else "convnext_tiny"},
    }  # fmt: skip


def direct(encoder: Any, words: dict[str, Any]) -> Callable[[Any], Any]:
    """Return what a user of the library would call for the same features."""
    tower = encoder.tower
    if words["use"] == "timm":
        network = tower.timm_model
        return lambda pixels: network.forward_intermediates(
            pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )[-1]
    if words["layer"] == "last":
        return lambda pixels: tower(pixels).last_hidden_state
    return lambda pixels: tower(pixels, output_hidden_states=True).hidden_states[words["layer"]]


def in_turn(
    sides: dict[str, Callable[[], Any]], rounds: int, finish: Callable[[], None]
) -> dict[str, list[float]]:
    """Time each side in turn, so that whatever else the machine does meets both."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            finish()
            begin = time.perf_counter()
            run()
            finish()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def compare_overhead(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Compare each encoder with the direct call."""
    import torch

    from mmlm.vision import encoders

    figures: dict[str, dict[str, float]] = {}
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    for name, words in encoders_to_compare(options.tiny).items():
        torch.manual_seed(0)
        encoder = encoders.read(words, origin=name).load(dtype=dtype)
        encoder = encoder.eval().requires_grad_(False).to(options.device)
        facts = encoder.facts
        pixels = torch.randn(BATCH, facts.channels, *facts.side).to(options.device, dtype)
        theirs = direct(encoder, words)
        with torch.no_grad():
            same = float((encoder(pixels).values.float() - flat(theirs(pixels), facts)).abs().max())
            seconds = in_turn(
                {"direct": partial(theirs, pixels), "mmlm": partial(encoder, pixels)},
                options.rounds,
                finisher(options.device),
            )
        figures[name] = figures_of(seconds, BATCH) | {"largest_difference": same}
    return figures


def flat(features: Any, facts: Any) -> Any:
    """Return the library's features as packed values."""
    if features.ndim == 4:
        return features.float().permute(0, 2, 3, 1).flatten(0, 2)
    return features[:, facts.num_prefix :].float().flatten(0, 1)


def finisher(device: str) -> Callable[[], None]:
    """Return what waits for a GPU to be done."""
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def figures_of(seconds: dict[str, list[float]], images: int) -> dict[str, float]:
    """Return rates, and the median of the ratios of neighbouring rounds."""
    pairs = zip(*seconds.values(), strict=True)
    rates = {f"{name}_images_per_s": images / min(each) for name, each in seconds.items()}
    return rates | {"ratio": statistics.median(theirs / ours for theirs, ours in pairs)}


def mixed_sizes(tiny: bool) -> list[tuple[int, int]]:
    """Return sizes in pixels: areas log-normal between the two limits, proportions 1:3 to 3:1."""
    import torch

    draw = torch.Generator().manual_seed(0)
    sizes: list[tuple[int, int]] = []
    for _ in range(4 if tiny else 16):
        patches = float((5.3 + 0.9 * torch.randn(1, generator=draw)).exp())
        patches = min(max(patches, SMALLEST_PATCHES), LARGEST_PATCHES) / (16 if tiny else 1)
        ratio = float(((torch.rand(1, generator=draw) * 2 - 1) * 1.1).exp())
        rows = max(1, round((patches / ratio) ** 0.5))
        columns = max(1, min(round((patches * ratio) ** 0.5), LARGEST_PATCHES // rows))
        sizes.append((rows * PATCH, columns * PATCH))
    return sizes


def compare_ragged(options: argparse.Namespace) -> dict[str, float]:
    """Compare packed tiles of mixed sizes with the stock tower, padded to the longest."""
    import torch

    from mmlm.vision import encoders
    from mmlm.vision.naflex import patches_of

    config = {"model_type": "siglip2_vision_model", "patch_size": PATCH, "num_patches": 256}
    words = {"use": "hf", "config": config | shapes(options.tiny), "layer": "last"}
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    encoder = encoders.read(words, origin="naflex").load(dtype=dtype)
    encoder = encoder.eval().requires_grad_(False).to(options.device)
    tower: Any = encoder.tower
    draw = torch.Generator().manual_seed(1)
    tiles = [
        torch.randn(3, *size, generator=draw).to(options.device, dtype)
        for size in mixed_sizes(options.tiny)
    ]
    patches = [patches_of(tile, PATCH) for tile in tiles]
    lengths = torch.tensor([len(each) for each in patches])
    padded = torch.nn.utils.rnn.pad_sequence(patches, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).int().to(options.device)
    grids = torch.tensor([(tile.shape[1] // PATCH, tile.shape[2] // PATCH) for tile in tiles])

    def stock() -> Any:
        tower.config._attn_implementation = "sdpa"
        return tower(
            pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=grids
        ).last_hidden_state

    with torch.no_grad():
        theirs = stock()[mask.bool()].float()
        same = float((encoder.encode_tiles(tiles).values.float() - theirs).abs().max())
        seconds = in_turn(
            {"padded": stock, "mmlm": lambda: encoder.encode_tiles(tiles)},
            options.rounds,
            finisher(options.device),
        )
    share = float(1 - lengths.sum() / (len(lengths) * lengths.max()))
    return figures_of(seconds, len(tiles)) | {"padding_share": share, "largest_difference": same}


def main(words: Sequence[str] | None = None) -> None:
    """Run the comparison and print it."""
    options = arguments(words)
    import torch

    torch.set_num_threads(options.threads or 1)
    overhead = compare_overhead(options)
    ragged = compare_ragged(options)
    print(f"{'the same batch':18}{'direct':>12}{'mmlm':>12}{'ratio':>8}   largest difference")
    for name, found in overhead.items():
        print(
            f"{name:18}{found['direct_images_per_s']:>10.1f}/s{found['mmlm_images_per_s']:>10.1f}/s"
            f"{found['ratio']:>8.3f}   {found['largest_difference']:.1e}"
        )
    print(
        f"{'mixed sizes':18}{ragged['padded_images_per_s']:>10.1f}/s"
        f"{ragged['mmlm_images_per_s']:>10.1f}/s{ragged['ratio']:>8.3f}   "
        f"{ragged['largest_difference']:.1e} (padding {ragged['padding_share']:.0%})"
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"overhead": overhead, "ragged": ragged}, file, indent=2)


if __name__ == "__main__":
    main()
