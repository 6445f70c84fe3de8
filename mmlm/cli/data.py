"""`mmlm data`: data sets that MMLM builds out of packages."""

from __future__ import annotations

import sys
from pathlib import Path

from mmlm.cli.base import Command, Options, Parser, one_of
from mmlm.errors import UsageError


def _arguments(parser: Parser) -> None:
    parser.word("action", metavar="build", type=one_of("action", ["build"]))
    parser.word("name", metavar="NAME", nargs="?", help="a data set; none lists what there is")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="a new folder (default: in the cache)"
    )
    parser.add_argument("--fresh", action="store_true", help="make it again, even if it is there")


def _run(options: Options) -> None:
    from mmlm.data.builders import BUILDERS, build

    if options.name is None:
        if options.out is not None or options.fresh:
            raise UsageError("mmlm data build needs the NAME of a data set.")
        for name, builder in BUILDERS.items():
            print(f"{name:12}{builder().about}")
        return
    built = build(options.name, out=options.out, fresh=options.fresh, say=say)
    print(f"{options.name} is {'made' if built.fresh else 'there already'}: {built.folder}")
    for path in sorted(built.folder.glob("*.jsonl")):
        with path.open("rb") as rows:
            print(f"  {path.name:32}{sum(1 for _ in rows):>9,} rows")


def say(line: str) -> None:
    """Print a line about what is being done; on the error stream, which is never captured."""
    print(line, file=sys.stderr, flush=True)


COMMANDS = {
    "data": Command(
        name="data",
        usage="build [NAME] [--out DIR] [--fresh]",
        about="Fetch and make a data set; it is kept, and made once. Without a NAME, list them.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm data build", "what there is"),
            ("mmlm data build quickstart", "a few minutes and a network, once"),
        ],
    )
}
