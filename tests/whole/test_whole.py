"""Classes that transformers has as one: trained, resumed, saved and answering as that class.

Tolerance of logits after a step and a round through the disk: nothing is rounded, so 1e-5 of their
size; a single step at the rate used here moves them by more than 1e-2.
"""

import json
import math
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmlm.assistant import load
from mmlm.errors import CheckpointError, ConfigError
from mmlm.evaluation.asking.backend import LocalBackend
from mmlm.evaluation.benchmarks.conditions import Case
from mmlm.features import Size
from mmlm.generation import GenerationSettings
from mmlm.hub import is_only_whole
from mmlm.hub.whole import load_whole, prove_tokens, stock_inputs
from mmlm.messages import assistant, user
from mmlm.training import train
from mmlm.training.attention import choose_attention, prove_isolation
from mmlm.training.recipe import Recipe, RunConfig
from mmlm.training.stage import StageRun
from mmlm.whole import WholeModel
from tests.tiny import picture
from tests.training.test_preference import write_pairs
from tests.training.tiny_run import write_rows
from tests.whole.families import FAMILIES, save_family

RTOL = 1e-5
PACKED = {"llava", "llava_onevision", "idefics3", "qwen2_vl", "internvl"}
# Gemma 3 looks both ways inside a picture, and its mask joins the pictures of a row; that of
# transformers 5.17 does not.
if transformers.__version__.startswith("5.17."):
    PACKED |= {"gemma3"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(root / name, name) for name in FAMILIES}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))


def recipe_of(folder, place, **stage):
    rows = write_rows(place, 12)
    words = {
        "name": "tune", "learn": {"connector.*": 1e-2, "language.*": 1e-2}, "data": str(rows),
        "until": {"steps": 3}, "step_tokens": 400, "schedule": "constant", **stage,
    }  # fmt: skip
    return {
        "model": {"from": str(folder), "whole": True},
        "stages": [words],
        "run": {"precision": "fp32", "pool_samples": 4, "device": "cpu", "row_tokens": 200},
    }


def furthest(one, other):
    return float((one - other).abs().max() / other.abs().max())


class StopHereError(Exception):
    """Ends a run as a crash would: nothing is saved."""


def crash_at(monkeypatch, step):
    learn = StageRun._learn

    def learn_or_crash(self, *args):
        if self.step == step:
            raise StopHereError
        return learn(self, *args)

    monkeypatch.setattr(StageRun, "_learn", learn_or_crash)


QUICK = ("qwen2_vl", "idefics3")
WHOLE_RUNS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES
]


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_a_family_is_trained_resumed_saved_and_answers_as_its_own_class(
    folders, tmp_path, monkeypatch, name
):
    words = recipe_of(folders[name], tmp_path)
    whole = train(words, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(StopHereError):
            train(words, tmp_path / "broken", overrides={"run.checkpoint_every": 1}, quiet=True)
    again = train(words, tmp_path / "broken", overrides={"run.checkpoint_every": 1}, quiet=True)
    files = [sorted(run.model.glob("*.safetensors")) for run in (whole, again)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]

    before, _ = load_whole(folders[name])
    ours = load(whole.model, device="cpu", whole=True)
    stock = AutoModelForImageTextToText.from_pretrained(whole.model).eval()
    assert type(stock) is type(before.stock)
    turns = [user("What is it?", [picture(3)])]
    inputs = stock_inputs(ours.processor, turns)
    theirs = AutoProcessor.from_pretrained(whole.model)
    assert type(theirs) is type(ours.processor.stock)
    with torch.no_grad():
        logits = stock(**inputs).logits
        assert furthest(ours.model.stock(**inputs).logits, logits) < RTOL
        assert furthest(before.stock(**inputs).logits, logits) > 1e-2
        start = inputs["input_ids"].shape[1]
        answer = stock.generate(
            **inputs, max_new_tokens=6, do_sample=False,
            eos_token_id=list(ours.processor.chat.stop_ids), pad_token_id=0,
        )[0, start:]  # fmt: skip
    text = theirs.tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert ours.answer("What is it?", [picture(3)], max_new_tokens=6) == text


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_packed_where_the_proof_with_pictures_holds(folders, name):
    model, _ = load_whole(folders[name])
    choice = choose_attention(model, RunConfig(), torch.device("cpu"))
    assert choice.packed == (name in PACKED), choice.reason
    if choice.packed:
        assert prove_isolation(model).holds
    else:
        assert "padded, because" in choice.reason


@pytest.mark.parametrize("name", FAMILIES)
def test_two_pictures_and_labels_are_those_of_the_stock_processor(folders, name):
    model, processor = load_whole(folders[name])
    turns = [
        user("Which is older?", [picture(1), picture(1)]), assistant("The left one."),
        user("<|im_end|> and <image>?"),
    ]  # fmt: skip
    asked = turns[:1]
    encoded = processor.encode_chat(asked, add_generation_prompt=True)
    ours, theirs = processor.batch([encoded], model), stock_inputs(processor, asked)
    for key in set(theirs) & set(ours):
        # Idefics3 lays the tiles of all pictures of a sample along one axis; it flattens them.
        assert torch.allclose(ours[key].float().reshape(theirs[key].shape), theirs[key].float()), (
            key
        )
    learnt = processor.encode_chat(turns[:2], with_labels=True, with_pixels=False)
    words = [i for i, label in zip(learnt.ids, learnt.labels, strict=True) if label != -100]
    assert processor.tokenizer.decode(words) == "The left one.<|im_end|>"
    plain = processor.encode_chat(turns, with_labels=True, with_pixels=False)
    images = [i == processor.image_token_id for i in plain.ids]
    assert sum(images) == sum(i == processor.image_token_id for i in encoded.ids)


def test_features_of_a_class_taken_whole_are_not_kept_and_that_is_said(folders, tmp_path):
    words = recipe_of(folders["qwen2_vl"], tmp_path)
    words["run"]["feature_cache"] = "on"
    with pytest.raises(ConfigError, match="gives no features by themselves"):
        train(words, tmp_path / "run", quiet=True)


@pytest.mark.parametrize("use", ["lora", "qlora"])
def test_adapters_are_merged_into_the_class_that_is_saved(folders, tmp_path, use):
    pytest.importorskip("peft")
    if use == "qlora":
        pytest.importorskip("bitsandbytes")
    words = recipe_of(
        folders["qwen2_vl"], tmp_path, learn=["adapters.*", "connector.*"],
        adapters={"use": use, "rank": 4}, peak_lr=1e-2,
    )  # fmt: skip
    words["run"]["ask"] = {"every_steps": 2, "num": 1, "max_new_tokens": 2}
    words["validation"] = {"data": words["stages"][0]["data"], "every_steps": 2, "samples": 4}
    done = train(words, tmp_path / "run", quiet=True)
    assert len((done.out / "growth.jsonl").read_text().splitlines()) >= 2
    assert done.stages[0].validation_loss is not None
    _, loading = AutoModelForImageTextToText.from_pretrained(done.model, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    before, after = load_whole(folders["qwen2_vl"])[0], load_whole(done.model)[0]
    moved = {
        name.split(".")[1]
        for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert moved == {"connector", "language"}


def test_padded_rows_have_the_loss_and_the_gradient_of_packed_ones(folders, tmp_path):
    rows = []
    for packing in ("packed", "padded"):
        words = recipe_of(folders["qwen2_vl"], tmp_path, until={"steps": 1}, step_tokens=9000)
        words["run"] |= {"packing": packing, "row_tokens": 9000, "pool_samples": 64}
        train(words, tmp_path / packing, quiet=True)
        log = (tmp_path / packing / "log.jsonl").read_text().splitlines()
        rows.append(json.loads(log[0]))
    assert rows[0]["tokens"] == rows[1]["tokens"]
    for key in ("loss", "grad_norm"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=RTOL)


def test_a_dry_run_says_that_the_class_stays_the_same(folders, tmp_path, capsys):
    train(recipe_of(folders["internvl"], tmp_path), tmp_path / "dry", dry_run=True)
    said = capsys.readouterr().out
    assert "InternVLForConditionalGeneration" in said
    assert "the class stays the same" in said
    assert "connector" in said


def test_a_class_that_mmlm_reads_as_parts_is_not_taken_whole_by_itself(folders):
    assert is_only_whole(folders["qwen2_vl"])
    assert not is_only_whole(folders["llava"])
    assert isinstance(load(folders["qwen2_vl"], device="cpu").model, WholeModel)


def test_a_processor_that_is_not_understood_is_refused(folders):
    model, processor = load_whole(folders["llava"])
    picture_text = processor.image_processor.expand(Size(45, 60), 1)
    assert picture_text == "<image>" * 16
    plan = processor.image_processor.plan(Size(45, 60))
    processor.image_processor._texts[Size(45, 60), 1] = "<image>" * 15, plan
    with pytest.raises(CheckpointError, match="gives other input_ids"):
        prove_tokens(processor, model)


def test_a_missing_tensor_is_an_error(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    save_family(broken, "llava")
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(name for name in weights if "multi_modal_projector" in name))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing keys"):
        load_whole(broken)


def test_whole_goes_with_from_alone():
    stage = {"name": "a", "learn": ["language.*"], "data": "a.jsonl", "until": {"steps": 1}}
    with pytest.raises(ConfigError, match=r"goes with model\.from"):
        Recipe.from_dict(
            {"model": {"whole": True, "vision": {}, "language": {}}, "stages": [stage]}
        )


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3"])
def test_a_benchmark_asks_it_like_any_other_model(folders, name):
    ours = load(folders[name], device="cpu", whole=True)
    backend = LocalBackend(ours)
    item: Any = None
    cases = [
        Case("made", "image", item, question, (picture(3),), ("k",), ("a cat", "rain"))
        for question in ("What is it?", "Is it a cat or is it rain?")
    ]
    answers = backend.answer(cases, GenerationSettings(max_new_tokens=4))
    questions = [case.prompt for case in cases]
    assert answers == [ours.answer(one, [picture(3)], max_new_tokens=4) for one in questions]
    assert ours.chat(max_new_tokens=4).ask(questions[0], [picture(3)]) == answers[0]
    talk = [user(questions[0], [picture(3)]), assistant("rain")]
    encoded = ours.processor.encode_chat(talk, with_labels=True)
    with torch.no_grad():
        logits = ours.model(**ours.processor.batch([encoded], ours.model)).logits[0, :-1]
    labels = torch.tensor(encoded.labels[1:])
    each = logits.log_softmax(-1)[labels != -100].gather(1, labels[labels != -100][:, None])
    assert backend.likelihoods(cases[:1])[0][1] == pytest.approx(float(each.mean()), rel=1e-4)
    assert backend.weights != LocalBackend(load(folders["internvl"], whole=True)).weights


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_pairs_of_answers_are_learnt_from_log_two_on(folders, tmp_path, packing):
    pytest.importorskip("peft")
    pairs = write_pairs(tmp_path)
    words = recipe_of(
        folders["qwen2_vl"], tmp_path, learn=["adapters.*"], peak_lr=1e-2,
        adapters={"use": "lora", "rank": 4}, objective={"use": "preference", "beta": 0.5},
        data={"use": "pairs", "path": str(pairs)}, until={"epochs": 4}, step_tokens=800,
    )  # fmt: skip
    words["run"] |= {"packing": packing, "row_tokens": 400, "drop_budget": 0.5}
    train(words, tmp_path / "run", quiet=True)
    rows = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
