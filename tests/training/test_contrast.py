"""Two frozen encoders that never saw one another meet in one space, by two MLPs."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from mmlm.assistant import load
from mmlm.errors import ConfigError
from mmlm.evaluation import load_benchmark
from mmlm.evaluation.asking.backend import LocalBackend
from mmlm.evaluation.probes.frozen import one_each, probe_all
from mmlm.evaluation.probes.pairs import cka, pooled, rank_pairs
from mmlm.evaluation.probes.zero_shot import joint_space_of, retrieval, zero_shot_kinds
from mmlm.language.sentences import SentenceConfig
from mmlm.training import train
from mmlm.training.objectives import objectives
from tests import two_towers
from tests.tiny import compose_tiny, save_vision
from tests.training.tiny_run import parts

COLOURS = ("red", "lime", "blue", "yellow", "black", "white", "cyan", "magenta")


def draw(folder):
    """Write a picture of each colour with its caption, for training and as a benchmark."""
    rows = []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
        rows.append({"id": str(number), "image": f"{colour}.png", "question": "What?",
                     "answer": f"a photo of a {colour}.", "thing": colour})  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "colours.yaml").write_text("dataset: {path: rows.jsonl}\n")
    return load_benchmark(folder / "colours.yaml")


def scores(model, benchmark):
    """Return what the space knows without learning."""
    backend = LocalBackend(model)
    space, items = joint_space_of(model.model), one_each(benchmark.items)
    found = [zero_shot_kinds(space, backend, "c", items), *retrieval(space, backend, "c", items)]
    return {each.probe: each.score for each in found}


@pytest.mark.slow
def test_two_projectors_alone_learn_and_pictures_and_texts_find_one_another(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)  # what is saved names no absolute path
    benchmark = draw(tmp_path)
    two_towers.save_bert(tmp_path / "bert")
    text = {"checkpoint": "bert"}
    words = parts(tmp_path)
    words["vision"]["checkpoint"] = str(save_vision(tmp_path / "dino", "dinov2"))
    words["connector"] = {"use": "dual_projector", "text": text, "width": 16}
    stage = {"name": "meet", "learn": ["connector.places", "connector.texts", "connector.scale"],
             "data": str(tmp_path / "rows.jsonl"), "until": {"epochs": 80}, "step_tokens": 2048,
             "peak_lr": 1e-2, "objective": {"use": "contrast"}}  # fmt: skip
    run = {"precision": "fp32", "pool_samples": 8, "device": "cpu"}
    (result,) = train({"model": words, "stages": [stage], "run": run}, tmp_path / "run").stages
    assert result.last_loss < 0.3 < result.first_loss
    learnt = load(tmp_path / "run", device="cpu")  # the projector of texts comes back too
    found = scores(learnt, benchmark)
    assert found["text to picture @1"] == found["picture to text @1"] == 1.0
    assert found["zero-shot kinds"] > 0.8
    probed = {each.probe for each in probe_all(learnt, [benchmark]).encoder}
    assert {"zero-shot kinds", "picture to text @1", "text to picture @5"} <= probed
    plain = learnt.model.model.connector
    with torch.no_grad():  # without what was learnt, all is lost
        for weight in plain.places.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.manual_seed(1)))
    assert scores(learnt, benchmark)["text to picture @1"] < 0.7


def test_a_pair_counts_the_same_beside_strangers_and_not_against_its_own_caption(tmp_path):
    text = {"checkpoint": str(two_towers.save_bert(tmp_path / "bert"))}
    connector = {"use": "dual_projector", "text": text, "width": 16}
    made = compose_tiny(tmp_path, connector=connector)
    objective = objectives.read({"use": "contrast"}, origin="x").build(loss_weight="token")
    objective.prepare(made.model, made.processor.tokenizer, None)
    speaks, slot = made.processor.tokenizer, made.model.config.image_token_id

    def loss(captions):
        pixels = torch.randn(len(captions), 3, 32, 32, generator=torch.manual_seed(1))
        ids, labels, borders = [], [], [0]
        for caption in captions:
            said = speaks(caption).input_ids
            ids += [slot] * 16 + said
            labels += [-100] * 16 + said
            borders.append(len(ids))
        given = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        given |= {"cu_seq_lens_q": torch.tensor(borders), "pixel_values": pixels}
        with torch.no_grad():
            return float(objective.loss(made.model, given, 1))

    assert loss(["a cat"]) == 0.0  # nobody else to take it for
    assert loss(["a cat", "a cat"]) == 0.0
    model = made.model.model
    pixels = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(1))
    with torch.no_grad():
        shown = model.connector.embed(model.encode_images(pixels))
        said = model.connector.embed_texts(objective._texts(["a cat", "a dog"]))
    alike = shown @ said.T / 0.07
    own = torch.arange(2)
    cross = torch.nn.functional.cross_entropy
    wanted = (cross(alike, own, reduction="sum") + cross(alike.T, own, reduction="sum")) / 2
    assert loss(["a cat", "a dog"]) == pytest.approx(float(wanted), rel=1e-3)


def test_a_connector_without_texts_is_refused(tmp_path):
    made = compose_tiny(tmp_path)
    objective = objectives.read({"use": "contrast"}, origin="x").build(loss_weight="token")
    with pytest.raises(ConfigError, match="dual_projector"):
        objective.prepare(made.model, made.processor.tokenizer, None)


def test_the_pair_that_sees_the_same_relations_comes_first(tmp_path):
    draw_ = torch.Generator().manual_seed(0)
    points = torch.randn(60, 8, generator=draw_)
    assert cka(points, points @ torch.randn(8, 20, generator=draw_)) > 0.5
    assert abs(cka(points, torch.randn(60, 8, generator=draw_))) < 0.15  # without the usual bias
    joint, apart = two_towers.clip(), two_towers.save_bert(tmp_path / "bert")
    folder = two_towers.save_clip(tmp_path / "clip", joint)
    words = {"use": "embedding", "checkpoint": str(folder)}
    captions = ["".join(chr(97 + (n * k) % 26) for k in range(3, 9)) for n in range(1, 13)]
    pictures = [Image.new("RGB", (32, 32), (n * 20, 255 - n * 20, n * 7)) for n in range(1, 13)]
    rows = list(zip(pictures, captions, strict=True))
    found = rank_pairs({"clip": words}, [str(folder), str(apart)], rows)
    assert {pair.text for pair in found} == {str(folder), str(apart)}
    for pair in found:  # what is ranked is what the vectors say
        said = SentenceConfig(checkpoint=pair.text).load()(captions)
        assert pair.score == pytest.approx(cka(pooled(words, pictures), said))
    assert found[0].score > found[1].score
