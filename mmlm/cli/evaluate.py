"""`mmlm eval`: a model on benchmarks, with the image, without it, and with another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli.base import Command, Options, Parser, hush, one_of
from mmlm.errors import UsageError

if TYPE_CHECKING:
    from mmlm.evaluation import Evaluation

_CONDITIONS = ("image", "blind", "shuffled", "permuted")


def _arguments(parser: Parser) -> None:
    parser.word("model", metavar="MODEL", help="a run, a model folder, or a Hub id")
    parser.word(
        "benchmarks",
        metavar="BENCHMARK",
        nargs="+",
        help="a name from `mmlm recipes`, or the path of a YAML file",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where answers and scores go (default: MODEL/eval)"
    )
    parser.add_argument(
        "--conditions",
        metavar="NAME",
        nargs="+",
        type=one_of("condition", _CONDITIONS),
        default=["image", "blind", "shuffled"],
        help=f"some of: {', '.join(_CONDITIONS)} (default: the first three)",
    )
    parser.add_argument(
        "--limit", metavar="N", type=int, help="draw N items of each kind of question"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="what is drawn (default: 0)"
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="default: 16")
    parser.add_argument("--fresh", action="store_true", help="forget the answers of an earlier run")
    parser.add_argument("--json", action="store_true", help="print results.json and nothing else")


def _run(options: Options) -> None:
    from mmlm.evaluation import evaluate

    hush()
    out = options.out or default_folder(options.model)
    result = evaluate(
        options.model,
        options.benchmarks,
        out,
        conditions=options.conditions,
        limit=options.limit,
        seed=options.seed,
        batch_size=options.batch_size,
        fresh=options.fresh,
        quiet=options.json,
    )
    if options.json:
        print((result.out / "results.json").read_text(encoding="utf-8"), end="")
        return
    show(result)


def show(result: Evaluation) -> None:
    """Print the table of scores, write the report, and say where it is."""
    from rich.console import Console

    from mmlm.evaluation.report import report
    from mmlm.reports import scores_table

    Console().print(scores_table([score.to_dict() for score in result.scores]))
    print(f"scores      {result.out / 'results.json'}\nreport      {report(result).page}")


def default_folder(model: str) -> Path:
    """Return where the scores of a model go: beside it, or under `runs/` for a Hub model."""
    folder = Path(model)
    if folder.is_dir():
        return folder / "eval"
    if folder.is_absolute() or model.startswith("."):
        raise UsageError(f"mmlm eval: there is no folder {model}.")
    return Path("runs") / model.replace("/", "--") / "eval"


COMMANDS = {
    "eval": Command(
        name="eval",
        usage="MODEL BENCHMARK ... [options]",
        about="Measure a model: with the image, blind, and with a shuffled image, each with a 95 % "
        "confidence interval.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm eval runs/quickstart mine.yaml", "your own questions"),
            ("mmlm eval runs/quickstart mine.yaml --limit 200", "a first impression"),
        ],
    )
}
