"""The model card: what a folder is, what it is made of, how well it does, and how to open it.

The card says only what is known: licences that the parts declare, scores that were handed over
with their intervals, what was dropped in training. Metadata is written in the form that the Hub
reads. Sending a folder to the Hub is the work of `mmlm.hub.push`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCardData

from mmlm.hub.card_training import training_section
from mmlm.hub.opens import opens_in
from mmlm.modeling import MMLMConfig

CARD = "README.md"
EVAL_RESULTS = ".eval_results"
_QUANTISED = re.compile(r"(?<![A-Za-z0-9])(I?Q\d(?:_[0-9A-Z]+)*)(?![A-Za-z0-9])", re.IGNORECASE)


class Source(NamedTuple):
    """Where one part came from."""

    part: str
    name: str
    is_on_hub: bool
    licence: str
    note: str


def write_card(
    folder: Path,
    config: MMLMConfig,
    *,
    class_name: str,
    notes: dict[str, Any],
    has_recipe: bool = False,
) -> None:
    """Write `README.md`, and `.eval_results/*.yaml` where there are scores, into a folder.

    Args:
        folder: The model folder.
        config: The composition, without paths of this machine.
        class_name: The class that the folder holds.
        notes: ``scores`` (rows of a results.json), ``dropped`` (cause to count), ``licence``,
            ``licences`` (part to licence), ``sees`` (a sentence), ``datasets`` (Hub ids),
            ``title``, ``training`` (facts of each stage); all optional.
        has_recipe: Whether the folder holds the recipe.
    """
    sources = sources_of(config, notes.get("licences") or {})
    text = "\n\n".join(
        section
        for section in (
            _head(config, class_name, notes),
            _parts(config, sources),
            _loading(class_name),
            _scores(notes.get("scores") or ()),
            training_section(notes.get("training") or ()),
            _dropped(notes.get("dropped")),
            _opens(config),
            _origin(class_name, has_recipe),
        )
        if section
    )
    data = card_data(sources, notes)
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")
    write_eval_results(folder, notes.get("scores") or ())


def card_data(sources: Sequence[Source], notes: dict[str, Any]) -> ModelCardData:
    """Return the metadata that the Hub reads."""
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=notes.get("licence"),
        base_model=[source.name for source in sources if source.is_on_hub] or None,
        datasets=notes.get("datasets"),
        tags=["mmlm", "vision-language"],
    )


def sources_of(config: MMLMConfig, licences: dict[str, str]) -> list[Source]:
    """Return where encoder and language model came from, and what their licences are."""
    parts: list[Source] = []
    for part in ("vision", "language"):
        values = (config.sources or {}).get(part) or {}
        weights = values.get("weights")
        name = _reference(weights) or str(
            values.get("checkpoint") or values.get("use") or "unknown"
        )
        is_on_hub = not name.startswith("package:") and name.count("/") == 1
        licence = licences.get(part) or _declared(name) or "not declared; ask its publisher"
        parts.append(Source(part, name, is_on_hub, licence, _note(name, values)))
    return parts


def _reference(weights: Any) -> str | None:
    """Return a reference to weights as one string."""
    if isinstance(weights, dict) and weights.get("package"):
        return f"package:{weights['package']}/{weights.get('file', '')}"
    return weights if isinstance(weights, str) else None


def _note(name: str, values: dict[str, Any]) -> str:
    """Say what happened to the weights before they came here."""
    if not name.endswith(".gguf"):
        return ""
    kind = values.get("quantisation") or next(iter(_QUANTISED.findall(Path(name).stem)), None)
    return f"dequantised from {str(kind).upper() if kind else 'a GGUF file'}"


def _declared(name: str) -> str | None:
    """Return the licence that a Python package declares, for parts that came in one."""
    if not name.startswith("package:"):
        return None
    module = name.removeprefix("package:").split("/")[0]
    for distribution in metadata.packages_distributions().get(module, []):
        facts: Any = metadata.metadata(distribution)
        classified = [
            line.rsplit(" :: ", 1)[-1]
            for line in facts.get_all("Classifier") or []
            if line.startswith("License ::")
        ]
        said = facts.get("License-Expression") or facts.get("License") or ", ".join(classified)
        if said and said != "UNKNOWN":
            return said.splitlines()[0][:100]
    return None


def _head(config: MMLMConfig, class_name: str, notes: dict[str, Any]) -> str:
    title = notes.get("title") or "A vision-language assistant"
    lines = [f"# {title}", "", f"{_sentence(config)} It is saved as `{class_name}`."]
    if sees := notes.get("sees"):
        lines += ["", f"**What it has learned to see.** {sees}"]
    return "\n".join(lines)


def _sentence(config: MMLMConfig) -> str:
    reducer = f"reducer `{config.reducer['use']}`, " if config.reducer else ""
    return (
        f"Image policy `{config.image['use']}`, encoder `{config.vision['use']}` "
        f"({config.facts.feature}), {reducer}connector `{config.connector['use']}`, language model "
        f"`{config.text_config.model_type}`: a picture of the encoder's own size becomes "
        f"{config.counter().tokens_per_tile} tokens."
    )


def _parts(config: MMLMConfig, sources: Sequence[Source]) -> str:
    rows = [("part", "from", "licence", "note")]
    rows += [(s.part, f"`{s.name}`", s.licence, s.note) for s in sources]
    rows += [("connector", "trained with MMLM", "that of this model", "")]
    return f"## Parts\n\n{_table(rows)}"


def _loading(class_name: str) -> str:
    first = (
        "import mmlm  # teaches transformers the class\n" if class_name.startswith("MMLM") else ""
    )
    return (
        "## How to load it\n\n"
        "With transformers alone" + (", after one import" if first else "") + ":\n\n"
        "```python\n" + first + "from transformers import pipeline\n\n"
        'pipe = pipeline("image-text-to-text", model="THIS_FOLDER_OR_REPO")\n'
        'messages = [{"role": "user", "content": [\n'
        '    {"type": "image", "path": "picture.png"},\n'
        '    {"type": "text", "text": "What is in the picture?"},\n'
        "]}]\n"
        "print(pipe(text=messages, max_new_tokens=32, return_full_text=False))\n"
        "```\n\n"
        "With MMLM:\n\n"
        "```python\n"
        "import mmlm\n\n"
        'assistant = mmlm.load("THIS_FOLDER_OR_REPO")\n'
        'print(assistant.answer("What is in the picture?", images=["picture.png"]))\n'
        "```"
    )


def _scores(scores: Sequence[dict[str, Any]]) -> str:
    if not scores:
        return "## Scores\n\nNone were handed over when this folder was saved."
    rows = [("set", "question", "condition", "n", "score", "95 % interval")]
    for row in scores:
        interval = f"{_percent(row.get('low'))} to {_percent(row.get('high'))}"
        rows.append(
            (
                str(row.get("set", "")),
                str(row.get("question", "")),
                str(row.get("condition", "")),
                str(row.get("n", "")),
                _percent(row.get("score")),
                interval,
            )
        )
    return (
        f"## Scores\n\n{_table(rows)}\n\nThe condition `blind` had no image, `shuffled` the image "
        f"of another question: what the model scores there, it does not see."
    )


def _dropped(dropped: dict[str, int] | None) -> str:
    if dropped is None:
        return ""
    if not any(dropped.values()):
        return "## What was dropped\n\nNo sample of the training data was dropped."
    rows = [("cause", "samples")] + [(cause, f"{count:,}") for cause, count in dropped.items()]
    return f"## What was dropped\n\n{_table(rows)}"


def _opens(config: MMLMConfig) -> str:
    rows = [("tool", "opens it", "")] + [tuple(row) for row in opens_in(config)]
    return f"## Opens in\n\n{_table(rows)}"


def _origin(class_name: str, has_recipe: bool) -> str:
    said = "Made with MMLM."
    if has_recipe:
        said += " `recipe.resolved.yaml` holds everything that it takes to train it again."
    if not class_name.startswith("MMLM"):
        said += (
            " The folder was loaded through transformers when it was saved, and gave the same"
            " tokens, logits and greedy answer as the model in memory."
        )
    return f"## Where it comes from\n\n{said}"


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "unknown"


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def write_eval_results(folder: Path, scores: Sequence[dict[str, Any]]) -> None:
    """Write `.eval_results/*.yaml` for the scores of benchmarks that are Hub datasets.

    Only rows that name a dataset (`dataset_id`, `task_id`) and saw the image are written: a
    leaderboard has no place for a control, nor for a set that nobody else can run. A row may
    bring its own `value` and `notes`.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    by_file: dict[str, list[EvalResultEntry]] = {}
    for row in scores:
        if not row.get("dataset_id") or row.get("condition", "image") != "image":
            continue
        entry = EvalResultEntry(
            dataset_id=row["dataset_id"],
            task_id=row.get("task_id", "default"),
            value=row.get("value", round(100 * row["score"], 2)),
            dataset_revision=row.get("dataset_revision"),
            date=row.get("date"),
            notes=row.get("notes")
            or f"mmlm, n={row.get('n')}, 95 % interval {_percent(row.get('low'))} to "
            f"{_percent(row.get('high'))}",
        )
        name = re.sub(r"[^a-z0-9]+", "_", str(row.get("set", "results")).lower()).strip("_")
        by_file.setdefault(name or "results", []).append(entry)
    for name, entries in by_file.items():
        path = folder / EVAL_RESULTS / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        path.write_text(text, encoding="utf-8")
