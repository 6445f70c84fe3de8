"""`mmlm train`: a recipe, stage by stage."""

from __future__ import annotations

from pathlib import Path

from mmlm.cli.base import Command, Options, Parser, hush, key_values


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


def _run(options: Options) -> None:
    from mmlm.training import train

    hush()
    train(
        options.recipe,
        out=options.out,
        overrides=key_values(options.overrides),
        fresh=options.fresh,
        dry_run=options.dry_run,
    )


COMMANDS = {
    "train": Command(
        name="train",
        usage="RECIPE [KEY=VALUE ...] [options]",
        about="Train a model, stage by stage, as a recipe says.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm train quickstart", "ten minutes on a laptop"),
            ("mmlm train quickstart --dry-run", "what would it cost?"),
            ("mmlm train quickstart stages.align.peak_lr=5e-4", "change one value"),
            ("torchrun --nproc-per-node 8 -m mmlm train RECIPE", "eight GPUs"),
        ],
    )
}
