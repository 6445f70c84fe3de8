"""From what was found to a folder to train from: splits, a source, a recipe and a benchmark.

    NAME/  train.jsonl  validation.jsonl  test.jsonl   the rows; paths of pictures begin here
           source.yaml                                 what a stage names: data: source.yaml
           recipe.yaml                                 mmlm train recipe.yaml
           benchmark.yaml                              mmlm eval RUN benchmark.yaml
           found.json  left_out.jsonl                  what there is; what was left out, and why

The splits share no group and no picture that looks alike. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmlm.config import read_yaml
from mmlm.data.alike import MOST_DIFFERENT, alike
from mmlm.data.own import Found, OwnRow
from mmlm.data.schema import CAUSES
from mmlm.data.splits import clusters, deal
from mmlm.errors import ConfigError, DataError
from mmlm.recipes import find_recipe
from mmlm.storage import atomic_folder

_FOUND = "found.json"
_FEW_ANSWERS, _SHORT_WORDS = 50, 5
_IMAGE_AND_PROMPT_TOKENS = 250
_STEPS_WANTED = 40


def model_words(recipe: str) -> dict[str, Any]:
    """Return the words under `model:` of a recipe, by its name or path.

    Raises:
        ConfigError: if there is no such recipe, or it has no model of parts.
    """
    path = find_recipe("train", recipe)
    values = read_yaml(path)
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict):
        raise ConfigError(f"{path} has no `model:` to take over.")
    return model


def write_own(
    found: Found,
    out: Path,
    *,
    model: dict[str, Any],
    most: float = MOST_DIFFERENT,
    seed: int = 0,
    fresh: bool = False,
) -> dict[str, Any]:
    """Split the rows and write the folder.

    Args:
        found: What there is.
        out: The folder.
        model: What stands under `model:` of the recipe.
        most: How different pictures that look alike may be; 0 keeps equal looks together.
        seed: Changes which rows go where.
        fresh: Replace a folder that was written before.

    Returns:
        The facts, as they stand in `found.json`.

    Raises:
        DataError: if the folder is there already, or the rows cannot be split.
    """
    if out.exists() and not (fresh and (out / _FOUND).is_file()):
        again = " --fresh writes it anew." if (out / _FOUND).is_file() else ""
        raise DataError(f"{out} is there already. Name another folder with --out.{again}")
    names = list(found.pictures)
    pairs = alike([found.pictures[name].look for name in names], most=most)
    look = _look_numbers(len(names), pairs)
    numbers = {name: look[index] for index, name in enumerate(names)}
    keys = [_keys(row, numbers) for row in found.rows]
    groups = clusters(keys)
    splits = {
        name: [found.rows[index] for index in rows]
        for name, rows in deal(groups, seed=seed).items()
    }
    facts = _facts(found, splits, len(groups), [(names[a], names[b]) for a, b in pairs])
    with atomic_folder(out) as folder:
        for name, rows in splits.items():
            # A benchmark asks each question of a conversation by itself.
            written = [one for row in rows for one in (_alone(row) if name == "test" else [row])]
            lines = [json.dumps(_plain(row, out), ensure_ascii=False) for row in written]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        drops = [json.dumps(drop._asdict(), ensure_ascii=False) for drop in found.drops]
        (folder / "left_out.jsonl").write_text("".join(f"{d}\n" for d in drops), encoding="utf-8")
        _write(folder / "source.yaml", _source_text(found))
        _write(folder / "benchmark.yaml", _benchmark_text(found, splits["test"]))
        _write(folder / "recipe.yaml", _recipe_text(found, splits["train"], model))
        _write(folder / _FOUND, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return facts


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _look_numbers(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Give pictures that look alike, directly or through others, one number."""
    keys: list[list[int]] = [[] for _ in range(count)]
    for number, (one, other) in enumerate(pairs):
        keys[one].append(number)
        keys[other].append(number)
    numbers = [0] * count
    for number, members in enumerate(clusters(keys)):
        for member in members:
            numbers[member] = number
    return numbers


def _keys(row: OwnRow, looks: dict[str, int]) -> list[tuple[str, str | int]]:
    keys: list[tuple[str, str | int]] = [("look", looks[image]) for image in row.images]
    if row.group is not None:
        keys.append(("group", row.group))
    return keys


def _plain(row: OwnRow, out: Path) -> dict[str, Any]:
    """Return a row as it is written; its paths begin at the folder."""
    images = [Path(os.path.relpath(image, out.absolute())).as_posix() for image in row.images]
    values: dict[str, Any] = {"id": row.id, "image": images[0] if len(images) == 1 else images}
    if row.more:
        values["conversations"] = [
            {"from": speaker, "value": text}
            for pair in row.turns
            for speaker, text in zip(("human", "gpt"), pair, strict=True)
        ]
    else:
        values |= {"question": row.question, "answer": row.answer}
    return values if row.group is None else {**values, "group": row.group}


def _alone(row: OwnRow) -> list[OwnRow]:
    """Make a row of every question."""
    if not row.more:
        return [row]
    return [
        row._replace(id=f"{row.id}-{number}", question=question, answer=answer, more=())
        for number, (question, answer) in enumerate(row.turns)
    ]


def _facts(
    found: Found, splits: dict[str, list[OwnRow]], num_groups: int, pairs: list[tuple[str, str]]
) -> dict[str, Any]:
    pictures = list(found.pictures.values())
    causes = Counter(drop.cause for drop in found.drops)
    return {
        "source": str(found.source),
        "rows": found.num_rows,
        "usable": len(found.rows),
        "left_out": dict(causes.most_common()),
        "pictures": len(pictures),
        "formats": dict(Counter(picture.format for picture in pictures).most_common()),
        "width_px": _spread([picture.width for picture in pictures]),
        "height_px": _spread([picture.height for picture in pictures]),
        "turns": _spread([len(row.turns) for row in found.rows]),
        "question_words": _spread([len(q.split()) for row in found.rows for q, _ in row.turns]),
        "answer_words": _spread([len(a.split()) for row in found.rows for _, a in row.turns]),
        "different_answers": len({a for row in found.rows for _, a in row.turns}),
        "groups": len({row.group for row in found.rows if row.group is not None}),
        "rows_without_group": sum(row.group is None for row in found.rows),
        "near_duplicates": len(pairs),
        "near_duplicate_examples": pairs[:20],
        "kept_together": num_groups,
        "splits": {name: len(rows) for name, rows in splits.items()},
    }


def _spread(values: Sequence[int]) -> list[int]:
    """Return the least, the middle and the greatest."""
    return [min(values), int(statistics.median(values)), max(values)]


def lines_of(facts: dict[str, Any]) -> list[str]:
    """Say what was found, for people."""
    low, middle, high = facts["answer_words"]
    formats = ", ".join(f"{name} {count:,}" for name, count in facts["formats"].items())
    sizes = [f"{w} × {h}" for w, h in zip(facts["width_px"], facts["height_px"], strict=True)]
    lines = [
        f"rows        {facts['rows']:,}, of which {facts['usable']:,} can be used",
        *(f"  left out  {count:,}: {cause} ({CAUSES[cause]})"
          for cause, count in facts["left_out"].items()),
        f"pictures    {facts['pictures']:,}: {formats}",
        f"sizes       widths and heights from {sizes[0]} to {sizes[2]} px, half of them below "
        f"{sizes[1]}",
        f"answers     {low} to {high} words, half of them up to {middle}; "
        f"{facts['different_answers']:,} different ones",
        f"alike       {facts['near_duplicates']:,} pairs of pictures look alike",
    ]  # fmt: skip
    if facts["turns"][2] > 1:
        low, middle, high = facts["turns"]
        lines.append(
            f"questions   {low} to {high} a row, half of the rows with up to {middle}; the test "
            f"asks each by itself"
        )
    if facts["groups"]:
        alone = facts["rows_without_group"]
        rest = f"; {alone:,} rows have none, and stand alone" if alone else ""
        lines.append(f"groups      {facts['groups']:,}{rest}")
    shares = ", ".join(f"{name} {count:,}" for name, count in facts["splits"].items())
    lines.append(f"splits      {shares}; {facts['kept_together']:,} bundles, none of them parted")
    return lines


def _source_text(found: Found) -> str:
    return (
        f"# What is learnt of {found.source.name}; a stage names it as  data: source.yaml\n"
        f"{{use: jsonl, path: train.jsonl, name: {_flow(found.source.stem)}}}\n"
    )


def _benchmark_text(found: Found, test: list[OwnRow]) -> str:
    scorer, why = _scorer(found.rows)
    longest = sorted(len(answer.split()) for row in found.rows for _, answer in row.turns)
    words = longest[int(0.95 * (len(longest) - 1))]
    return (
        f"# {found.source.name}: {len(test)} rows that share no group and no look with others.\n"
        f"dataset:  {{path: test.jsonl}}\n"
        f'question: "{{question}}"\n'
        f"scorer:   {scorer:24} # {why}\n"
        f"generate: {{max_new_tokens: {min(512, max(8, 3 * words + 4))}}}\n"
    )


def _scorer(rows: Sequence[OwnRow]) -> tuple[str, str]:
    """Choose how answers are marked, from what they look like."""
    answers = {answer.strip().lower().rstrip(".") for row in rows for _, answer in row.turns}
    if answers <= {"yes", "no"}:
        return "yes_no", "every answer is yes or no"
    if len(answers) <= _FEW_ANSWERS and max(len(a.split()) for a in answers) <= _SHORT_WORDS:
        return "exact", f"{len(answers)} different answers, all short"
    return "anls", "free text: how near the letters are; read the answers too"


def _recipe_text(found: Found, train: list[OwnRow], model: dict[str, Any]) -> str:
    words = sum(len(text.split()) for row in train for pair in row.turns for text in pair)
    tokens = len(train) * _IMAGE_AND_PROMPT_TOKENS + 2 * words
    step_tokens = 16_384 if tokens / 16_384 >= _STEPS_WANTED else 4_096
    every = max(1, round(tokens / step_tokens / 4))
    parts = "\n".join(f"  {key + ':':11}{_flow(value)}" for key, value in model.items())
    return (
        f"# {found.source.name}: {len(train)} rows to learn from, written by `mmlm data new`.\n"
        f"#\n"
        f"# Look     mmlm check recipe.yaml     what the model will see, and what it will cost\n"
        f"# Run      mmlm train recipe.yaml\n"
        f"# Then     mmlm eval runs/recipe benchmark.yaml\n"
        f"\n"
        f"model:\n{parts}\n"
        f"\n"
        f"stages:\n"
        f"  - name: align\n"
        f"    learn: [connector.*]                      # first the new part alone, fast\n"
        f"    data: source.yaml\n"
        f"    until: {{epochs: 2}}\n"
        f"    peak_lr: 1.0e-3\n"
        f"    step_tokens: {step_tokens}\n"
        f"\n"
        f"  - name: instruct\n"
        f"    learn: {{connector.*: 2.0e-4, language.*: 2.0e-5}}   # then all of it, slowly\n"
        f"    data: source.yaml\n"
        f"    until: {{epochs: 3}}\n"
        f"    step_tokens: {step_tokens}\n"
        f"\n"
        f"validation:                                   # rows that are never learnt\n"
        f"  data: validation.jsonl\n"
        f"  every_steps: {every:<32} # about four times an epoch\n"
        f"  answers: 5                                  # so many are asked, for the report\n"
        f"  keep: best                                  # a stage ends with its best weights\n"
        f"  patience: null                              # 3: stop after three rounds without gain\n"
        f"\n"
        f"run: {{seed: 0}}\n"
    )


def _flow(value: Any) -> str:
    """Write a value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000,
                          sort_keys=False)  # fmt: skip
    return text.strip().removesuffix("...").strip()
