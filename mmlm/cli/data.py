"""`mmlm data`: from your own table to a training; sets built out of packages; a look at any."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmlm.cli.base import Command, Options, Parser, one_of
from mmlm.errors import UsageError

_OF_NEW = ("image", "answer", "question", "ask", "group", "alike", "seed")
_OF_PREVIEW = ("num", "html", "like")


def _arguments(parser: Parser) -> None:
    actions = ["new", "build", "preview"]
    parser.word("action", metavar="new|build|preview", type=one_of("action", actions))
    parser.word(
        "name",
        metavar="SRC|NAME",
        nargs="?",
        help="new: a CSV, JSONL or folder with captions; build: a data set, none lists them; "
        "preview: a file, a folder or a data recipe",
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
        "--like",
        metavar="RECIPE",
        help="whose model to take over; for preview, a folder with a model too (default: own_data)",
    )
    new.add_argument(
        "--alike",
        metavar="SHARE",
        type=float,
        help="how much the hashes of pictures that look alike may differ (default: 0.15)",
    )
    new.add_argument("--seed", metavar="N", type=int, help="changes what goes where (default: 0)")
    look = parser.add_argument_group("preview")
    look.add_argument(
        "--num", metavar="N", type=int, help="how many samples to plan (default: 200)"
    )
    look.add_argument(
        "--html", metavar="FILE", type=Path, help="write a page with tiles and tokens"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="a new folder (default: SRC-mmlm here; for build, in the cache)",
    )
    parser.add_argument("--fresh", action="store_true", help="make it again, even if it is there")


def _run(options: Options) -> None:
    foreign = {"new": ("num", "html"), "build": (*_OF_NEW, *_OF_PREVIEW), "preview": _OF_NEW}
    for name in foreign[options.action]:
        if getattr(options, name) is not None:
            home = "preview" if name in ("num", "html") else "new"
            raise UsageError(
                f"mmlm data {options.action} takes no --{name}; it belongs to mmlm data {home}."
            )
    {"new": _new, "build": _build, "preview": _preview}[options.action](options)


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


def _preview(options: Options) -> None:
    """Show samples as the model sees them; fail where a data set as a whole is wrong."""
    from mmlm.cli.base import hush
    from mmlm.data import open_mixture
    from mmlm.data.facts import facts_of
    from mmlm.data.planning import Planner
    from mmlm.data.preview import as_terminal, complaint, survey, told
    from mmlm.data.preview_page import preview_page
    from mmlm.errors import DataError

    if options.name is None:
        raise UsageError("mmlm data preview needs a file, a folder or the name of a data recipe.")
    hush()
    words: Any = options.name
    if Path(words).is_dir():
        words = {"use": "folder", "path": words, "question": "Describe the picture."}
    facts = _facts(options.name, facts_of)
    mixture = open_mixture(words, folder=Path.cwd(), shuffle=False, find=_recipe_of_data)
    processor = _processor(options.like or "own_data")
    planner = Planner(mixture, processor, max_tokens=_ROW_TOKENS, max_tiles=_ROW_TILES, share=True)
    found = survey(planner, range(min(options.num or _LOOKED_AT, mixture.epoch_rows)))
    print("\n".join([*facts, *told(found, processor)]))
    for sample in found.samples[:_SHOWN]:
        print(f"\n{as_terminal(sample, processor, colour=sys.stdout.isatty())}")
    if options.html is not None:
        lead = "; ".join(line.replace("  ", " ") for line in facts)
        page = preview_page(found, processor, title=f"{options.name}: what is seen", lead=lead)
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(page, encoding="utf-8")
        print(f"\npage        {options.html}")
    if (wrong := complaint(found, budget=_BUDGET)) is not None:
        raise DataError(wrong)


_ROW_TOKENS, _ROW_TILES, _LOOKED_AT, _SHOWN, _BUDGET = 4096, 256, 200, 2, 0.05


def _facts(name: str, read: Any) -> list[str]:
    """Return what a data recipe says about its set."""
    from mmlm.config import read_yaml
    from mmlm.recipes import list_recipes

    path = list_recipes("sources").get(name, Path(name))
    if path.suffix != ".yaml" or not path.is_file():
        return []
    facts = read(read_yaml(path), origin=str(path))
    return [] if facts is None else facts.lines()


def _recipe_of_data(name: str) -> Path:
    from mmlm.recipes import find_recipe, list_recipes

    return find_recipe("mixtures" if name in list_recipes("mixtures") else "sources", name)


def _processor(like: str) -> Any:
    """Return the processor of a saved model, or of the model that a recipe names."""
    from mmlm.assistant import compose, load

    if Path(like).is_dir():
        return load(like).processor
    from mmlm.data.own_files import model_words

    return compose(**model_words(like)).processor


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
        usage="new SRC [options] | build [NAME] [--out DIR] [--fresh] | preview SRC [--html FILE]",
        about="new: open every row and picture of your own table or folder, say what is there, "
        "and write rows\nin three splits, a recipe and a benchmark. build: fetch and make a data "
        "set of ours, once; without\na NAME, list them. preview: plan samples as for training and "
        "show their tokens; fails if answers would\nbe lost.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm data new my.csv --image path --answer report --group patient_id", "your table"),
            ("mmlm data new photos/", "pictures with a text file beside each"),
            ("mmlm data new my.csv --like chest_xray", "with the model of that recipe"),
            ("mmlm data preview lcs_558k --like llava", "licence, drops, tokens, labels"),
            ("mmlm data preview my.jsonl --like runs/x/model --html look.html", "with its tiles"),
            ("mmlm data build", "what there is"),
            ("mmlm data build quickstart", "a few minutes and a network, once"),
        ],
    )
}
