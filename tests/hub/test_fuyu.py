"""Fuyu: what its processor of transformers does, and which compositions equal it."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import FuyuForCausalLM, FuyuImageProcessor, FuyuProcessor

from mmlm.assistant import compose, load
from mmlm.cli import run
from mmlm.errors import CheckpointError, ConfigError, MMLMError, TemplateError
from mmlm.features import Size
from mmlm.hub import is_only_whole, match, opens_in
from mmlm.images import NativeConfig
from mmlm.images.resize import cut, normalise
from mmlm.language import CausalLMConfig
from mmlm.messages import assistant, user
from tests.contracts.test_stock_classes import EXAMPLES, composed
from tests.tiny import compose_tiny, picture, save_language

QUESTION = "What is it?"
BOX = Size(32, 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuyu")
    whole = composed(folder, "fuyu")
    assert whole.save(folder / "model") == []
    return whole, folder


def without(name, **words):
    """Return the words of the example with one of them changed."""
    return {**EXAMPLES["fuyu"], "vision": "patches", name: words}


@pytest.mark.parametrize(
    "size", [(40, 56), (8, 8), (9, 70), (300, 20), (33, 64)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_padded_pictures_are_those_of_fuyu(size):
    image = picture(1, *size)
    theirs = FuyuImageProcessor(
        size={"height": BOX.height, "width": BOX.width}, patch_size={"height": 8, "width": 8}
    )(image, return_tensors="pt")
    (tile,) = NativeConfig(rule="padded", box_px=BOX).plan(Size(*size), BOX, 8).tiles
    ours = normalise(cut(image, tile, resample="bilinear", fill=(1, 1, 1)), [0.5] * 3, [0.5] * 3)
    wanted = theirs["images"][0, 0, :, : tile.size.height, : tile.size.width]
    assert torch.equal(ours, wanted)
    kept = int(theirs["image_unpadded_heights"][0][0]), int(theirs["image_unpadded_widths"][0][0])
    assert tuple(tile.size) == tuple(-(-pixels // 8) * 8 for pixels in kept)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (without("talk"), "Fuyu's processor puts pictures before all words"),
        (without("image", use="native", rule="padded", box_px=[32, 64]), "layout plain"),
        (without("image", use="native", layout="row_ends"), "Fuyu pads at its own proportions"),
        (
            without("image", use="native", rule="padded", box_px=[30, 64], layout="row_ends"),
            "holds no whole patches",
        ),
        (without("connector", use="linear", bias=False), "linear with a bias"),
        (without("reducer", use="average_pool", factor=2), "reducer 'average_pool'"),
    ],
    ids=["template", "rows", "pixels", "box", "bias", "reducer"],
)
def test_the_condition_that_failed_is_named(tmp_path, words, reason):
    config = compose_tiny(tmp_path, **words).model.config
    found = match(config)
    assert found.target is None
    assert found.nearest is not None
    assert found.nearest.use == "fuyu"
    assert [each for each in found.reasons if reason in each], found.reasons
    rows = {row.tool: row for row in opens_in(config)}
    assert reason in rows["stock class"].reason


def test_the_command_line_writes_it_from_mmlms_own_folder(made, tmp_path, capsys):
    whole, folder = made
    own, out = tmp_path / "own", tmp_path / "out"
    assert run(["import", str(folder / "model"), "--out", str(own)]) == 0
    assert json.loads((own / "config.json").read_text())["model_type"] == "mmlm"
    assert run(["export", str(own), "--to", "fuyu", "--out", str(out)]) == 0
    assert "holds the model as the class fuyu of transformers" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["FuyuForCausalLM"]
    assert isinstance(FuyuProcessor.from_pretrained(out), FuyuProcessor)
    stock, wanted = (
        FuyuForCausalLM.from_pretrained(place).state_dict() for place in (out, folder / "model")
    )
    assert stock.keys() == wanted.keys()
    assert all(torch.equal(stock[key], wanted[key]) for key in wanted)
    again = load(out, device="cpu")
    answers = [each.answer(QUESTION, [picture(3)], max_new_tokens=6) for each in (whole, again)]
    assert answers[0] == answers[1]


def test_the_command_line_says_why_a_composition_is_no_fuyu(tmp_path, capsys):
    compose_tiny(tmp_path).save(tmp_path / "llava")
    out = tmp_path / "out"
    assert run(["export", str(tmp_path / "llava"), "--to", "fuyu", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "holds the model" not in said.out
    assert "This composition is not FuyuForCausalLM:" in said.err
    assert "encoder 'hf' (Fuyu has none: patches)" in said.err
    assert "set `language.format: fuyu`" in said.err
    assert "Traceback" not in said.err
    assert not out.exists()


def test_a_tied_head_would_learn_the_ends_of_rows(tmp_path):
    words = {**EXAMPLES["fuyu"], "language": "persimmon"}
    config = compose_tiny(tmp_path, **words).model.config
    config.tie_word_embeddings = True
    assert "the head shares its weights" in "".join(match(config).reasons)


def test_the_processor_itself_writes_what_was_learnt(made):
    whole, folder = made
    stock = FuyuProcessor.from_pretrained(folder / "model")
    given = stock(images=picture(3), text=QUESTION, return_tensors="pt")
    ours = whole.processor.encode_chat([user(QUESTION, [picture(3)])], add_generation_prompt=True)
    theirs = stock.tokenizer.convert_ids_to_tokens(given["input_ids"][0].tolist())
    rows, columns = 4, 6  # 32 x 44 after shrinking, of 40 x 56
    assert theirs[: rows * (columns + 1)] == ([*["|SPEAKER|"] * columns, "|NEWLINE|"]) * rows
    assert theirs[rows * (columns + 1)] == "<s>"
    assert theirs[-1] == "<0x04>"
    assert len(ours.ids) == len(theirs)


def test_the_end_of_a_row_is_an_embedding_there_and_a_mark_here(made):
    whole, folder = made
    again = load(folder / "model", device="cpu")
    marks = whole.model.model.marks.weight
    assert torch.equal(again.model.model.marks.weight, marks)
    newline = whole.processor.tokenizer.convert_tokens_to_ids("|NEWLINE|")
    assert torch.equal(again.model.get_input_embeddings().weight[newline], marks[0])


def test_the_picture_stands_first_and_answers_alone_are_learnt(made):
    whole, _ = made
    turns = [user("One?", [picture(1)]), assistant("Yes."), user("Two?"), assistant("No.")]
    encoded = whole.processor.encode_chat(turns, with_labels=True)
    assert encoded.text == "<image><s>One?<0x04>Yes.<|im_end|>Two?<0x04>No.<|im_end|>"
    learnt = [number for number in encoded.labels if number >= 0]
    assert whole.processor.tokenizer.decode(learnt) == "Yes.<|im_end|>No.<|im_end|>"


def test_a_later_picture_would_change_what_was_read_and_is_not_learnt(made):
    whole, _ = made
    turns = [
        user("One?", [picture(1)]), assistant("Yes."),
        user("Two?", [picture(2)]), assistant("No."),
    ]  # fmt: skip
    with pytest.raises(TemplateError, match="writes it differently when other turns follow"):
        whole.processor.encode_chat(turns, with_labels=True)


def test_fuyus_own_folders_are_taken_whole(made, tmp_path):
    """The published tokenizer has its marks in the vocabulary, and puts a space before a text."""
    _, folder = made
    for path in (folder / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert not is_only_whole(tmp_path)
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    source["added_tokens"] = [
        token for token in source["added_tokens"] if token["content"] != "|SPEAKER|"
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    assert is_only_whole(tmp_path)


def test_another_padding_is_refused_with_its_value(made, tmp_path):
    _, folder = made
    for path in (folder / "model").iterdir():
        if path.name != "mmlm.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["padding_value"] = 0.0
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"pads with 1 .*got 0\.0"):
        load(tmp_path, device="cpu")


def test_a_language_model_that_fuyu_would_misread_is_refused(tmp_path):
    words = {"use": "causal_lm", "checkpoint": str(save_language(tmp_path)), "format": "fuyu"}
    with pytest.raises(ConfigError, match="pads with token 0, which is '!' here"):
        compose(vision={"use": "patches"}, language=words)


def test_the_form_leaves_no_place_for_a_system_turn():
    with pytest.raises(MMLMError, match="`system` would change nothing"):
        CausalLMConfig.from_dict(
            {"checkpoint": "x", "format": "fuyu", "system": "Be brief."}, origin="model.language"
        )


def test_a_wide_picture_has_a_row_of_its_own():
    tile = NativeConfig(rule="padded", box_px=BOX).plan(Size(1, 1000), BOX, 8).tiles[0]
    assert tile.scaled == Size(1, 64)
    assert tile.size == Size(8, 64)
    image = Image.new("RGB", (1000, 1), (255, 0, 0))
    assert cut(image, tile, fill=(1, 1, 1))[0, 0].tolist() == [255] * 64
