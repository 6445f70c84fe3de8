"""One HTML page that shows what a model can do: self-contained, light and dark, wide and narrow.

The page needs no network and runs no script: pictures are inside it as small JPEGs, plots as
SVG. What is shown first is what the page is about - does the model look? - then pictures with
answers, how they grew, and the curves.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from mmlm.reports.carried import carried
from mmlm.reports.choose import Example, examples, truth_of
from mmlm.reports.comparison import comparison
from mmlm.reports.contact_sheet import thumbnail
from mmlm.reports.files import Answered, Round, RunFiles, stage_curves
from mmlm.reports.intervals import Line, Mark, intervals
from mmlm.reports.svg import curves, legend_mark
from mmlm.reports.tables import (
    CONDITION_NAMES,
    by_question,
    conditions_of,
    kind_text,
    percent,
    score_text,
)

_THUMBNAIL_PX = 224
_GROWTH_PICTURES = 5

_TICK = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M2 9l4 4 8-10"/></svg>'
_CROSS = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M3 3l10 10M13 3L3 13"/></svg>'


def page(
    files_of_run: RunFiles,
    *,
    title: str,
    lead: str = "",
    facts: Mapping[str, str] | None = None,
    pictures: Mapping[str, Any] | None = None,
    drawn: int = 12,
    wrong: int = 6,
) -> str:
    """Write the page.

    Args:
        files_of_run: What is known about the run.
        title: The headline.
        lead: One or two sentences under it.
        facts: Short facts: parts of the model, time, machine.
        pictures: Pictures by key, for those that are no files.
        drawn: Examples drawn fairly for each kind of question.
        wrong: Further wrong ones.
    """
    body = [
        _head(title, lead, facts or {}),
        _scores(files_of_run.results, files_of_run.details),
        comparison(files_of_run.details.get("comparison"), pictures or {}, _image),
        _examples(files_of_run.predictions, pictures or {}, drawn=drawn, wrong=wrong),
        _growth(files_of_run.rounds),
        _curves(files_of_run),
        _reading(files_of_run.results),
    ]
    return document("".join(body), title=title)


def document(body: str, *, title: str) -> str:
    """Return a whole page in the house's style around what stands in it."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


@cache
def _style() -> str:
    return (files("mmlm.reports") / "page.css").read_text(encoding="utf-8")


def _head(title: str, lead: str, facts: Mapping[str, str]) -> str:
    listed = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items()
    )
    facts_list = f'<dl class="facts">{listed}</dl>' if listed else ""
    about = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<header><h1>{escape(title)}</h1>{about}{facts_list}</header>\n"


def _scores(rows: Sequence[dict[str, Any]], details: Mapping[str, Any]) -> str:
    """Write the scores: tiles, the plot of intervals, the table, and groups."""
    if not rows:
        return ""
    grouped = by_question(rows)
    tiles = "".join(_tile(name, kind, found) for (name, kind), found in grouped.items())
    return (
        f'<div class="tiles">{tiles}</div>'
        '<h2 id="looks">Does it look?</h2>'
        "<p>The same questions with the image, without it, and with the image of something else. "
        "Only what the first gains over the others comes from looking.</p>"
        f"{_interval_panel(rows)}{_table(rows)}{_carried(details)}{_power(details)}"
        f"{_groups(details)}"
    )


def _tile(name: str, kind: str, found: Mapping[str, dict[str, Any]]) -> str:
    first = found.get("image") or next(iter(found.values()))
    others = "".join(
        f"<li>{legend_mark(condition)}{escape(CONDITION_NAMES.get(condition, condition))}"
        f"<b>{_short(row)}</b></li>"
        for condition in conditions_of(list(found.values()))
        if (row := found.get(condition)) is not None and condition != "image"
    )
    unit = "" if _is_points(first) else " <small>%</small>"
    return (
        f'<section class="tile"><div class="what">{escape(name)} · {escape(kind_text(kind, first))}'
        "</div>"
        f'<div class="big">{_short(first).removesuffix(" %")}{unit}</div>'
        f'<div class="range"><span>{score_text(first).split("(")[-1].rstrip(")")}</span> '
        f"<span>n = {first['n']:,}</span></div>"
        f"{f'<ul>{others}</ul>' if others else ''}</section>"
    )


def _is_points(row: Mapping[str, Any]) -> bool:
    return str(row.get("metric", "")).endswith("points")


def _short(row: Mapping[str, Any]) -> str:
    return f"{row['score']:.0f}" if _is_points(row) else f"{percent(row['score'])} %"


def _interval_panel(rows: Sequence[dict[str, Any]]) -> str:
    shares = [row for row in rows if not _is_points(row)]
    if not shares:
        return ""
    lines = [
        Line(
            f"{name} · {kind}",
            [
                Mark(condition, found[condition]["score"], found[condition]["low"],
                     found[condition]["high"])
                for condition in conditions_of(shares)
                if condition in found
            ],
            next((row["chance"] for row in found.values() if row.get("chance")), None),
        )
        for (name, kind), found in by_question(shares).items()
    ]  # fmt: skip
    legend = "".join(
        f"<span>{legend_mark(name)}{escape(CONDITION_NAMES.get(name, name))}</span>"
        for name in conditions_of(shares)
    )
    if any(line.chance is not None for line in lines):
        legend += '<span><i class="chance"></i>chance</span>'
    return f'<div class="panel"><div class="legend">{legend}</div>{intervals(lines)}</div>'


def _table(rows: Sequence[dict[str, Any]]) -> str:
    conditions = conditions_of(rows)
    heads = "".join(f"<th>{escape(CONDITION_NAMES.get(name, name))}</th>" for name in conditions)
    lines: list[str] = []
    for (name, kind), found in by_question(rows).items():
        first = found.get("image") or next(iter(found.values()))
        cells = "".join(f"<td>{_cell(found.get(condition))}</td>" for condition in conditions)
        lines.append(
            f'<tr><td class="text">{escape(name)}</td>'
            f'<td class="text">{escape(kind_text(kind, first))}</td>'
            f"<td>{first['n']:,}</td>{cells}<td>{percent(first.get('chance'))}</td>"
            f"<td>{percent(first.get('parse_fail_rate'))}</td></tr>"
        )
    return (
        '<div class="panel scroll"><table><thead><tr><th>set</th><th class="text">question</th>'
        f"<th>n</th>{heads}<th>chance</th><th>unreadable</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(row: dict[str, Any] | None) -> str:
    score, _, interval = score_text(row).partition(" ")
    return f"{score} <small>{interval}</small>" if interval else score


def _carried(details: Mapping[str, Any]) -> str:
    """Write how much of each score the picture carries."""
    told = [f"{escape(each)}." for each in carried(details)]
    if not told:
        return ""
    return f'<p class="power">What the picture carries. {" ".join(told)}</p>'


def _power(details: Mapping[str, Any]) -> str:
    """Write below which difference between two models each number of items shows nothing."""
    told: list[str] = []
    for question in details.get("questions", []):
        visible = question.get("smallest_visible_difference")
        if visible is None:
            continue
        points = visible if str(question.get("metric", "")).endswith("points") else 100 * visible
        name = f"{question['set']} · {question['question']}"
        told.append(f"{escape(name)}: <b>{points:.1f}</b>")
    if not told:
        return ""
    return (
        '<p class="power">A difference between two models below so many points cannot be seen '
        f"with these items: {', '.join(told)}.</p>"
    )


def _groups(details: Mapping[str, Any]) -> str:
    blocks: list[str] = []
    for question in details.get("questions", []):
        down = bool(question.get("lower_is_better"))
        groups = sorted(
            question.get("groups") or [], key=lambda group: group["score"], reverse=down
        )
        if len(groups) < 2:
            continue
        lines = "".join(
            f'<tr><td class="text">{escape(str(group["by"]))}: {escape(str(group["group"]))}</td>'
            f"<td>{group['n']:,}</td><td>{_cell(group)}</td></tr>"
            for group in groups
        )
        blocks.append(
            f"<details><summary>{escape(question['set'])} · {escape(question['question'])} by "
            f'group, worst first</summary><div class="panel scroll"><table><thead><tr><th>group'
            f"</th><th>n</th><th>with image</th></tr></thead><tbody>{lines}</tbody></table></div>"
            "</details>"
        )
    return "".join(blocks)


def _examples(
    predictions: Sequence[dict[str, Any]],
    pictures: Mapping[str, Any],
    *,
    drawn: int,
    wrong: int,
) -> str:
    chosen = examples(predictions, drawn=drawn, wrong=wrong, pictures=pictures)
    if not chosen:
        return ""
    parts = [
        '<h2 id="answers">Pictures that it had never seen</h2>'
        "<p>Drawn by lot, right and wrong as they came; under each kind, some more of the wrong "
        "ones. The small print is what the model said without the picture, and with another one."
        "</p>"
    ]
    for (name, kind), (fair, further) in chosen.items():
        right = sum(example.is_right for example in fair)
        parts.append(
            f"<h3>{escape(name)} · {escape(kind)}: {right} of {len(fair)} right</h3>"
            f'<div class="cards">{"".join(map(_card, fair))}</div>'
        )
        if further:
            parts.append(
                f"<details><summary>{len(further)} more that it got wrong</summary>"
                f'<div class="cards">{"".join(map(_card, further))}</div></details>'
            )
    return "".join(parts)


def _card(example: Example) -> str:
    row, verdict = example.row, "right" if example.is_right else "wrong"
    said = {
        condition: f"{CONDITION_NAMES.get(condition, condition)}: {text or '(nothing)'}"
        for condition, text in example.others.items()
        if condition in ("blind", "shuffled")
    }
    small = "".join(f'<div class="clamp">{escape(text)}</div>' for text in said.values())
    truth = truth_of(row)
    return (
        f'<figure class="card {verdict}">{_image(example.picture, truth)}<figcaption>'
        f"{_sign(is_right=example.is_right)}"
        f'<div class="question clamp">{escape(str(row["prompt"]))}</div>'
        f'<div class="answer clamp">{escape(str(row["answer"]) or "(no answer)")}</div>'
        f'<div class="truth">truth: {escape(truth)}</div>'
        f"{f'<div class=other>{small}</div>' if small else ''}</figcaption></figure>"
    )


def _sign(*, is_right: bool) -> str:
    word = "right" if is_right else "wrong"
    return f'<span class="sign {word}">{_TICK if is_right else _CROSS}{word}</span>'


def _image(picture: Any, alternative: str) -> str:
    address = data_address(picture)
    if address is None:
        return '<div class="none">no picture</div>'
    return f'<img src="{address}" alt="{escape(alternative)}" loading="lazy">'


def data_address(picture: Any, side_px: int = _THUMBNAIL_PX) -> str | None:
    """Return a picture as a small JPEG inside an address, or None if it cannot be opened."""
    small = thumbnail(picture, side_px)
    if small is None:
        return None
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _growth(rounds: Sequence[Round]) -> str:
    """Write the timelines of the pictures that were asked again and again."""
    timelines: dict[tuple[str | None, str], list[tuple[Round, Answered]]] = {}
    for moment in rounds:
        for answered in moment.answers:
            timelines.setdefault((answered.image, answered.question), []).append((moment, answered))
    shown = list(timelines.items())[:_GROWTH_PICTURES]
    if not shown:
        return ""
    cards = "".join(_timeline(image, question, moments) for (image, question), moments in shown)
    return (
        '<h2 id="growth">How its answers grew</h2>'
        "<p>The same pictures, asked again and again while it learned. Answers that stayed the "
        f'same share a line.</p><div class="growth">{cards}</div>'
    )


def _timeline(image: str | None, question: str, moments: Sequence[tuple[Round, Answered]]) -> str:
    spans: list[tuple[Round, Round, str]] = []
    for moment, answered in moments:
        same_stage = bool(spans) and spans[-1][1].stage == moment.stage
        if same_stage and spans[-1][2] == answered.answer:
            spans[-1] = (spans[-1][0], moment, answered.answer)
        else:
            spans.append((moment, moment, answered.answer))
    items = "".join(
        f"<li><time>{escape(_when(first, last))}</time>"
        f'<span class="clamp">{escape(text or "(nothing)")}</span></li>'
        for first, last, text in spans
    )
    truth = next((each.truth for _, each in moments if each.truth), "")
    told = f'<div class="truth">truth: {escape(truth)}</div>' if truth else ""
    return (
        f'<figure class="card">{_image(image, truth or question)}<figcaption>'
        f'<div class="question clamp">{escape(question)}</div>{told}<ol>{items}</ol>'
        "</figcaption></figure>"
    )


def _when(first: Round, last: Round) -> str:
    steps = f"step {first.step}" if first.step == last.step else f"steps {first.step}–{last.step}"
    return f"{first.stage} · {steps}" if first.stage else steps


def _curves(files_of_run: RunFiles) -> str:
    loss = stage_curves(files_of_run.log, "loss")
    held_out = stage_curves(files_of_run.log, "validation_loss")
    speed = stage_curves(files_of_run.log, "useful_tokens_per_second")
    plots = "".join(
        f'<h3>{name}</h3><div class="panel">{plot}</div>'
        for name, plot in (
            ("Loss", curves(loss, title="Loss")),
            ("Loss on rows never learnt", curves(held_out, title="Loss on rows never learnt")),
            ("Useful tokens per second", curves(speed, title="Useful tokens per second")),
            ("MFU", curves(stage_curves(files_of_run.log, "mfu"), title="MFU")),
            ("Memory in GiB", curves(stage_curves(files_of_run.log, "memory_gib"), title="GiB")),
        )
        if plot
    )
    sources = _by_source(files_of_run.log)
    return f'<h2 id="training">Training</h2>{plots}{sources}' if plots else ""


def _by_source(log: Sequence[Mapping[str, Any]]) -> str:
    """Write the loss of each source: the mean of its first steps, and of its last."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in log:
        for source, loss in (row.get("loss_by_source") or {}).items():
            found.setdefault((str(row.get("stage", "")), str(source)), []).append(float(loss))
    if not found:
        return ""
    rows = "".join(
        f"<tr><td>{escape(stage)}</td><td>{escape(source)}</td><td>{len(losses):,}</td>"
        f"<td>{_mean(losses[:5]):.3f}</td><td>{_mean(losses[-5:]):.3f}</td></tr>"
        for (stage, source), losses in found.items()
    )
    return (
        '<h3>Loss by source</h3><div class="panel"><table><thead><tr><th>stage</th><th>source</th>'
        "<th>steps</th><th>first five</th><th>last five</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _reading(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    rules = ", ".join(sorted({str(row["scorer"]) for row in rows if row.get("scorer")}))
    neighbour = ""
    if any(row["condition"] == "nearest_neighbour" for row in rows):
        neighbour = (
            " <b>Nearest neighbour</b> uses no language model: among the options, it takes the one "
            "whose training pictures look most alike to the frozen encoder."
        )
    return (
        "<footer><p><b>How to read this.</b> Scores are in percent with 95 % intervals; questions "
        "about one picture count as one draw. <b>Blind</b> is the same question without the image, "
        "<b>shuffled</b> with the image of another item that never shows the same thing."
        f"{neighbour} An answer in which the scorer can read nothing is wrong and counts as "
        "<b>unreadable</b>; nothing is ever guessed for the model. Scorers: "
        f"{escape(rules) or 'unknown'}.</p></footer>"
    )
