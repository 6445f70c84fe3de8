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


def _run(options: Options) -> None:
    from mmlm.training import train

    hush()
    with tempfile.TemporaryDirectory() as nowhere:
        out = Path(nowhere) / "check"
        train(options.recipe, out=out, overrides=key_values(options.overrides), dry_run=True)


COMMANDS = {
    "check": Command(
        name="check",
        usage="RECIPE [KEY=VALUE ...]",
        about="Say what a recipe will do before it does it: what the model sees of a few samples, "
        "what of it\nis learnt, what learns, what it costs, and which tools open the result.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm check quickstart", "under a minute"),
            ("mmlm check mine.yaml run.row_tokens=1024", "with one line changed"),
        ],
    )
}
