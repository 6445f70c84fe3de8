"""One optimiser step: MMLM against what a user would do today, in one run.

    python benchmarks/train_step.py                   the whole comparison
    python benchmarks/train_step.py --json out.json   the same, and the figures as JSON
    python benchmarks/train_step.py --sides padded mmlm --tiny
    python benchmarks/train_step.py --json out.json --minutes 8   again and again, until it is done

With `--minutes` it stops after the round in which the time is up, and the same command goes on from
`--json`: the sides are still timed in turn within each round, and nothing is measured twice.

The peers are stock `LlavaForConditionalGeneration` with a padding collator and plain PyTorch,
once with batches as they come (`padded`) and once with batches grouped by length (`grouped`: one
more line of user code), and TRL's `SFTTrainer` on the same class and batches (`trl`). All sides
have the same weights (SigLIP-B/16-224 and SmolLM2-135M shapes, random), the same samples, frozen
encoder, connector and language model learning, bfloat16 parameters and AdamW, and are timed in
turn. Text lengths are log-normal (median 67 tokens, sigma 0.9), every sample has one picture of
196 tokens, and the second half of each text is labelled.

`align_padded` and `align_mmlm` are the stage before: the connector alone learns. The peer encodes
every picture again; MMLM reads its features from the cache on disk, as in every epoch after the
first.

Useful tokens are positions of the language model without padding, image tokens included.
Memory is the peak of a process of its own above weights, gradients and optimiser state. The
losses are compared in float32 on the same batch. The profile says what a step of MMLM is spent on.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from train_step_parts import (
    BATCH,
    Ours,
    Stock,
    Trl,
    flops_of,
    matmul_rate,
    profile_of,
    samples,
    stock_model,
)

SIDES = ("padded", "grouped", "trl", "mmlm", "align_padded", "align_mmlm")


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
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--minutes", type=float, help="stop after so long; the same command with --json goes on"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes: shows that it runs")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def runner_of(side: str, model: Any, dtype: Any) -> Stock:
    """Return what takes the steps of a side."""
    kind = {"trl": Trl, "mmlm": Ours, "align_mmlm": Ours}.get(side, Stock)
    return kind(model, dtype, align=side.startswith("align"))


def peak_memory(side: str, tiny: bool) -> None:
    """Print the peak above the floor, in bytes; runs in a process of its own."""
    import torch

    data = samples(BATCH * 3)
    if side == "grouped":
        data.sort(key=lambda s: len(s["ids"]))
    runner = runner_of(side, stock_model(tiny), torch.bfloat16)
    if isinstance(runner, Ours) and runner.cache is not None:
        runner.first_epoch(data)
    before = _resident()
    held = sum(p.numel() * p.element_size() for p in runner.model.parameters())
    learnt = sum(p.numel() * p.element_size() for p in runner.learnt)
    runner.go([data[start : start + BATCH] for start in range(0, len(data), BATCH)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # The floor: what was resident before the first step, a gradient and two moments.
    print(json.dumps({"above_floor": peak - before - 3 * learnt, "weights": held}))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_of(side: str, options: argparse.Namespace) -> float:
    """Measure one side in a fresh process; returns bytes."""
    command = [sys.executable, __file__, "--memory-of", side, "--threads", str(options.threads)]
    done = subprocess.run(
        command + ["--tiny"] * options.tiny, check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.splitlines()[-1])["above_floor"])


def loss_difference(tiny: bool) -> float:
    """Return the relative difference of the losses, in float32 on one batch."""
    import torch

    batch, model = samples(BATCH), stock_model(tiny)
    with torch.no_grad():
        theirs = Stock(copy.deepcopy(model), torch.float32).loss(batch).item()
        ours = Ours(model, torch.float32).loss(batch).item()
    return abs(ours - theirs) / abs(theirs)


class Kept:
    """What has been measured so far, in a file beside the figures where one is named.

    Args:
        options: The command line; other sides, batches or threads begin anew.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._end = time.monotonic() + 60 * (options.minutes or 1e9)
        self._path = Path(f"{options.json}.part") if options.json else None
        setting = [options.sides, options.batches, options.rounds, options.threads, options.tiny]
        self.values: dict[str, Any] = {"setting": setting, "memory": {}, "rounds": []}
        if self._path is not None and self._path.is_file():
            found = json.loads(self._path.read_text(encoding="utf-8"))
            self.values = found if found["setting"] == setting else self.values

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._end

    def save(self) -> None:
        """Write everything down."""
        if self._path is not None:
            self._path.write_text(json.dumps(self.values), encoding="utf-8")

    def forget(self) -> None:
        """Delete the file: the figures are complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def time_sides(options: argparse.Namespace, kept: Kept) -> bool:
    """Time the sides in turn, and profile a step of MMLM at the end.

    Returns:
        Whether all rounds are done.
    """
    import torch

    model = stock_model(options.tiny)
    # Grouped is the same code with other batches, so it shares the model of the padded side.
    runners = {
        side: runner_of(side, copy.deepcopy(model), torch.bfloat16)
        for side in options.sides
        if side != "grouped"
    }
    if "grouped" in options.sides:
        shared = runners.get("padded")
        runners["grouped"] = shared or runner_of("grouped", model, torch.bfloat16)
    count = BATCH * options.batches
    data = samples(count * options.rounds)
    for runner in runners.values():
        if isinstance(runner, Ours) and runner.cache is not None:
            runner.first_epoch(data)
        runner.go([data[:BATCH]])
    rounds: list[dict[str, float]] = kept.values["rounds"]
    for number in range(len(rounds), options.rounds):
        if kept.is_over:
            return False
        rounds.append({})
        chunk = data[number * count : (number + 1) * count]
        useful = sum(len(s["ids"]) for s in chunk)
        for side in options.sides:
            rows = sorted(chunk, key=lambda s: len(s["ids"])) if side == "grouped" else chunk
            batches = [rows[first : first + BATCH] for first in range(0, count, BATCH)]
            rounds[-1][side] = useful / runners[side].go(batches)
            print(
                f"round {number + 1}  {side:12s} {rounds[-1][side]:8.1f} useful tokens/s",
                flush=True,
            )
        kept.save()
    if "mmlm" in runners:
        kept.values["profile"] = profile_of(runners["mmlm"], data[:BATCH])
    return True


def padding_share(grouped: bool, options: argparse.Namespace) -> float:
    """Return the share of positions that are padding."""
    count = BATCH * options.batches
    data = samples(count * options.rounds)
    padded = useful = 0
    for start in range(0, len(data), count):
        lengths = [len(s["ids"]) for s in data[start : start + count]]
        lengths = sorted(lengths) if grouped else lengths
        for first in range(0, count, BATCH):
            rows = lengths[first : first + BATCH]
            padded += max(rows) * len(rows)
            useful += sum(rows)
    return 1 - useful / padded


def report(options: argparse.Namespace) -> dict[str, Any] | None:
    """Run everything and return the figures; None where the time was up before."""
    import torch

    torch.set_num_threads(options.threads)
    kept = Kept(options)
    memory: dict[str, float] = kept.values["memory"]
    for side in options.sides:
        if kept.is_over:
            return None
        if side not in memory:
            memory[side] = memory_of(side, options)
            kept.save()
    if "difference" not in kept.values:
        kept.values["difference"] = loss_difference(options.tiny)
        kept.save()
    if not time_sides(options, kept):
        return None
    kept.forget()
    difference, profiles = kept.values["difference"], kept.values.get("profile", {})
    rounds = {side: [one[side] for one in kept.values["rounds"]] for side in options.sides}
    rates = {side: statistics.median(values) for side, values in rounds.items()}
    data = samples(BATCH * options.batches * options.rounds)
    tokens, rate = sum(len(s["ids"]) for s in data), matmul_rate(torch.bfloat16)
    flops = {align: flops_of(data, options.tiny, align=align) for align in (False, True)}
    share = {
        side: value * sum(flops[side.startswith("align")].values()) / tokens / rate
        for side, value in rates.items()
    }
    return {
        "useful_tokens_per_second": rates,
        "rounds": rounds,
        "speed_ratio": {
            side: rates[ours] / rates[side]
            for side in rates
            if (ours := "align_mmlm" if side.startswith("align") else "mmlm") in rates
            and side != ours
        },
        "memory_above_floor_bytes": memory,
        "memory_ratio": {
            side: memory[ours] / memory[side]
            for side in memory
            if (ours := "align_mmlm" if side.startswith("align") else "mmlm") in memory
            and side != ours
        },
        "loss_difference": difference,
        "padding_share": {
            "padded": padding_share(False, options),
            "grouped": padding_share(True, options),
            "mmlm": 0.0,
        },
        "flops_per_useful_token": {name: value / tokens for name, value in flops[False].items()},
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": share,
        "profile_of_mmlm": profiles,
        "torch": torch.__version__,
        "threads": options.threads,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the comparison as tables."""
    print(f"\n{'':14s}{'tokens/s':>10s}{'MMLM is':>10s}{'memory MiB':>12s}{'of matmul':>11s}")
    for side, rate in figures["useful_tokens_per_second"].items():
        ratio = figures["speed_ratio"].get(side)
        print(
            f"{side:14s}{rate:10.1f}{f'{ratio:.2f}x' if ratio else '':>10s}"
            f"{figures['memory_above_floor_bytes'][side] / 2**20:12.0f}"
            f"{100 * figures['share_of_matmul_rate'][side]:10.1f}%"
        )
    print(f"\nloss differs by {figures['loss_difference']:.1e} (float32, relative)")
    for kind, share in figures["profile_of_mmlm"].items():
        print(f"{kind:26s}{100 * share:6.1f}% of a step of MMLM")


def main() -> None:
    """Measure, print, and write JSON."""
    options = arguments()
    if options.memory_of:
        import torch

        torch.set_num_threads(options.threads)
        peak_memory(options.memory_of, options.tiny)
        return
    if options.minutes and not options.json:
        raise SystemExit("--minutes needs --json FILE, from which the same command goes on.")
    figures = report(options)
    if figures is None:
        print(f"The time is up; the same command goes on from {options.json}.part.")
        return
    show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
