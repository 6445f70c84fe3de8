"""What the model will see is shown token for token; what would be lost is a complaint."""

import html
import re

import pytest

from mmlm.cli import run as mmlm
from mmlm.data import Mixture, Share
from mmlm.data.planning import Planner
from mmlm.data.preview import GRAVE, as_terminal, complaint, survey, told
from mmlm.data.preview_page import preview_page, tiles_of, tokens_of
from mmlm.data.sharing import NOT_LEARNT
from tests.data.made import open_source, write_lines
from tests.tiny import compose_tiny, picture
from tests.training.tiny_run import parts, tiny_recipe, write_rows

TURNS = [{"from": "human", "value": "Was ist das?"}, {"from": "gpt", "value": "Ein Bär 🐻 & <b>"}]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    eye = {"use": "patches", "patch_px": 8, "side_px": 16}
    return compose_tiny(tmp_path_factory.mktemp("model"), vision="patches", eye=eye).processor


def seen(folder, processor, rows, *, max_tokens=600, **words):
    write_lines(folder / "a.jsonl", rows)
    source = open_source(folder, **{"use": "jsonl", "path": "a.jsonl", **words})
    planner = Planner(Mixture([(source, Share())], shuffle=False), processor,
                      max_tokens=max_tokens, max_tiles=64, share=True)  # fmt: skip
    return survey(planner, range(len(source)))


def test_the_boxes_of_a_sample_are_its_tokens_and_its_text(tmp_path, processor):
    picture(1).save(tmp_path / "a.png")
    found = seen(tmp_path, processor, [{"image": "a.png", "conversations": TURNS}])
    (sample,) = found.samples
    boxes = list(tokens_of(sample, processor))
    numbers = [number for box in boxes for number in box.numbers]
    assert numbers == sample.ids.tolist()
    learnt = [box.learnt for box in boxes for _ in box.numbers]
    assert learnt == (sample.labels != NOT_LEARNT).tolist()
    text = "".join(box.text for box in boxes if box.kind == "text")
    assert "Was ist das?" in text
    assert "Ein Bär 🐻 & <b>" in text
    assert [box.text for box in boxes if box.kind == "picture"] == ["picture × 4"]
    assert "<|im_end|>" in {box.text for box in boxes if box.kind == "control"}


def test_the_page_shows_tiles_tokens_and_what_was_left_out(tmp_path, processor):
    picture(1).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "conversations": [*TURNS, *TURNS]},
            {"image": "gone.png", "question": "a", "answer": "b"}]  # fmt: skip
    found = seen(tmp_path, processor, rows, turns="apart")
    page = preview_page(found, processor, title="My <data>", lead="licence mit")
    assert "My &lt;data&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 1
    assert "no_image_file" in page
    assert "gone.png" in page
    assert "2 questions on shared tokens" in page
    assert page.count('<b class="branch">') == 2
    marked = re.findall(r'<span class="t learnt"[^>]*>([^<]*)</span>', page)
    assert html.unescape("".join(marked)).count("Ein Bär 🐻 & <b>") == 2
    assert "<script" not in page
    assert "http" not in page


def test_tiles_are_those_that_the_model_sees(tmp_path, processor):
    picture(1, height=40, width=80).save(tmp_path / "a.png")
    ((tile, words),) = tiles_of(str(tmp_path / "a.png"), processor)
    assert (tile.size, words) == ((16, 16), "16 × 16 px")
    ((_, words),) = tiles_of(str(tmp_path / "gone.png"), processor)
    assert words.startswith("broken")


GOOD = {"question": "What?", "answer": "A."}
WRONG = {
    "no_image_file": {**GOOD, "image": "gone.png"},
    "too_long": {**GOOD, "answer": "long " * 300},
    "no_labels": {"messages": [{"role": "user", "content": "a"},
                               {"role": "assistant", "content": "b", "learn": True}]},
    "bad_template": GOOD,
}  # fmt: skip


@pytest.mark.parametrize("cause", sorted(GRAVE))
def test_what_would_be_lost_is_a_complaint_with_its_mend(tmp_path, processor, cause, monkeypatch):
    if cause == "bad_template":
        refuse_sometimes(processor, monkeypatch)
    if cause == "no_labels":
        learn_nothing_sometimes(processor, monkeypatch)
    rows = [GOOD] * 18 + [{**WRONG[cause], "id": "wrong"}] * 2
    found = seen(tmp_path, processor, rows)
    assert [drop.cause for drop in found.drops] == [cause] * 2
    said = complaint(found, budget=0.05)
    assert said.startswith("2 of 20 samples")
    assert cause in said
    assert GRAVE[cause] in said
    assert complaint(found, budget=0.1) is None
    assert any(cause in line for line in told(found, processor))


def refuse_sometimes(processor, monkeypatch):
    from mmlm.errors import TemplateError

    encode, calls = processor.chat.encode, iter(range(100))

    def refusing(*args, **words):
        if next(calls) >= 18:
            raise TemplateError("unstable")
        return encode(*args, **words)

    monkeypatch.setattr(processor.chat, "encode", refusing)


def learn_nothing_sometimes(processor, monkeypatch):
    encode, calls = processor.chat.encode, iter(range(100))

    def forgetting(*args, **words):
        encoded = encode(*args, **words)
        if next(calls) >= 18:
            encoded.labels = [NOT_LEARNT] * len(encoded.ids)
        return encoded

    monkeypatch.setattr(processor.chat, "encode", forgetting)


def test_a_set_of_which_nothing_can_be_used_is_a_complaint(tmp_path, processor):
    found = seen(tmp_path, processor, [{"question": "a", "answer": ""}] * 3)
    assert complaint(found, budget=1.0).startswith("Not one of 3 samples")
    assert told(found, processor)


def test_a_terminal_marks_what_is_learnt(tmp_path, processor):
    (sample,) = seen(tmp_path, processor, [GOOD]).samples
    assert "⟦A.<|im_end|>⟧" in as_terminal(sample, processor, colour=False)


def recipe_file(folder):
    import yaml

    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**tiny_recipe(folder), "model": parts(folder)}))
    return path


def test_the_command_shows_a_file_with_the_model_of_a_recipe(tmp_path, capsys):
    recipe = recipe_file(tmp_path)
    page = tmp_path / "look" / "page.html"
    words = [str(tmp_path / "rows.jsonl"), "--like", str(recipe), "--num", "5"]
    assert mmlm(["data", "preview", *words, "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "are image tokens" in said
    assert "⟦" in said
    assert page.read_text().count("<section>") == 5


def test_the_command_fails_where_pictures_are_missing(tmp_path, capsys):
    write_rows(tmp_path, 10, bad=8)
    recipe = recipe_file(tmp_path)
    words = [str(tmp_path / "rows.jsonl"), "--like", str(recipe)]
    assert mmlm(["data", "preview", *words]) == 1
    assert "`images:` of the source" in capsys.readouterr().err


def test_check_writes_a_page_for_every_stage_and_fails_where_answers_are_lost(tmp_path, capsys):
    recipe = recipe_file(tmp_path)
    assert mmlm(["check", str(recipe), "--html", str(tmp_path / "look.html")]) == 0
    assert "<section>" in (tmp_path / "look.html").read_text()
    assert "Stage instruct" in (tmp_path / "look-instruct.html").read_text()
    capsys.readouterr()
    assert mmlm(["check", str(recipe), "run.row_tokens=64"]) == 1
    assert "raise `run.row_tokens`" in capsys.readouterr().err


def test_words_of_another_action_are_refused(capsys):
    assert mmlm(["data", "preview", "a.jsonl", "--group", "patient"]) == 2
    assert "belongs to mmlm data new" in capsys.readouterr().err
    assert mmlm(["data", "build", "scenes", "--html", "a.html"]) == 2
    assert "belongs to mmlm data preview" in capsys.readouterr().err
