"""Reports: whole, self-contained, and true to the files that they show."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from mmlm.errors import DataError
from mmlm.reports import markdown_table, plain_table, write_report
from mmlm.reports.contact_sheet import Shown, contact_sheet, thumbnail
from mmlm.reports.files import read_lines, rounds
from mmlm.reports.progress import ProgressLine
from mmlm.reports.svg import Curve, curves


def score(condition, value, **more):
    return {
        "set": "birds & bees", "question": "choice", "condition": condition, "n": 40,
        "score": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1),
        "metric": "accuracy", "scorer": "choice@1", "chance": 0.25, "parse_fail_rate": 0.1, **more,
    }  # fmt: skip


def prediction(number, picture, right):
    return {
        "set": "birds & bees", "question": "choice", "condition": "image", "id": str(number),
        "images": [str(picture)], "image_keys": [f"k{number}"], "prompt": "What <b>is</b> it?",
        "choices": [], "answer": "a bee" if right else "<script>alert(1)</script>",
        "references": ["bee"], "score": float(right),
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    Image.new("RGBA", (30, 20), (255, 0, 0, 100)).save(tmp_path / "a.png")
    Image.new("RGB", (300, 200), "blue").save(tmp_path / "b.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    pictures = [tmp_path / name for name in ("a.png", "b.jpg", "broken.png", "gone.png")]
    rows = [prediction(n, pictures[n % 4], right=n % 3 > 0) for n in range(40)]
    rows += [{**row, "condition": "blind", "answer": "no idea", "images": []} for row in rows]
    lines(tmp_path / "predictions.jsonl", rows)
    scores = [score("image", 0.9), score("blind", 0.25), score("nearest_neighbour", 0.95)]
    (tmp_path / "results.json").write_text(json.dumps(scores))
    log = [
        {"stage": stage, "step": step, "loss": 3 / (step + 1)}
        for stage in ("align", "instruct")
        for step in range(9)
    ]
    lines(tmp_path / "log.jsonl", [*log, {"stage": "instruct", "step": 9, "loss": float("nan")}])
    answers = [{"image": str(pictures[0]), "question": "What?", "answer": "bee", "truth": "bee"}]
    growth = [{"stage": "align", "step": step, "answers": answers} for step in range(3)]
    lines(tmp_path / "growth.jsonl", growth)
    return tmp_path


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Balanced(HTMLParser):
    """Fails where a tag is not closed in order."""

    VOID = frozenset({"meta", "img", "br", "line", "path", "rect", "circle", "polygon"})

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


class TestThePage:
    @pytest.fixture
    def html(self, run, tmp_path):
        return write_report(tmp_path / "out", run=run, scores=run).page.read_text()

    def test_needs_nothing_from_outside_and_runs_no_script(self, html):
        addresses = re.findall(r'(?:src|href)="([^"]+)"', html)
        assert addresses
        assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
        assert "<script" not in html
        assert "url(" not in html

    def test_is_well_formed(self, html):
        parser = Balanced()
        parser.feed(html)
        assert parser.open == []

    def test_shows_scores_answers_growth_and_curves(self, html):
        for text in ("90.0", "birds &amp; bees", "Does it look?", "How its answers grew", "Loss"):
            assert text in html
        assert "steps 0–2" in html

    def test_tells_right_from_wrong_by_words(self, html):
        assert 'class="sign right"' in html
        assert "</svg>wrong</span>" in html

    def test_fits_phones_and_dark_rooms(self, html):
        assert "width=device-width" in html
        assert "prefers-color-scheme: dark" in html


def test_a_report_of_nothing_is_a_page_all_the_same(tmp_path):
    written = write_report(tmp_path / "out", run=tmp_path, scores=tmp_path)
    assert written.page.is_file()
    assert written.sheet is written.loss is None


def test_a_report_is_the_same_twice(run, tmp_path):
    first = write_report(tmp_path / "a", run=run, scores=run, title="x")
    second = write_report(tmp_path / "b", run=run, scores=run, title="x")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


class TestTheContactSheet:
    def test_holds_wrong_ones_too(self, run, tmp_path):
        sheet = write_report(tmp_path / "out", scores=run).sheet
        with Image.open(sheet) as image:
            colours = {pixel for _, pixel in image.getcolors(1 << 20)}
        assert {(0, 112, 96), (178, 58, 30)} <= colours

    def test_takes_long_and_strange_texts(self):
        card = Shown(None, "why " * 400, "\u4e16\u754c" * 300 + "\n\n", "x" * 500, is_right=False)
        assert contact_sheet([card] * 3, title="t" * 400).size[0] > 100

    def test_a_thumbnail_of_anything_fits(self, run):
        assert thumbnail(run / "b.jpg", 64).size == (64, 43)
        assert thumbnail(run / "broken.png", 64) is None
        assert thumbnail((run / "a.png").read_bytes(), 64).getpixel((5, 5)) == (255, 155, 155)


class TestTables:
    def test_conditions_stand_side_by_side(self):
        text = plain_table([score("image", 0.9), score("blind", 0.25)], width=160)
        assert "90.0 (80.0–100.0)" in text
        assert text.index("with image") < text.index("blind")

    def test_a_pipe_does_not_break_markdown(self):
        rows = [score("image", 0.9) | {"set": "a|b"}]
        assert "a\\|b" in markdown_table(rows)


class TestFiles:
    def test_a_line_that_a_kill_cut_short_is_left_out(self, tmp_path):
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
        assert read_lines(tmp_path / "log.jsonl") == [{"step": 1}]

    def test_a_damaged_line_in_the_middle_is_an_error(self, tmp_path):
        (tmp_path / "log.jsonl").write_text('{"st\n{"step": 1}\n')
        with pytest.raises(DataError, match="line 1 is not JSON"):
            read_lines(tmp_path / "log.jsonl")

    def test_growth_is_read_in_both_forms(self):
        row = {"image": "a.png", "question": "What?", "answer": "bee"}
        one = rounds([{"stage": "align", "step": 5, **row}])
        other = rounds([{"stage": "align", "step": 5, "answers": [row]}])
        assert one == other


def test_a_curve_survives_nan_and_a_single_step():
    assert "nan" not in curves([Curve("a", [(0, float("nan")), (1, 2.0)])], title="x")
    assert curves([Curve("a", [(0, 1.0)])], title="x").endswith("</svg>")
    assert curves([], title="x") == ""


def test_progress_in_a_file_says_what_is_left(tmp_path):
    with (tmp_path / "log").open("w") as file, ProgressLine("answering", 4, file=file) as progress:
        for _ in range(4):
            progress.advance()
    assert (tmp_path / "log").read_text() == "answering: 4 of 4\n"
