"""`mmlm train`: a recipe, stage by stage."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmlm.cli.base import Command, Options, Parser, hush, key_values
from mmlm.cli.check import foresee, foresight_arguments
from mmlm.cli.launch import is_launched, launch


def _arguments(parser: Parser) -> None:
    parser.word(
        "recipe", metavar="RECIPE", help="a name from `mmlm recipes`, or the path of a YAML file"
    )
    parser.word(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="change one line of the recipe, e.g. stages.align.peak_lr=5e-4",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where checkpoints and logs go (default: runs/RECIPE); again means: go on",
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever DIR holds")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, print what learns and the memory it takes, and stop",
    )
    foresight_arguments(parser)
    parser.add_argument(
        "--processes",
        metavar="N",
        type=_count,
        help="how many processes on this machine (default: one for each GPU that is visible); "
        "under torchrun and its like, their number counts",
    )


def _count(word: str) -> int:
    number = int(word) if word.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of processes; 1 is the least.")
    return number


def _run(options: Options) -> int | None:
    if not is_launched() and not (options.dry_run or options.hardware):
        processes = options.processes or _visible_gpus(options)
        if options.processes is not None or processes > 1:
            return launch(_again(options), processes)
    from mmlm.training import train

    hush()
    if options.dry_run or options.hardware:
        foresee(options)
        return None
    train(
        options.recipe,
        out=options.out,
        overrides=key_values(options.overrides),
        fresh=options.fresh,
    )
    return None


def _visible_gpus(options: Options) -> int:
    """Return how many GPUs a recipe may use that does not say how many processes there are."""
    from mmlm.training import read_recipe

    run = read_recipe(options.recipe, key_values(options.overrides))[0].run
    if run.device == "cpu" or run.sharding == "none":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _again(options: Options) -> list[str]:
    """Return the command that each process runs."""
    command = [sys.executable, "-m", "mmlm", "train", options.recipe, *options.overrides]
    command += ["--out", str(options.out)] if options.out is not None else []
    return command + (["--fresh"] if options.fresh else [])


COMMANDS = {
    "train": Command(
        name="train",
        usage="RECIPE [KEY=VALUE ...] [options]",
        about="Train a model, stage by stage, as a recipe says.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm train quickstart", "seventeen minutes on two cores"),
            ("mmlm train quickstart --dry-run", "what would it cost?"),
            ("mmlm train quickstart stages.align.peak_lr=5e-4", "change one value"),
            ("mmlm train quickstart --processes 2", "two processes on this machine"),
            ("torchrun --nproc-per-node 8 -m mmlm train RECIPE", "eight GPUs of each machine"),
        ],
    )
}
