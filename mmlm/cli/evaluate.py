"""`mmlm eval`: a model on benchmarks, with the image, without it, and with another one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.base import Command, Options, Parser, hush, one_of
from mmlm.errors import UsageError

if TYPE_CHECKING:
    from mmlm.evaluation import Benchmark, Evaluation

_CONDITIONS = ("image", "blind", "shuffled", "permuted")
_LOOK_LIMIT = 500


def _arguments(parser: Parser) -> None:
    parser.word(
        "model", metavar="MODEL", help="a run, a model folder, a Hub id, or a predictions.jsonl"
    )
    parser.word(
        "benchmarks",
        metavar="BENCHMARK",
        nargs="*",
        default=[],
        help="a name from `mmlm recipes`, or the path of a YAML file",
    )
    parser.add_argument("--suite", metavar="NAME", help="all benchmarks of a suite, such as core")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where answers and scores go (default: MODEL/eval)"
    )
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="local copies of benchmarks: DIR/NAME is read"
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
        "--look-limit",
        metavar="N",
        type=int,
        default=_LOOK_LIMIT,
        help=f"of these, N without the image and with another (default: {_LOOK_LIMIT})",
    )
    parser.add_argument(
        "--likelihood", action="store_true", help="take the likeliest choice, not what is written"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="what is drawn (default: 0)"
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="default: 16")
    parser.add_argument("--fresh", action="store_true", help="forget the answers of an earlier run")
    parser.add_argument("--json", action="store_true", help="print results.json and nothing else")
    _more(parser)


def _more(parser: Parser) -> None:
    parser.add_argument(
        "--baseline", metavar="OTHER", help="another model, or its eval folder: before and after"
    )
    parser.add_argument(
        "--dialects", action="store_true", help="the same answers as every harness reads them"
    )
    parser.add_argument(
        "--contamination",
        metavar="RECIPE",
        help="look for the benchmark in the training data of a recipe",
    )
    parser.add_argument(
        "--probe", action="store_true", help="probe the frozen encoder and the LLM's layers too"
    )
    parser.add_argument(
        "--endpoint", metavar="URL", help="MODEL is a name at an OpenAI-compatible address"
    )
    parser.add_argument(
        "--card", action="store_true", help="write the scores into MODEL's README and .eval_results"
    )
    parser.add_argument("--vllm", action="store_true", help="let vLLM run MODEL, a stock folder")


def _run(options: Options) -> None:
    hush()
    loaded = _load(options)
    if options.model.endswith(".jsonl"):
        _read_again(options, loaded)
        return
    from mmlm.reports.carried import carried

    folder = _card_folder(options.model) if options.card else None
    out = options.out or default_folder(options.model, known=bool(options.endpoint))
    result = _evaluate(options, _model(options), loaded, out)
    if os.environ.get("RANK", "0") != "0":
        return  # the first of several processes tells and compares
    comparison = _compare(options, loaded, result)
    if folder is not None:
        from mmlm.evaluation.reports.card import write_scores

        write_scores(folder, [score.to_dict() for score in result.scores], loaded)
    if options.json:
        print((result.out / "results.json").read_text(encoding="utf-8"), end="")
        return
    show(result)
    for line in carried(result.details):
        print(f"picture     {line}")
    if set(options.conditions) != {"image"}:
        most = f"at most {options.look_limit:,} of each kind of question (--look-limit)"
        print(f"Blind, shuffled and permuted were asked {most}.")
    if comparison is not None:
        _console().print(comparison.table())
    if options.dialects:
        for benchmark in loaded:
            _show_dialects(benchmark, result.out / "predictions.jsonl")
    if options.contamination:
        _show_contamination(options.contamination, loaded, result.out)
    if options.probe:
        _show_probe(options.model, loaded, result.out)


def _card_folder(model: str) -> Path:
    """Return the folder whose card gets the scores, before anything is measured."""
    for folder in (Path(model) / "model", Path(model)):
        if (folder / "config.json").is_file():
            return folder
    raise UsageError(f"mmlm eval: --card needs a model folder; {model} is none.")


def _load(options: Options) -> list[Benchmark]:
    """Read every benchmark that was named; with `--data`, from its copy there."""
    from mmlm.evaluation.benchmarks.benchmark import load_benchmark, suite
    from mmlm.evaluation.benchmarks.plan import load_all

    names = [*options.benchmarks, *(suite(options.suite) if options.suite else ())]
    if not names:
        raise UsageError("mmlm eval: name a benchmark, or a --suite; `mmlm recipes` lists them.")
    loaded: list[Benchmark] = []
    for name in dict.fromkeys(names):
        copy = None if options.data is None else options.data / name
        own = copy if copy is not None and copy.exists() else None
        loaded.append(load_benchmark(name, data=own))
    loaded = load_all(loaded)
    return [_by_likelihood(each) for each in loaded] if options.likelihood else loaded


def _by_likelihood(benchmark: Benchmark) -> Benchmark:
    from dataclasses import replace

    if not all(item.target.choices for item in benchmark.items):
        raise UsageError(f"mmlm eval: {benchmark.name} has no choices that could be compared.")
    config = benchmark.config.model_copy(update={"decide": "likelihood"})
    return replace(benchmark, config=config)


def _model(options: Options) -> Any:
    """Return what answers: the folder itself, or a backend of its own."""
    if options.endpoint:
        from mmlm.evaluation.asking.endpoint import EndpointBackend

        key = os.environ.get("OPENAI_API_KEY", "")
        return EndpointBackend(options.endpoint, options.model, key=key)
    if options.vllm:
        from mmlm.evaluation.asking.vllm_backend import VLLMBackend

        return VLLMBackend(options.model)
    return options.model


def _evaluate(options: Options, model: Any, loaded: list[Benchmark], out: Path) -> Evaluation:
    from mmlm.evaluation import evaluate

    return evaluate(
        model,
        loaded,
        out,
        conditions=options.conditions,
        limit=options.limit,
        look_limit=options.look_limit,
        seed=options.seed,
        batch_size=options.batch_size,
        fresh=options.fresh,
        quiet=options.json,
    )


def _compare(options: Options, loaded: list[Benchmark], after: Evaluation) -> Any:
    """Measure the other model, or read what was measured, and write the comparison."""
    if not options.baseline:
        return None
    from mmlm.evaluation import evaluate
    from mmlm.evaluation.reports.comparison import (
        compare_evaluations,
        read_evaluation,
        write_comparison,
    )

    other = Path(options.baseline)
    if (other / "predictions.jsonl").is_file():
        before = read_evaluation(loaded, other)
    else:
        before = evaluate(
            options.baseline,
            loaded,
            after.out / "baseline",
            conditions=("image",),
            limit=options.limit,
            seed=options.seed,
            batch_size=options.batch_size,
            fresh=options.fresh,
            quiet=options.json,
            with_report=False,
        )
    names = (str(options.baseline), str(options.model))
    comparison = compare_evaluations(loaded, before, after, names=names, seed=options.seed)
    write_comparison(comparison, after.out)
    return comparison


def _read_again(options: Options, loaded: list[Benchmark]) -> None:
    """Work on a file of predictions; nothing is answered."""
    if not options.dialects:
        raise UsageError("mmlm eval: a file of predictions is read with --dialects.")
    for benchmark in loaded:
        _show_dialects(benchmark, Path(options.model))


def _show_dialects(benchmark: Benchmark, predictions: Path) -> None:
    import json

    from mmlm.evaluation.reports.dialects import in_all_dialects, read_answers_of

    found = in_all_dialects(benchmark, read_answers_of(predictions, benchmark.name))
    path = predictions.with_name(f"dialects-{benchmark.name}.json")
    path.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    console = _console()
    console.print(found.table())
    if found.mismatches:
        console.print(found.why())
    print(f"dialects    {path}")


def _show_contamination(recipe: str, loaded: list[Benchmark], out: Path) -> None:
    import json

    from mmlm.evaluation.reports.contamination import contamination, contamination_table

    found = contamination(loaded, _training_samples(recipe))
    path = out / "contamination.json"
    path.write_text(json.dumps([each.to_dict() for each in found], indent=2), encoding="utf-8")
    _console().print(contamination_table(found))
    print(f"contamination  {path}")


def _training_samples(recipe: str) -> Iterator[Any]:
    """Give every sample that the stages of a recipe learn from, each source once."""
    from mmlm.data import BadRowError, open_mixture
    from mmlm.training.recipe import read_recipe
    from mmlm.training.trainer import find_data

    read, folder, _ = read_recipe(recipe)
    seen: set[str] = set()
    for stage in read.stages:
        words = read.data_of(stage)
        mixture = open_mixture(words, folder=folder, origin=stage.name, find=find_data)
        for source in mixture.sources:
            if source.fingerprint() in seen:
                continue
            seen.add(source.fingerprint())
            for row in range(len(source)):
                try:
                    yield source.sample(row)
                except BadRowError:
                    continue


def _show_probe(model: str, loaded: list[Benchmark], out: Path) -> None:
    import json

    from mmlm.assistant import load
    from mmlm.evaluation.probes.frozen import probe_all, probe_tables

    found = probe_all(load(model), loaded)
    path = out / "probe.json"
    path.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    for table in probe_tables(found):
        _console().print(table)
    print(f"probe       {path}")


def _console() -> Any:
    from rich.console import Console

    return Console()


def show(result: Evaluation) -> None:
    """Print the table of scores, write the report, and say where it is."""
    from mmlm.evaluation.reports.report import report
    from mmlm.reports import scores_table

    _console().print(scores_table([score.to_dict() for score in result.scores]))
    print(f"scores      {result.out / 'results.json'}\nreport      {report(result).page}")


def default_folder(model: str, *, known: bool = False) -> Path:
    """Return where the scores of a model go: beside it, or under `runs/` for a Hub model."""
    folder = Path(model)
    if folder.is_dir():
        return folder / "eval"
    if not known and (folder.is_absolute() or model.startswith(".")):
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
            ("mmlm eval runs/quickstart --suite core", "what papers of this size report"),
            ("mmlm eval runs/new mine.yaml --baseline runs/old", "what changed, and is it sure?"),
            ("mmlm eval runs/x/eval/predictions.jsonl pope --dialects", "why two numbers differ"),
        ],
    )
}
