"""`mmlm recipes`: the recipes there are, and a copy of one to change."""

from __future__ import annotations

from pathlib import Path

from mmlm.cli.base import Command, Options, Parser, one_of
from mmlm.errors import UsageError
from mmlm.recipes import KINDS, Kind, find_recipe, first_line, list_recipes

_HEADINGS: dict[Kind, str] = {
    "train": "how to train            mmlm train NAME",
    "eval": "what to measure         mmlm eval MODEL NAME",
    "mixtures": "what to train on        data: NAME  in a recipe",
    "sources": "where data come from    mmlm data build NAME",
}


def _arguments(parser: Parser) -> None:
    parser.word("action", metavar="copy", nargs="?", type=one_of("action", ["copy"]))
    parser.word("name", metavar="NAME", nargs="?", help="a name that `mmlm recipes` lists")
    parser.add_argument("--to", metavar="FILE", type=Path, help="where to (default: ./NAME.yaml)")


def _run(options: Options) -> None:
    if options.action is None:
        print(_table())
    elif options.name is None:
        raise UsageError("mmlm recipes copy needs the NAME of a recipe; `mmlm recipes` lists them.")
    else:
        _copy(options.name, options.to)


def _table() -> str:
    lines: list[str] = []
    for kind in KINDS:
        recipes = list_recipes(kind)
        if recipes:
            width = max(map(len, recipes)) + 2
            rows = [f"  {name:{width}}{first_line(path)}" for name, path in recipes.items()]
            lines += [_HEADINGS[kind], *rows, ""]
    return "\n".join(lines).rstrip()


def _copy(name: str, target: Path | None) -> None:
    kinds: list[Kind] = [kind for kind in KINDS if name in list_recipes(kind)]
    source = find_recipe(kinds[0] if kinds else "train", name)
    target = target or Path(source.name)
    if target.exists():
        raise UsageError(
            f"{target} exists already and is left as it is. Name another: "
            f"mmlm recipes copy {name} --to FILE"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    print(f"{target} is a copy of the recipe {name}. Where a recipe is named, its path does too.")
    for kind in kinds[1:]:
        print(f"{kind} holds another {name}: {list_recipes(kind)[name]}")


COMMANDS = {
    "recipes": Command(
        name="recipes",
        usage="[copy NAME] [--to FILE]",
        about="List the recipes there are, or copy one into a file that you can change.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm recipes", "what there is"),
            ("mmlm recipes copy quickstart --to mine.yaml", "begin from one that works"),
            ("mmlm train mine.yaml", "a path stands where a name does"),
        ],
    )
}
