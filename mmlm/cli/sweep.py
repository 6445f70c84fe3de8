"""`mmlm sweep`: one recipe with other parts, trained on the same tokens, in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.base import Command, Options, Parser, hush, key_values
from mmlm.errors import EvaluationError

if TYPE_CHECKING:
    from mmlm.training.sweep import Outcome


def _arguments(parser: Parser) -> None:
    parser.word(
        "recipe", metavar="RECIPE", help="a name from `mmlm recipes`, or the path of a YAML file"
    )
    parser.word(
        "grid", metavar="KEY=V1,V2", nargs="+",
        help="values to try for a line of the recipe; several keys give every combination",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", type=Path,
        help="where the cells go (default: runs/RECIPE-sweep); again means: go on",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", metavar="N", type=int,
        help="tokens of each stage (default: as many as the first cell takes)",
    )  # fmt: skip
    parser.add_argument(
        "--benchmarks", metavar="NAME", nargs="+", default=[], help="measure every cell on these"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="items of each kind of question")
    parser.add_argument("--json", action="store_true", help="print sweep.json and nothing else")


def _run(options: Options) -> int:
    from mmlm.reports.grid import grid_page, grid_table
    from mmlm.training.recipe import read_recipe
    from mmlm.training.sweep import cells_of, run_cell, tokens_of

    hush()
    cells = cells_of(key_values(options.grid))
    recipe, _, name = read_recipe(options.recipe)
    out: Path = options.out or Path("runs") / f"{name}-sweep"
    tokens: dict[str, int] = {}
    if options.tokens:
        tokens = {stage.name: options.tokens for stage in recipe.stages}
    outcomes: list[Outcome] = []
    for number, cell in enumerate(cells):
        if not options.json:
            print(f"\ncell {number + 1} of {len(cells)}: {cell.name}", flush=True)
        outcome = run_cell(options.recipe, cell, out, tokens=tokens, quiet=options.json)
        outcomes.append(outcome)
        if outcome.result is not None:
            tokens = tokens or tokens_of(outcome.result)
            _measure(outcome, options)
        rows = [one.row() for one in outcomes]
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "sweep.json", json.dumps(rows, indent=2) + "\n")
    rows = [one.row() for one in outcomes]
    title = f"{name}: {len(rows)} cells"
    budget = ", ".join(f"{stage} {count:,}" for stage, count in tokens.items())
    lead = f"Every cell learnt from the same number of tokens, to within a step: {budget}."
    _write(out / "sweep.html", grid_page(rows, out, title=title, lead=lead))
    if options.json:
        print((out / "sweep.json").read_text(encoding="utf-8"), end="")
    else:
        print(f"\n{grid_table(rows, title=title)}{lead}\npage        {out / 'sweep.html'}")
    return 1 if any(one.error for one in outcomes) else 0


def _measure(outcome: Outcome, options: Options) -> None:
    """Measure a cell, as `mmlm eval` does; what was measured is not measured again."""
    if not options.benchmarks or outcome.result is None:
        return
    from mmlm.evaluation import evaluate

    try:
        found: Any = evaluate(
            str(outcome.result.out), options.benchmarks, conditions=("image",),
            limit=options.limit, quiet=options.json, with_report=False,
        )  # fmt: skip
    except EvaluationError as error:
        outcome.error = f"EvaluationError: {error}"
    else:
        outcome.scores = [score.to_dict() for score in found.scores]


def _write(path: Path, text: str) -> None:
    from mmlm.storage.atomic import write_atomic

    write_atomic(path, text)


COMMANDS = {
    "sweep": Command(
        name="sweep",
        usage="RECIPE KEY=V1,V2 ... [options]",
        about="Train a recipe once for every combination of values, each on the same number of "
        "tokens,\nand compare: one table, sweep.json, and a page with plots.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm sweep mine.yaml model.connector.use=mlp,linear", "two connectors"),
            (
                "mmlm sweep mine.yaml model.connector.depth=1,2 stages.align.peak_lr=1e-3,5e-4",
                "four cells",
            ),
            ("mmlm sweep mine.yaml run.seed=0,1,2 --benchmarks pope", "and their scores"),
        ],
    )
}
