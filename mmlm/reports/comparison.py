"""Before and after: the part of a report that compares two checkpoints on the same items.

It takes what `comparison.json` holds: changes with intervals and verdicts, and items whose mark
changed. Nothing here computes a statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

_MARKS = {"better": "▲", "worse": "▼"}

Show = Callable[[Any, str], str]
"""From a picture and its description to HTML."""


def comparison(found: Mapping[str, Any] | None, pictures: Mapping[str, Any], show: Show) -> str:
    """Write the comparison; nothing where there is none.

    Args:
        found: What `comparison.json` holds, or None.
        pictures: Pictures by key, for those that are no files.
        show: Puts a picture on the page.
    """
    if not found:
        return ""
    before, after = escape(str(found["before"])), escape(str(found["after"]))
    lines = "".join(_line(change) for change in found["changes"])
    return (
        f'<h2 id="comparison">Before and after</h2><p><b>{before}</b> against <b>{after}</b>, on '
        "the items that both answered. Differences are in points, with 95 % intervals of a paired "
        "test whose unit is the picture; one below <i>visible from</i> cannot be seen with so "
        'many items.</p><div class="panel scroll"><table><thead><tr><th>set</th>'
        '<th class="text">question</th><th>n</th><th>before</th><th>after</th><th>difference</th>'
        "<th>p</th><th>visible from</th><th>items</th><th>verdict</th></tr></thead>"
        f"<tbody>{lines}</tbody></table></div>{_changed(found['changed'], pictures, show)}"
    )


def _line(change: Mapping[str, Any]) -> str:
    unit = 1 if str(change["metric"]).endswith("points") else 100
    before, after, difference, low, high, visible = (
        unit * float(change[key])
        for key in ("before", "after", "difference", "low", "high", "visible")
    )
    verdict = str(change["verdict"])
    return (
        f'<tr><td class="text">{escape(str(change["set"]))}</td>'
        f'<td class="text">{escape(str(change["question"]))}</td><td>{change["n"]:,}</td>'
        f"<td>{before:.1f}</td><td>{after:.1f}</td>"
        f"<td>{difference:+.1f} <small>({low:+.1f} to {high:+.1f})</small></td>"
        f"<td>{change['p_value']:.2g}</td><td>{visible:.1f}</td>"
        f"<td>{change['num_won']:,} won, {change['num_lost']:,} lost</td>"
        f"<td>{_MARKS.get(verdict, '')} {escape(verdict)}</td></tr>"
    )


def _changed(rows: Any, pictures: Mapping[str, Any], show: Show) -> str:
    parts: list[str] = []
    for won, title in ((False, "lost"), (True, "won")):
        cards = "".join(_card(row, pictures, show) for row in rows if bool(row["won"]) is won)
        if cards:
            parts.append(
                f"<details><summary>Items that were {title}</summary>"
                f'<div class="cards">{cards}</div></details>'
            )
    return "".join(parts)


def _card(row: Mapping[str, Any], pictures: Mapping[str, Any], show: Show) -> str:
    key = next((key for key in row["image_keys"] if key in pictures), None)
    picture = pictures[key] if key is not None else next(iter(row["images"]), None)
    truth = ", ".join(map(str, row["references"]))
    verdict = "right" if row["won"] else "wrong"
    return (
        f'<figure class="card {verdict}">{show(picture, truth)}<figcaption>'
        f'<div class="question clamp">{escape(str(row["prompt"]))}</div>'
        f'<div class="answer clamp">{escape(str(row["after"]) or "(no answer)")}</div>'
        f'<div class="truth">truth: {escape(truth)}</div>'
        f'<div class="other"><div class="clamp">before: '
        f"{escape(str(row['before']) or '(no answer)')}</div></div></figcaption></figure>"
    )
