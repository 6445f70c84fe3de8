"""`mmlm data`: from your own table or folder to a training; data sets built out of packages."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmlm.cli.base import Command, Options, Parser, one_of
from mmlm.errors import UsageError

_OF_NEW = ("image", "answer", "question", "ask", "group", "like", "alike", "seed")


def _arguments(parser: Parser) -> None:
    parser.word("action", metavar="new|build", type=one_of("action", ["new", "build"]))
    parser.word(
        "name",
        metavar="SRC|NAME",
        nargs="?",
        help="new: a CSV, JSONL or folder with captions; build: a data set, none lists them",
    )
    new = parser.add_argument_group("new")
    new.add_argument("--image", metavar="COLUMN", help="the picture's path (default: image)")
    new.add_argument("--answer", metavar="COLUMN", help="what is to be said (default: answer)")
    new.add_argument("--question", metavar="COLUMN", help="what is asked (default: question)")
    new.add_argument(
        "--ask", metavar="TEXT", help="asked of rows without a question: Describe the picture."
    )
    new.add_argument("--group", metavar="COLUMN", help="rows that share its value are never parted")
    new.add_argument(
        "--like", metavar="RECIPE", help="whose model to take over (default: own_data)"
    )
    new.add_argument(
        "--alike",
        metavar="SHARE",
        type=float,
        help="how much the hashes of pictures that look alike may differ (default: 0.15)",
    )
    new.add_argument("--seed", metavar="N", type=int, help="changes what goes where (default: 0)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="a new folder (default: SRC-mmlm here; for build, in the cache)",
    )
    parser.add_argument("--fresh", action="store_true", help="make it again, even if it is there")


def _run(options: Options) -> None:
    if options.action == "new":
        _new(options)
        return
    given = [f"--{name}" for name in _OF_NEW if getattr(options, name) is not None]
    if given:
        raise UsageError(f"mmlm data build takes no {given[0]}; it belongs to mmlm data new.")
    _build(options)


def _new(options: Options) -> None:
    from mmlm.data.alike import MOST_DIFFERENT
    from mmlm.data.own import DEFAULT_QUESTION, Words, survey_own
    from mmlm.data.own_files import lines_of, model_words, write_own

    if options.name is None:
        raise UsageError("mmlm data new needs a CSV, a JSONL or a folder: mmlm data new my.csv")
    path = Path(options.name).expanduser()
    out = options.out or Path(f"{path.stem}-mmlm")
    model = model_words(options.like or "own_data")
    words = Words(
        image=options.image,
        answer=options.answer,
        question=options.question,
        ask=options.ask or DEFAULT_QUESTION,
        group=options.group,
    )
    found = survey_own(path, words, read=_read_of(model), progress=_bar)
    facts = write_own(
        found,
        out,
        model=model,
        most=MOST_DIFFERENT if options.alike is None else options.alike,
        seed=options.seed or 0,
        fresh=options.fresh,
    )
    print("\n".join(lines_of(facts)))
    print(f"written     {out}/: source.yaml, recipe.yaml, benchmark.yaml and the rows")
    print(f"next        mmlm check {out}/recipe.yaml\n            mmlm train {out}/recipe.yaml")


def _read_of(model: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the picture readers in the words of a model."""
    image = model.get("image")
    return image.get("read", {}) if isinstance(image, dict) else {}


def _bar(each: Iterable[Any], total: int) -> Iterable[Any]:
    """Show how many pictures are opened, where somebody looks."""
    from tqdm import tqdm

    return tqdm(each, total=total, desc="pictures", unit="", disable=None, leave=False)


def _build(options: Options) -> None:
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
        usage="new SRC [options] | build [NAME] [--out DIR] [--fresh]",
        about="new: open every row and picture of your own table or folder, say what is there, "
        "and write rows\nin three splits, a recipe and a benchmark. build: fetch and make a data "
        "set of ours, once; without\na NAME, list them.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm data new my.csv --image path --answer report --group patient_id", "your table"),
            ("mmlm data new photos/", "pictures with a text file beside each"),
            ("mmlm data new my.csv --like chest_xray", "with the model of that recipe"),
            ("mmlm data build", "what there is"),
            ("mmlm data build quickstart", "a few minutes and a network, once"),
        ],
    )
}
