"""Pairs of answers: their log-probabilities, TRL's formula, references, and a whole stage.

Tolerance: sums in another order; the largest relative difference seen is 1e-6, and the limit 2e-5.
"""

import json
import math

import pytest
import torch

from mmlm.data import open_mixture
from mmlm.data.pairs import PairPlanner, PlannedPair
from mmlm.data.pipeline import PreparedRow
from mmlm.data.schema import Drop
from mmlm.errors import ConfigError
from mmlm.training import train, write_references
from mmlm.training.batches import Batcher
from mmlm.training.learning import freeze
from mmlm.training.preference import (
    PreferenceConfig,
    lengths_of,
    log_probabilities,
    preference_loss,
)
from tests.tiny import compose_tiny, picture
from tests.training.tiny_run import parts

RTOL = 2e-5


def write_pairs(folder, count=8):
    rows = []
    for index in range(count):
        picture(index).save(folder / f"{index}.png")
        rows.append(
            {"image": f"{index}.png", "question": "What is it?", "chosen": "A small cat." * 2,
             "rejected": "Rain." if index % 2 else "Nothing at all, I think."}
        )  # fmt: skip
    rows[3] |= {"chosen": "The same.", "rejected": "The same."}
    rows[5]["chosen"] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A."}]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def recipe_of(folder, **stage):
    words = {
        "name": "prefer", "learn": ["adapters.*"], "adapters": {"use": "lora", "rank": 4},
        "objective": {"use": "preference", "beta": 0.5}, "peak_lr": 1e-2,
        "data": {"use": "pairs", "path": str(folder / "pairs.jsonl")}, "until": {"epochs": 6},
        "step_tokens": 600, "schedule": "constant", **stage,
    }  # fmt: skip
    run = {"precision": "fp32", "pool_samples": 4, "device": "cpu", "row_tokens": 300,
           "drop_budget": 0.5}  # fmt: skip
    return {"model": parts(folder), "stages": [words], "run": run}


def losses(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    assistant = compose_tiny(folder)
    words = {"use": "pairs", "path": str(folder / "pairs.jsonl")}
    mixture = open_mixture(words, folder=folder, shuffle=False)
    planner = PairPlanner(mixture, assistant.processor, max_tokens=4096, max_tiles=64)
    planned = [planner.plan(position) for position in range(8)]
    freeze(assistant.model, {"language.*": 1.0, "connector.*": 1.0})
    return assistant, planned


def inputs_of(scene, pairs, *, packed=True):
    assistant, _ = scene
    device = torch.device("cpu")
    batcher = Batcher(
        assistant.model, assistant.processor, packed=packed, cache=None, device=device
    )
    images = [batcher.pixels(image) for pair in pairs for image in pair.images]
    return batcher.inputs(PreparedRow(list(pairs), images))


def good(scene):
    return [one for one in scene[1] if isinstance(one, PlannedPair)]


def test_rows_that_are_no_pair_are_dropped_under_their_own_cause(scene):
    drops = [one for one in scene[1] if isinstance(one, Drop)]
    assert [(drop.row, drop.cause) for drop in drops] == [(3, "no_pair")]
    assert len(good(scene)) == 7


def test_packed_and_padded_pairs_have_the_log_probabilities_of_single_answers(scene):
    model, pairs = scene[0].model, good(scene)[:3]
    packed = log_probabilities(model, inputs_of(scene, pairs))
    padded = log_probabilities(model, inputs_of(scene, pairs, packed=False))
    torch.testing.assert_close(packed, padded, rtol=RTOL, atol=0)
    inputs = inputs_of(scene, pairs[:1])
    length = int(inputs["cu_seq_lens_q"][1])
    logits = model(
        input_ids=inputs["input_ids"][:, :length], pixel_values=inputs["pixel_values"][:1]
    ).logits[0, :-1]
    labels = inputs["labels"][0, 1:length]
    each = logits.log_softmax(-1)[labels != -100].gather(1, labels[labels != -100][:, None])
    torch.testing.assert_close(packed[0], each.sum(), rtol=RTOL, atol=0)
    assert lengths_of(inputs)[0] == int((labels != -100).sum())


@pytest.mark.parametrize("settings", [{}, {"length_normalised": True, "sft": 0.3, "margin": 0.2}])
def test_micro_batches_change_nothing(scene, settings):
    pairs = good(scene)[:4]
    objective = PreferenceConfig(reference="none", **settings).build(loss_weight="token")
    found = []
    for cut in ([4], [2, 2], [1, 3]):
        scene[0].model.zero_grad()
        waiting = list(pairs)
        for count in cut:
            mine, waiting = waiting[:count], waiting[count:]
            objective.loss(scene[0].model, inputs_of(scene, mine), float(len(pairs))).backward()
        found.append([p.grad.clone() for p in scene[0].model.parameters() if p.grad is not None])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=RTOL, atol=RTOL * float(one.abs().max()))


def test_a_stage_begins_at_log_two_and_learns_what_is_preferred(tmp_path):
    write_pairs(tmp_path)
    train(recipe_of(tmp_path), tmp_path / "run", quiet=True)
    seen = losses(tmp_path / "run")
    # Fresh adapters change nothing, so the reference is the model itself.
    assert seen[0] == pytest.approx(math.log(2), abs=1e-5)
    assert seen[-1] < 0.5 * seen[0]


def test_references_in_the_rows_let_all_weights_learn(tmp_path):
    path = write_pairs(tmp_path)
    base = compose_tiny(tmp_path / "base")
    base.save(tmp_path / "start")
    known = tmp_path / "known.jsonl"
    assert write_references(tmp_path / "start", path, known) == 7
    words = recipe_of(
        tmp_path, learn={"language.*": 1e-3}, adapters=None, until={"steps": 3},
        objective={"use": "preference", "reference": "rows"},
        data={"use": "pairs", "path": str(known)},
    )  # fmt: skip
    words["model"] = {"from": str(tmp_path / "start")}
    train(words, tmp_path / "run", quiet=True)
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(2), abs=1e-4)


def test_a_reference_that_would_move_is_refused(tmp_path):
    write_pairs(tmp_path)
    words = recipe_of(tmp_path, learn=["adapters.*", "connector.*"], until={"steps": 1})
    with pytest.raises(ConfigError, match="adapters must learn and nothing else"):
        train(words, tmp_path / "run", quiet=True)


def test_the_loss_is_that_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny import save_language

    tokenizer = AutoTokenizer.from_pretrained(save_language(tmp_path / "one"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    other = AutoModelForCausalLM.from_pretrained(save_language(tmp_path / "two", seed=5))
    rows = [{"prompt": "What? ", "chosen": "A cat.", "rejected": "Rain."},
            {"prompt": "Who? ", "chosen": "Two dogs.", "rejected": "Nobody at all."}]  # fmt: skip
    trainer = trl.DPOTrainer(
        model, other, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        args=trl.DPOConfig(
            tmp_path / "trl", beta=0.3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            bf16=False, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = float(trainer.compute_loss(trainer.model.eval(), dict(batch)))

    def sums(one):
        with torch.no_grad():
            logits = one.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        each = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        mask = batch["completion_mask"][:, 1:]
        return (each * mask).sum(-1).view(2, -1).T, mask.sum(-1).view(2, -1).T

    (ours, lengths), (reference, _) = sums(trainer.model), sums(other)
    config = PreferenceConfig(beta=0.3)
    mean = preference_loss(ours, reference, lengths, config).mean()
    assert float(mean) == pytest.approx(theirs, rel=1e-5)
