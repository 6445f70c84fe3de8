"""`mmlm check`: what a recipe will do, before it does it."""

from __future__ import annotations

import tempfile
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
        "--html", metavar="FILE", type=Path, help="write a page: tiles, tokens, labels in colour"
    )


def _run(options: Options) -> None:
    from mmlm.training.preflight import check
    from mmlm.training.recipe import read_recipe
    from mmlm.training.trainer import Trainer

    hush()
    recipe, folder, _ = read_recipe(options.recipe, key_values(options.overrides))
    with tempfile.TemporaryDirectory() as nowhere:
        check(Trainer(recipe, folder, Path(nowhere) / "check"), options.html)


COMMANDS = {
    "check": Command(
        name="check",
        usage="RECIPE [KEY=VALUE ...] [--html FILE]",
        about="Say what a recipe will do before it does it: what the model sees of a few samples, "
        "what of it\nis learnt, what learns, what it costs, and which tools open the result.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm check quickstart", "under a minute"),
            ("mmlm check mine.yaml run.row_tokens=1024", "with one line changed"),
            ("mmlm check mine.yaml --html look.html", "tiles and tokens on a page"),
        ],
    )
}
