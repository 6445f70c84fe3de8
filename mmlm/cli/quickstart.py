"""`mmlm quickstart`: from nothing to a small assistant that was trained and measured here.

    data build quickstart ──► train quickstart ──► eval quickstart_* ──► report ──► chat

It calls what the commands of these names call, one after another, and decides nothing by
itself: the recipe, the benchmarks and the data set are files like any other. Each step finds
what an earlier, interrupted one left, so the same command goes on.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.base import Command, Options, Parser, hush
from mmlm.cli.chat import Terminal, talk
from mmlm.cli.data import say
from mmlm.recipes import list_recipes

if TYPE_CHECKING:
    from mmlm.assistant import Assistant
    from mmlm.data.builders import Built
    from mmlm.evaluation import Evaluation
    from mmlm.evaluation.results import Score

RECIPE = DATA = "quickstart"
_EXAMPLES = 4
_LOG_COLUMNS = 140


def _arguments(parser: Parser) -> None:
    parser.add_argument(
        "--encoder", metavar="ID", help="another encoder: a Hub id, or timm/NAME (needs a network)"
    )
    parser.add_argument(
        "--llm", metavar="ID", help="another language model: a Hub id or a folder (needs a network)"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="another order and beginning")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/quickstart"),
        help="where everything goes (default: runs/quickstart)",
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever DIR holds")
    parser.add_argument("--no-chat", action="store_true", help="end after the table")


def _run(options: Options) -> None:
    from mmlm.assistant import load
    from mmlm.data.builders import build
    from mmlm.training import train

    hush()
    begun = time.monotonic()
    _headline(1, "pictures")
    built = build(DATA, say=say)
    print(f"data        {built.folder}")
    _headline(2, "training")
    train(RECIPE, out=options.out, overrides=_overrides(options), fresh=options.fresh)
    _headline(3, "measuring")
    assistant = load(options.out)
    result = measure(assistant, options.out, built, seed=options.seed or 0, fresh=options.fresh)
    about = write_about(assistant, options.out, built, result)
    _headline(4, "what came of it")
    _show(options.out, result, about, minutes=(time.monotonic() - begun) / 60)
    if not options.no_chat and sys.stdin.isatty():
        talk(Terminal(assistant.chat(max_new_tokens=64)), options.out)


def _headline(number: int, what: str) -> None:
    print(f"\n{number} of 4  {what}", flush=True)


def _overrides(options: Options) -> dict[str, Any]:
    """Turn the flags into lines of the recipe."""
    changes: dict[str, Any] = {}
    if options.encoder is not None:
        use, checkpoint = "hf", options.encoder
        if checkpoint.startswith("timm/"):
            use, checkpoint = "timm", checkpoint.removeprefix("timm/")
        changes["model.vision"] = {"use": use, "checkpoint": checkpoint}
    if options.llm is not None:
        changes["model.language"] = {"use": "causal_lm", "checkpoint": options.llm}
    if options.seed is not None:
        changes["run.seed"] = options.seed
    return changes


def measure(
    assistant: Assistant, out: Path, built: Built, *, seed: int, fresh: bool = False
) -> Evaluation:
    """Ask the held-out questions with the image, blind and with another image."""
    from mmlm.evaluation import evaluate
    from mmlm.evaluation.probes.nearest import NearestNeighbour, remember

    benchmarks = [name for name in list_recipes("eval") if name.startswith(f"{RECIPE}_")]
    neighbour = NearestNeighbour(remember(built.rows("align")), seed=seed)
    return evaluate(assistant, benchmarks, out / "eval", seed=seed, fresh=fresh, extra=[neighbour])


def write_about(
    assistant: Assistant, out: Path, built: Built, result: Evaluation
) -> dict[str, Any]:
    """Write down what the model has learned to see, in its folder and on its card."""
    from mmlm.hub import write_card
    from mmlm.hub.save import portable
    from mmlm.hub.weights import MANIFEST
    from mmlm.serving.about import FILE

    facts, folder = built.report, out / "model"
    groups, photos = ", ".join(facts["seen_groups"]), ", ".join(facts["photo_names"])
    num_seen = facts["things"] - len(facts["unseen_things"])
    asked = {
        prediction.case.item.target.references[0]: prediction.case
        for prediction in result.predictions
        if prediction.case.condition == "image" and prediction.case.images
    }
    chosen = list(asked.values())[:: max(1, len(asked) // _EXAMPLES)][:_EXAMPLES]
    about = {
        "title": "quickstart",
        "learned": f"It learned from drawings of {num_seen} everyday things ({groups}) and from "
        f"small photos of these: {photos}.",
        "limits": "Anything else it has never seen, and about that it guesses. It was made in "
        "minutes, around a very small language model.",
        "examples": [
            {"question": case.prompt, "image": _copied(folder, case.images[0], place)}
            for place, case in enumerate(chosen)
        ],
    }
    text = json.dumps(about, indent=2, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
    notes: dict[str, Any] = {
        "title": "MMLM quickstart",
        "sees": f"{about['learned']} {about['limits']}",
        "scores": [score.to_dict() for score in result.scores],
    }
    saved_as = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["saved_as"]
    config = portable(assistant.model.config)
    write_card(folder, config, class_name=saved_as, notes=notes, has_recipe=True)
    return about


def _copied(folder: Path, image: Any, number: int) -> str:
    """Copy a picture into a folder, so that the folder can be moved; return its place inside."""
    place = Path("examples") / f"{number}{Path(image).suffix}"
    (folder / "examples").mkdir(exist_ok=True)
    (folder / place).write_bytes(Path(image).read_bytes())
    return place.as_posix()


def _show(out: Path, result: Evaluation, about: dict[str, Any], *, minutes: float) -> None:
    from rich.console import Console

    from mmlm.reports import scores_table, write_report

    written = write_report(
        out, run=out, scores=result.out, title="MMLM quickstart", lead=_lead(about)
    )
    # A log file is as wide as the table needs; only a terminal has an edge.
    console = Console() if sys.stdout.isatty() else Console(width=_LOG_COLUMNS)
    console.print(scores_table([score.to_dict() for score in result.scores]))
    print(_verdict(result.scores))
    example = next((e for e in about["examples"]), None)
    picture = out / "model" / example["image"] if example else "photo.jpg"
    print(
        f"""
It took {minutes:.0f} minutes.
  report     {written.page}
  pictures   {written.sheet}
  scores     {result.out / "results.json"}
  model      {out / "model"}
  delta      {out / "delta"} (what was learnt, beside the names of the base parts)

Talk to it:
  mmlm chat {out}
  mmlm app {out}
  python -c 'import mmlm; print(mmlm.load("{out}").answer("What is this?", ["{picture}"]))'
"""
    )


def _lead(about: dict[str, Any]) -> str:
    return f"Trained and measured on this machine. {about['learned']} {about['limits']}"


def _verdict(scores: tuple[Score, ...]) -> str:
    """Say for each question whether the picture mattered: whether the intervals are apart."""
    found: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        found.setdefault((score.set, score.question), {})[score.condition] = score
    lines: list[str] = []
    for (name, question), by in found.items():
        if "image" in by and "blind" in by:
            gain = 100 * (by["image"].score - by["blind"].score)
            looks = "it looks" if by["image"].low > by["blind"].high else "not proven to look"
            lines.append(f"  {name}, {question}: {gain:+.1f} points over blind; {looks}")
    return "\n".join(["Does it look at the picture?", *lines])


COMMANDS = {
    "quickstart": Command(
        name="quickstart",
        usage="[options]",
        about="Train a small real assistant on this machine, score it with the image, without it "
        "and with\nanother one, show what came of it, and offer a chat. Stopped? The same command "
        "goes on.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm quickstart", "the whole way, on two cores"),
            ("mmlm quickstart --seed 1 --out runs/second --no-chat", "once more, otherwise begun"),
            (
                "mmlm quickstart --encoder google/siglip2-base-patch16-256 --out runs/siglip",
                "with an encoder of the Hub",
            ),
        ],
    )
}
