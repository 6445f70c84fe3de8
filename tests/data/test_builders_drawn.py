"""Sets that MMLM draws: the answer is what the picture shows, and the seed decides it all."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmlm.data.builders import KINDS, build, charts, documents, fractals, make_puzzle, scenes
from mmlm.data.builders.drawing import COLOURS
from mmlm.data.builders.tables import Country, read_countries, read_gapminder, split_names
from mmlm.errors import ConfigError
from tests.data.made import open_source, write_tar


def blobs(image, colour):
    """The number of connected stretches of one colour."""
    near = np.abs(np.asarray(image).astype(int) - COLOURS[colour]).max(axis=2) < 12
    seen, found = np.zeros_like(near), 0
    for start in zip(*np.nonzero(near), strict=True):
        if seen[start]:
            continue
        found += 1
        waiting = [start]
        while waiting:
            y, x = waiting.pop()
            inside = 0 <= y < near.shape[0] and 0 <= x < near.shape[1]
            if not inside or seen[y, x] or not near[y, x]:
                continue
            seen[y, x] = True
            waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_number_gives_the_same_puzzle_and_another_gives_another(kind):
    one, again, other = (make_puzzle(kind, n, side_px=64) for n in (5, 5, 12))
    assert (one.question, one.answer, one.facts) == (again.question, again.answer, again.facts)
    assert one.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert make_puzzle(kind, 5, seed=1, side_px=64).image.tobytes() != one.image.tobytes()


@pytest.mark.parametrize("kind", ["count", "position", "colour"])
def test_every_answer_is_the_right_one_equally_often(kind):
    puzzles = [make_puzzle(kind, n, side_px=32) for n in range(7 * 9 * 8)]
    counts = Counter(puzzle.answer for puzzle in puzzles)
    assert set(counts) == set(puzzles[0].choices)
    assert len(set(counts.values())) == 1


def test_what_is_counted_is_what_is_drawn():
    for number in range(14):
        puzzle = make_puzzle("count", number)
        things = Counter(puzzle.facts["things"])
        colour, shape = puzzle.question.split()[2:4]
        single = {scenes.plural(shape): shape for shape in scenes.SHAPES}[shape]
        assert int(puzzle.answer) == things[f"{colour} {single}"]
        of_colour = sum(n for name, n in things.items() if name.startswith(colour))
        assert blobs(puzzle.image, colour) == of_colour


def test_a_yes_about_places_is_true_of_the_picture():
    for number in range(24):
        puzzle = make_puzzle("position", number)
        words = puzzle.question.removeprefix("Is the ").split(" ")
        colours = [word for word in words if word in COLOURS]
        things = puzzle.facts["things"]
        if any(sum(t.startswith(c) for t in things) > 1 for c in colours):
            continue
        (y1, x1), (y2, x2) = (middle(puzzle.image, colour) for colour in colours)
        said = {"left": x1 < x2, "right": x1 > x2, "above": y1 < y2, "below": y1 > y2}
        side = next(word for word in words if word in said)
        assert said[side] == (puzzle.answer == "yes")


def middle(image, colour):
    near = np.abs(np.asarray(image).astype(int) - COLOURS[colour]).max(axis=2) < 12
    return np.argwhere(near).mean(axis=0)


def test_an_unknown_kind_of_puzzle_is_refused():
    with pytest.raises(ConfigError, match=r"'guess'. Known: count"):
        make_puzzle("guess", 0)


def test_scenes_are_built_into_rows_that_a_source_reads(tmp_path, monkeypatch):
    small = scenes.Settings(side_px=48, each=3, each_test=2)
    monkeypatch.setattr(scenes, "Settings", lambda: small)
    built = build("scenes", out=tmp_path / "scenes")
    assert built.report["rows"] == {"train": 12, "test": 8}
    source = open_source(built.folder, use="jsonl", path="train.jsonl")
    samples = [source.sample(row) for row in range(len(source))]
    assert {sample.meta["kind"] for sample in samples} == set(KINDS)
    with Image.open(samples[0].messages[0].images[0]) as image:
        assert image.size == (48, 48)


COUNTRIES = [
    Country(f"Land {n}", f"Town {n}", "North", 1000 + 317 * n, ("Latin",), f"coin {n}", ())
    for n in range(20)
]
FIGURES = {
    f"Land {n}": {
        year: {"life_expect": 40.0 + n, "fertility": 1.0 + n / 4, "pop": 3.0 * n + (year - 1980)}
        for year in range(1980, 1990)
    }
    for n in range(20)
}


@pytest.mark.parametrize("form", charts.FORMS)
def test_every_answer_about_a_chart_follows_from_its_values(form):
    for number in range(12):
        draw = random.Random(number)
        chart = charts.make_chart(FIGURES, list(FIGURES), form, draw)
        asked = {one.kind: one for one in charts.ask(chart, draw)}
        values = dict(zip(chart.labels, chart.values, strict=True))
        assert asked["number"].answer == str(len(values))
        assert asked["title"].answer == chart.title
        if "most" in asked:
            assert values[asked["most"].answer] == max(values.values())
        if "least" in asked:
            assert values[asked["least"].answer] == min(values.values())
        assert ("value" in asked) == chart.written
        if "value" in asked:
            label = asked["value"].question.removeprefix("What is the value of ")[:-1]
            assert float(asked["value"].answer) == pytest.approx(values[label], abs=0.051)
        if "above" in asked:
            limit = float(asked["above"].question.rsplit(" ", 1)[1][:-1])
            assert asked["above"].answer == str(sum(v > limit for v in values.values()))
        picture = charts.draw_chart(chart, draw, side_px=160)
        assert len(picture.getcolors(100_000)) > 4


def test_longer_bars_stand_for_larger_values():
    chart = charts.Chart("bars", "T", ("a", "b", "c"), (10.0, 30.0, 20.0), False, "countries")
    picture = np.asarray(charts.draw_chart(chart, random.Random(0), side_px=240)).astype(int)
    heights = [
        max((np.abs(picture - colour).max(axis=2) < 5).sum(axis=0)) for colour in COLOURS.values()
    ]
    tall = sorted(h for h in heights if h > 20)
    assert len(tall) == 3
    assert tall[0] * 3 == pytest.approx(tall[2], abs=6)
    assert tall[0] * 2 == pytest.approx(tall[1], abs=6)


@pytest.mark.parametrize("layout", documents.LAYOUTS)
def test_what_is_asked_about_a_sheet_stands_on_it(layout):
    for number in range(8):
        draw = random.Random(number)
        sheet = documents.make_sheet(COUNTRIES, layout, draw, side_px=320)
        flat = sheet.text.replace("\n", " ")
        assert len(dict(sheet.asked)) == len(sheet.asked)
        for question, answer in sheet.asked:
            assert answer in flat or question.startswith("How many countries"), (question, answer)


def packed(folder, name, file, content):
    """An archive as npm would send it."""
    path = write_tar(folder / f"{name}.tgz", {f"package/{file}": json.dumps(content)})
    import gzip

    path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def archives(folder):
    gap = [
        {"country": f"Land {n}", "year": year, "life_expect": 40 + n, "fertility": 2.5, "pop": 7e6}
        for n in range(20) for year in (1990, 1995, 2000)
    ]  # fmt: skip
    rows = [
        {"cca3": f"L{n:02d}", "name": {"common": f"Land {n}" if n else "Länd"}, "capital": ["Town"],
         "region": "R", "subregion": "", "area": 10.0 + n, "languages": {"x": "Latin"},
         "currencies": {"C": {"name": "coin"}}, "borders": [], "independent": n != 1}
        for n in range(20)
    ]  # fmt: skip
    return {
        "vega-datasets": packed(folder, "vega", "data/gapminder.json", gap),
        "world-countries": packed(folder, "world", "dist/countries.json", rows),
    }


def test_charts_and_sheets_of_the_test_show_no_country_of_the_training(tmp_path):
    found = archives(tmp_path)
    assert len(read_gapminder(found["vega-datasets"])) == 20
    assert len(read_countries(found["world-countries"])) == 18
    (tmp_path / "charts").mkdir()
    (tmp_path / "sheets").mkdir()
    small = charts.Settings(charts=6, test_charts=3, side_px=120)
    report = charts.make(tmp_path / "charts", print, settings=small, get=lambda _: found)
    assert report["rows"] == {"train": 6, "test": 3}
    sheets = documents.Settings(sheets=4, test_sheets=3, side_px=200)
    report = documents.make(tmp_path / "sheets", print, settings=sheets, get=lambda _: found)
    assert report["rows"] == {"train": 4, "read": 4, "test": 3}
    assert report["sources"][0]["licence"] == "ODbL-1.0"
    train, _ = split_names(list(read_gapminder(found["vega-datasets"])), 0)
    text = (tmp_path / "charts" / "test.jsonl").read_text()
    assert [name for name in train if f'"{name}"' in text or f"{name} " in text] == []
    for folder in ("charts", "sheets"):
        source = open_source(tmp_path / folder, use="jsonl", path="train.jsonl")
        assert all(source.sample(row).messages for row in range(len(source)))


def test_a_fractal_is_its_number_and_two_instances_differ():
    formula = fractals.formula_of(3)
    again = fractals.formula_of(3)
    assert np.array_equal(formula.maps, again.maps)
    assert not np.array_equal(formula.maps[:2], fractals.formula_of(4).maps[:2])
    one, same, other = (fractals.draw_fractal(formula, instance=i, side_px=96) for i in (0, 0, 1))
    assert one.tobytes() == same.tobytes() != other.tobytes()
    lit = (np.asarray(one).max(axis=2) > 90).mean()
    assert 0.01 < lit < 0.9


def test_fractals_are_built_with_as_many_equal_pairs_as_others(tmp_path):
    small = fractals.Settings(kinds=2, pairs=4, side_px=32)
    report = fractals.make(tmp_path, print, settings=small)
    assert report["rows"] == {"train": 2, "same": 4}
    rows = [json.loads(line) for line in (tmp_path / "same.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["yes", "no", "yes", "no"]
    source = open_source(tmp_path, use="jsonl", path="same.jsonl")
    assert len(source.sample(0).messages[0].images) == 2
