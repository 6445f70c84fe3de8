"""The quickstart's data set: balanced, exact, and honest about who has seen what."""

import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlm.data.builders import build, npm, quickstart
from mmlm.data.builders.base import REPORT
from mmlm.data.builders.npm import NpmPackage, fetch, integrity_of, read_files
from mmlm.data.builders.quickstart import Settings, make
from mmlm.data.builders.quickstart_parts import PHOTOS, TRAIN_STYLES, UNSEEN_STYLE, WORDS
from mmlm.data.builders.quickstart_questions import NUM_WRONG, Ask, balanced_options
from mmlm.data.builders.quickstart_things import main_colour, on_white, render
from mmlm.data.sources_built import BuiltConfig
from mmlm.errors import ConfigError, DataError

pytest.importorskip("resvg_py", reason="needs the extra `quickstart`")

SIDE_PX = 16
SETTINGS = Settings(
    side_px=SIDE_PX, num_photos=20, num_test_photos=10, fewest_styles=2, unseen_share=0.4
)
SUBGROUPS = {0: "animal-mammal", 1: "food-fruit", 2: "tool", 3: "clothing", 4: "drink"}
COLOURS = ["#ff0000", "#00aa00", "#2244ff", "#ffdd00", "#111111", "#ffffff"]


def archive_of(folder: Path, package: NpmPackage, files: dict[str, bytes]) -> Path:
    path = folder / package.file_name
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def png(pixels: np.ndarray) -> bytes:
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


@pytest.fixture(scope="session")
def archives(tmp_path_factory) -> dict[str, Path]:
    """A registry of our own: 60 things in five groups, drawn as coloured squares."""
    folder = tmp_path_factory.mktemp("npm")
    things = [(f"thing {n}", n % 5, [f"tag{n % 9}"]) for n in range(60)]
    emoji = [{"label": name, "subgroup": sub, "tags": tags} for name, sub, tags in things]
    emoji.append({"label": "flag", "subgroup": 9, "tags": ["country"]})
    groups = [{"order": order, "key": key} for order, key in SUBGROUPS.items()]
    words = {
        "en/data.json": json.dumps(emoji).encode(),
        "en/messages.json": json.dumps({"subgroups": groups}).encode(),
    }
    found = {WORDS.name: archive_of(folder, WORDS, words)}
    for package in [*TRAIN_STYLES.values(), UNSEEN_STYLE[1]]:
        icons = {
            name.replace(" ", "-"): {
                "body": f'<rect width="12" height="16" fill="{COLOURS[n % len(COLOURS)]}"/>'
            }
            for n, (name, _, _) in enumerate(things)
        }
        text = json.dumps({"icons": icons, "width": 16, "height": 16})
        found[package.name] = archive_of(folder, package, {"icons.json": text.encode()})
    rng = np.random.default_rng(0)
    sheet = png(rng.integers(0, 256, (30, 1024, 3), dtype=np.uint8))
    labels = json.dumps([n % 10 for n in range(30)]).encode()
    photos = {
        "data_batch_1.png": sheet,
        "test_batch.png": sheet,
        "train_lables.json": labels,
        "test_lables.json": labels,
    }
    found[PHOTOS.name] = archive_of(folder, PHOTOS, photos)
    return found


@pytest.fixture(scope="session")
def built(archives, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    make(folder, lambda _: None, settings=SETTINGS, get=lambda _: archives)
    return folder


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


MEASURED = ("unseen_style", "unseen_things", "photos")


def test_every_row_names_a_picture_that_is_there(built):
    for name in ("words", "align", "questions", "talks", *MEASURED):
        rows = rows_of(built, name)
        assert rows
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            image = row.get("image") or row["messages"][0]["content"][0]["image"]
            assert (built / image).is_file()


def test_names_are_learnt_from_drawings_and_their_mirror_images(built):
    rows = {row["id"]: row for row in rows_of(built, "words") if row["style"] != "photo"}
    mirrored = [name for name in rows if name.endswith("/mirrored")]
    assert len(rows) == 2 * len(mirrored)
    for name in mirrored:
        plain = rows[name.removesuffix("/mirrored")]
        assert rows[name]["answer"] == plain["answer"]
        with (
            Image.open(built / plain["image"]) as one,
            Image.open(built / rows[name]["image"]) as other,
        ):
            assert np.array_equal(np.asarray(one)[:, ::-1], np.asarray(other))


def test_training_sees_neither_the_unseen_style_nor_the_unseen_things(built):
    asked = rows_of(built, "questions") + rows_of(built, "talks")
    train = rows_of(built, "words") + asked
    seen_things = {row["thing"] for row in train}
    assert UNSEEN_STYLE[0] not in {row["style"] for row in train}
    assert not seen_things & {row["thing"] for row in rows_of(built, "unseen_things")}
    assert {row["thing"] for row in rows_of(built, "unseen_style")} <= seen_things
    shown = {row["messages"][0]["content"][0]["image"] for row in asked}
    assert not shown & {row["image"] for name in MEASURED for row in rows_of(built, name)}


def test_an_answer_is_a_wrong_option_exactly_three_times_as_often(built):
    for name in MEASURED:
        for kind in {row["kind"] for row in rows_of(built, name)}:
            rows = [r for r in rows_of(built, name) if r["kind"] == kind and r.get("choices")]
            right = Counter(row["answer"] for row in rows)
            offered = Counter(option for row in rows for option in row["choices"])
            assert offered == {answer: 4 * count for answer, count in right.items()}


def test_options_are_four_different_ones_with_one_right_among_them(built):
    for name in MEASURED:
        for row in rows_of(built, name):
            if options := row.get("choices"):
                assert len(set(options)) == NUM_WRONG + 1
                assert options.count(row["answer"]) == 1
                assert all(option in row["question"] for option in options)


def test_wrong_names_come_from_the_same_group(built):
    group = {row["thing"]: row["group"] for row in rows_of(built, "unseen_style")}
    for row in rows_of(built, "unseen_style"):
        if row["kind"] == "name":
            assert {group[option] for option in row["choices"]} == {row["group"]}


def test_the_same_settings_give_the_same_bytes_and_another_seed_does_not(built, archives, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    for folder, seed in ((again, 0), (other, 2)):
        folder.mkdir()
        settings = Settings(**{**SETTINGS.__dict__, "seed": seed})
        make(folder, lambda _: None, settings=settings, get=lambda _: archives)
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert all((again / file).read_bytes() == (built / file).read_bytes() for file in files)
    assert rows_of(other, "unseen_things") != rows_of(built, "unseen_things")


def test_a_name_without_options_is_asked_last_so_that_it_is_not_picked_out_of_four(built):
    for row in rows_of(built, "talks"):
        turns = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
        assert "What is this?" not in turns[1:-1]


def test_a_name_is_asked_for_several_times_among_other_names(built):
    several = 0
    for row in rows_of(built, "questions"):
        told = row["messages"]
        asked = [turn["content"] for turn in told[2::2] if turn["content"].startswith("Which is")]
        several += len(asked) > 1
        assert len(set(asked)) == len(asked)
        assert all(row["thing"] in text for text in asked)
    assert several


def test_options_that_are_too_common_are_asked_less_often():
    asks = [Ask("a", frozenset("a"))] * 30 + [Ask(x, frozenset(x)) for x in "bcdefgh" * 4]
    options = balanced_options(asks, random.Random(0))
    right = Counter(ask.answer for ask, found in zip(asks, options, strict=True) if found)
    offered = Counter(option for found in options if found for option in found)
    assert 0 < right["a"] < 30
    assert offered == {answer: 4 * count for answer, count in right.items()}


def test_too_few_answers_for_four_options_ask_nothing():
    asks = [Ask(x, frozenset(x)) for x in "abcab"]
    assert balanced_options(asks, random.Random(0)) == [None] * 5


def test_a_drawing_stands_on_white_and_has_its_colour():
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="16" height="8" viewBox="0 0 16 8">{}</svg>'
    )
    blue = render(svg.format('<rect width="16" height="8" fill="#1144ee"/>'), 16)
    assert blue.shape == (16, 16, 4)
    assert (on_white(blue)[0, 0] == 255).all()
    assert main_colour(blue) == "blue"
    halves = '<rect width="8" height="8" fill="#f00"/><rect x="8" width="8" height="8"/>'
    assert main_colour(render(svg.format(halves), 16)) in ("red", "black")
    assert main_colour(np.zeros((4, 4, 4), np.uint8)) is None


def test_an_archive_that_is_not_the_known_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path))
    package = NpmPackage("@some/icons", "1.0.0", "A" * 86 + "==", "MIT", "somebody")
    monkeypatch.setattr(
        npm, "_pack", lambda packages, folder: archive_of(folder, packages[0], {"a": b"evil"})
    )
    with pytest.raises(DataError, match=r"@some/icons@1\.0\.0 is not the package that we know"):
        fetch([package])
    assert not (tmp_path / "npm" / package.file_name).exists()


def test_an_archive_in_the_cache_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path))
    (tmp_path / "npm").mkdir()
    made = archive_of(tmp_path / "npm", NpmPackage("icons", "1.0.0", "", "", ""), {"a": b"1"})
    package = NpmPackage("icons", "1.0.0", integrity_of(made), "MIT", "somebody")
    monkeypatch.setattr(npm, "_pack", lambda *_: pytest.fail("fetched again"))
    assert read_files(fetch([package])["icons"], ["a"]) == {"a": b"1"}
    with pytest.raises(DataError, match="holds no file 'b'"):
        read_files(made, ["b"])


def test_a_data_set_is_made_once_and_a_cut_off_one_leaves_nothing(tmp_path, monkeypatch, archives):
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path))
    monkeypatch.setattr(quickstart, "Settings", lambda: SETTINGS)

    def broken(packages):
        raise DataError("no network")

    monkeypatch.setattr(make, "__kwdefaults__", {"settings": None, "get": broken})
    with pytest.raises(DataError, match="no network"):
        build("quickstart")
    assert list((tmp_path / "built").iterdir()) == []
    monkeypatch.setattr(make, "__kwdefaults__", {"settings": None, "get": lambda _: archives})
    first = build("quickstart")
    assert first.fresh
    assert not build("quickstart").fresh
    assert (first.folder / REPORT).is_file()
    assert len(BuiltConfig(name="quickstart", rows="align").open(tmp_path)) > 0
    with pytest.raises(ConfigError, match="has no rows 'alin'"):
        first.rows("alin")


def test_an_unknown_data_set_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="Did you mean 'quickstart'"):
        build("quikstart")


@pytest.mark.hub
def test_the_real_packages_are_the_ones_that_we_know(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path))
    packages = [WORDS, *TRAIN_STYLES.values(), UNSEEN_STYLE[1]]
    assert all(path.is_file() for path in fetch(packages).values())
