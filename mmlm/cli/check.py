"""`mmlm check`: what a recipe will do, before it does it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mmlm.cli.base import Command, Options, Parser, hush, key_values
from mmlm.errors import UsageError


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
        "--html", metavar="FILE", type=Path, help="write a page: tiles, tokens, labels in colour"
    )
    foresight_arguments(parser)


def foresight_arguments(parser: Parser) -> None:
    """Add the words that name a machine whose cost is foreseen."""
    parser.add_argument(
        "--hardware", metavar="8xH100", help="foresee sharding, step time, hours and cost there"
    )
    parser.add_argument(
        "--price", metavar="USD", type=float, help="for an hour of one of its devices"
    )
    parser.add_argument(
        "--reached", metavar="SHARE", type=float,
        help="share of the datasheet's rate that is assumed to be reached (default: 0.4)",
    )  # fmt: skip


def foresee(options: Options, html: Path | None = None) -> None:
    """Check a recipe and say what it will do, here and on the machine that was named."""
    from mmlm.training.foresight.estimate import REACHED
    from mmlm.training.foresight.machines import read_hardware
    from mmlm.training.preflight import Elsewhere, check
    from mmlm.training.recipe import read_recipe
    from mmlm.training.trainer import Trainer

    elsewhere = None
    if options.hardware:
        hardware = read_hardware(options.hardware, price=options.price)
        elsewhere = Elsewhere(hardware, options.reached or REACHED)
    elif options.price is not None or options.reached is not None:
        raise UsageError("--price and --reached go with --hardware, such as --hardware 8xH100.")
    recipe, folder, _ = read_recipe(options.recipe, key_values(options.overrides))
    with tempfile.TemporaryDirectory() as nowhere:
        check(Trainer(recipe, folder, Path(nowhere) / "check"), html, elsewhere=elsewhere)


def _run(options: Options) -> None:
    hush()
    foresee(options, options.html)


COMMANDS = {
    "check": Command(
        name="check",
        usage="RECIPE [KEY=VALUE ...] [--html FILE] [--hardware 8xH100]",
        about="Say what a recipe will do before it does it: what the model sees of a few samples, "
        "what of it\nis learnt, what learns, what it costs, and which tools open the result.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm check quickstart", "under a minute"),
            ("mmlm check mine.yaml run.row_tokens=1024", "with one line changed"),
            ("mmlm check mine.yaml --hardware 8xH100", "hours and cost there"),
            ("mmlm check mine.yaml --html look.html", "tiles and tokens on a page"),
        ],
    )
}
