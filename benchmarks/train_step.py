"""One optimiser step: MMLM against what a user would do today, in one run.

    python benchmarks/train_step.py                   the whole comparison
    python benchmarks/train_step.py --json out.json   the same, and the figures as JSON

The peer is stock `LlavaForConditionalGeneration` with a padding collator and plain PyTorch,
once with batches as they come and once with batches grouped by length (one more line of user
code). Both sides have the same weights (SigLIP-B/16-224 and SmolLM2-135M shapes, random), the
same samples, frozen encoder, connector and language model learning, bfloat16 parameters and
AdamW, and are timed in turn. Text lengths are log-normal (median 67 tokens, sigma 0.9), every
sample has one picture of 196 tokens, and the second half of each text is labelled.

Useful tokens are positions of the language model without padding, image tokens included.
Memory is the peak of a process of its own above weights, gradients and optimiser state. The
losses are compared in float32 on the same batch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BATCH = 8
IMAGE_TOKENS = 196
MEDIAN_TEXT, SIGMA_TEXT, LONGEST_TEXT = 67, 0.9, 1024
SIDES = ("padded", "grouped", "mmlm")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed rounds of every side (default 5)"
    )
    parser.add_argument("--batches", type=int, default=3, help="batches in a round (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--tiny", action="store_true", help="small shapes: shows that it runs")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def samples(count: int, vocabulary: int) -> list[dict[str, Any]]:
    """Return samples as (ids, labels, pixels): log-normal text behind one picture."""
    import torch

    draw = torch.Generator().manual_seed(0)
    lengths = (MEDIAN_TEXT * (SIGMA_TEXT * torch.randn(count, generator=draw)).exp()).round()
    made = []
    for length in lengths.clamp(4, LONGEST_TEXT).int().tolist():
        text = torch.randint(10, vocabulary - 10, (length,), generator=draw)
        ids = torch.cat([torch.full((IMAGE_TOKENS,), vocabulary - 1), text])
        labels = ids.clone()
        labels[: IMAGE_TOKENS + length // 2] = -100
        made.append(
            {"ids": ids, "labels": labels, "pixels": torch.randn(3, 224, 224, generator=draw)}
        )
    return made


def stock_model(tiny: bool) -> Any:
    """Return stock LLaVA of the stated shapes with random weights."""
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=224, patch_size=16,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49153, tie_word_embeddings=True, rope_theta=100000.0,
        max_position_embeddings=8192,
    )  # fmt: skip
    if tiny:
        vision.num_hidden_layers = text.num_hidden_layers = 2
    import torch

    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=49152,
            image_seq_length=196,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )


class Stock:
    """A user's own loop: stock class, padding collator, AdamW."""

    def __init__(self, model: Any, dtype: Any) -> None:
        import torch

        self.model = model.to(dtype).train()
        self.model.model.vision_tower.requires_grad_(False)
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(learnt, lr=1e-5)
        self.dtype = dtype

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad to the longest, on the right."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = pad_sequence([s["ids"] for s in batch], batch_first=True, padding_value=0)
        labels = pad_sequence([s["labels"] for s in batch], batch_first=True, padding_value=-100)
        lengths = torch.tensor([len(s["ids"]) for s in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        pixels = torch.stack([s["pixels"] for s in batch]).to(self.dtype)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}

    def loss(self, batch: list[dict[str, Any]]) -> Any:
        """The loss of one batch."""
        return self.model(**self.collate(batch)).loss

    def step(self, batch: list[dict[str, Any]]) -> None:
        """One optimiser step."""
        self.loss(batch).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


class Ours(Stock):
    """MMLM's step: packed rows, attention by segment, the loss alone, fused AdamW."""

    def __init__(self, model: Any, dtype: Any) -> None:
        import torch

        from mmlm.modeling import SEGMENTS

        self.model = in_ours(model).cast(dtype).train()
        self.model.get_decoder().set_attn_implementation(SEGMENTS)
        self.model.model.vision.requires_grad_(False)
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(learnt, lr=1e-5, fused=True)
        self.dtype = dtype

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Lay the samples behind one another in one row."""
        import torch

        from mmlm.data.collate import collate_packed
        from mmlm.data.planning import Planned

        rows = [Planned(0, "", 0, "", s["ids"].numpy(), s["labels"].numpy(), (), 1) for s in batch]
        pixels = torch.stack([s["pixels"] for s in batch]).to(self.dtype)
        return {**collate_packed(rows), "pixel_values": pixels}

    def loss(self, batch: list[dict[str, Any]]) -> Any:
        """The loss of one batch."""
        return self.model(**self.collate(batch), loss_only=True).loss


def in_ours(stock: Any) -> Any:
    """Return MMLM's class with the weights of the stock one."""
    from mmlm.hub import stock_classes
    from mmlm.modeling import MMLMForConditionalGeneration

    side = {"height": 224, "width": 224}
    words = {"image_processor_type": "SiglipImageProcessor", "size": side, "crop_size": side}
    words |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    processor = {"image_processor": words, "patch_size": 16, "num_additional_image_tokens": 0}
    target = stock_classes["llava"]()
    config = target.read(stock.config, processor, origin="benchmark")
    model = MMLMForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.load_state_dict(target.to_ours(stock.state_dict(), config, origin="benchmark"))
    return model


def matmul_rate(dtype: Any) -> float:
    """Return this machine's rate of matrix multiplication, in FLOP/s."""
    import torch

    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def flops_of_step(batch: list[dict[str, Any]], tiny: bool) -> dict[str, float]:
    """Return the FLOPs that one step cannot do without, by part."""
    layers, vision_layers = (2, 2) if tiny else (30, 12)
    width, kv, hidden, vocabulary = 576, 192, 1536, 49153
    per_token = 2 * (2 * width * width + 2 * width * kv + 3 * width * hidden) * layers
    lengths = [len(s["ids"]) for s in batch]
    tokens, learnt = sum(lengths), sum(int((s["labels"] != -100).sum()) for s in batch)
    causal = sum(2 * length * length * width for length in lengths) * layers
    connector = 2 * (768 * width + width * width) * IMAGE_TOKENS * len(batch)
    patch = (4 * 768 * 768 + 2 * 768 * 3072) * 2 * 196 + 4 * 196 * 196 * 768
    return {
        "encoder_forward": float(patch * vision_layers * len(batch)),
        "language_forward_backward": 3.0 * (per_token * tokens + causal),
        "connector_forward_backward": 3.0 * connector,
        "head_forward_backward": 3.0 * 2 * width * vocabulary * learnt,
    }


def peak_memory(side: str, tiny: bool) -> None:
    """Print the peak above the floor, in bytes; runs in a process of its own."""
    import torch

    data = samples(BATCH * 3, 49153)
    if side == "grouped":
        data.sort(key=lambda s: len(s["ids"]))
    runner = (Ours if side == "mmlm" else Stock)(stock_model(tiny), torch.bfloat16)
    before = _resident()
    held = sum(p.numel() * p.element_size() for p in runner.model.parameters())
    learnt = sum(p.numel() * p.element_size() for p in runner.model.parameters() if p.requires_grad)
    for start in range(0, len(data), BATCH):
        runner.step(data[start : start + BATCH])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # The floor: what was resident before the first step, a gradient and two moments.
    print(json.dumps({"above_floor": peak - before - 3 * learnt, "weights": held}))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_of(side: str, arguments_: argparse.Namespace) -> float:
    """Measure one side in a fresh process; returns bytes."""
    command = [sys.executable, __file__, "--memory-of", side, "--threads", str(arguments_.threads)]
    done = subprocess.run(
        command + ["--tiny"] * arguments_.tiny, check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.splitlines()[-1])["above_floor"])


def loss_difference(tiny: bool) -> float:
    """Return the relative difference of the losses, in float32 on one batch."""
    import copy

    import torch

    batch, model = samples(BATCH, 49153), stock_model(tiny)
    with torch.no_grad():
        theirs = Stock(copy.deepcopy(model), torch.float32).loss(batch).item()
        ours = Ours(model, torch.float32).loss(batch).item()
    return abs(ours - theirs) / abs(theirs)


def time_sides(options: argparse.Namespace) -> dict[str, list[float]]:
    """Time the sides in turn; returns useful tokens per second of every round."""
    import copy

    import torch

    model = stock_model(options.tiny)
    stock, ours = Stock(copy.deepcopy(model), torch.bfloat16), Ours(model, torch.bfloat16)
    count = BATCH * options.batches
    data = samples(count * options.rounds, 49153)
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for runner in (stock, ours):
        runner.step(data[:BATCH])
    for number in range(options.rounds):
        chunk = data[number * count : (number + 1) * count]
        useful = sum(len(s["ids"]) for s in chunk)
        for side in SIDES:
            rows = sorted(chunk, key=lambda s: len(s["ids"])) if side == "grouped" else chunk
            runner = ours if side == "mmlm" else stock
            start = time.perf_counter()
            for first in range(0, count, BATCH):
                runner.step(rows[first : first + BATCH])
            rates[side].append(useful / (time.perf_counter() - start))
            print(
                f"round {number + 1}  {side:8s} {rates[side][-1]:8.1f} useful tokens/s", flush=True
            )
    return rates


def padding_share(grouped: bool, options: argparse.Namespace) -> float:
    """Return the share of positions that are padding."""
    count = BATCH * options.batches
    data = samples(count * options.rounds, 49153)
    padded = useful = 0
    for start in range(0, len(data), count):
        lengths = [len(s["ids"]) for s in data[start : start + count]]
        lengths = sorted(lengths) if grouped else lengths
        for first in range(0, count, BATCH):
            rows = lengths[first : first + BATCH]
            padded += max(rows) * len(rows)
            useful += sum(rows)
    return 1 - useful / padded


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the figures."""
    import torch

    torch.set_num_threads(options.threads)
    memory = {side: memory_of(side, options) for side in SIDES}
    difference = loss_difference(options.tiny)
    rates = {side: statistics.median(values) for side, values in time_sides(options).items()}
    batch = samples(BATCH, 49153)
    flops, rate = flops_of_step(batch, options.tiny), matmul_rate(torch.bfloat16)
    per_useful = sum(flops.values()) / sum(len(s["ids"]) for s in batch)
    return {
        "useful_tokens_per_second": rates,
        "speed_ratio_padded": rates["mmlm"] / rates["padded"],
        "speed_ratio_grouped": rates["mmlm"] / rates["grouped"],
        "memory_above_floor_bytes": memory,
        "memory_ratio": memory["mmlm"] / memory["padded"],
        "loss_difference": difference,
        "padding_share": {
            "padded": padding_share(False, options),
            "grouped": padding_share(True, options),
            "mmlm": 0.0,
        },
        "flops_of_a_step": flops,
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": {s: r * per_useful / rate for s, r in rates.items()},
        "torch": torch.__version__,
        "threads": options.threads,
    }


def main() -> None:
    """Measure, print, and write JSON."""
    options = arguments()
    if options.memory_of:
        import torch

        torch.set_num_threads(options.threads)
        peak_memory(options.memory_of, options.tiny)
        return
    figures = report(options)
    print(json.dumps(figures, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
