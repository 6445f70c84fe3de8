"""Evaluation of a real tiny model: the same answers as one by one, cached features, likelihoods."""

from __future__ import annotations

import json

import pytest
import torch

from mmlm.errors import EvaluationError
from mmlm.evaluation import evaluate, load_benchmark
from mmlm.evaluation.asking.answers import fingerprint
from mmlm.evaluation.asking.backend import LocalBackend
from mmlm.evaluation.benchmarks.conditions import cases
from mmlm.evaluation.probes.nearest import NearestNeighbour, remember
from mmlm.generation import GenerationSettings
from tests.tiny import compose_tiny, save_vision


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def benchmark(colours):
    file = colours / "colours.yaml"
    file.write_text(file.read_text() + "generate: {max_new_tokens: 6}\n")
    return load_benchmark(file)


def test_batched_answers_with_kept_features_equal_single_ones(tiny, benchmark):
    found = [
        case
        for condition in ("image", "blind", "shuffled")
        for case in cases(benchmark, condition, benchmark.items[:4], seed=0)
    ]
    settings = GenerationSettings(max_new_tokens=6)

    batched = LocalBackend(tiny).answer(found, settings)
    single = [tiny.answer(case.prompt, case.images, max_new_tokens=6) for case in found]
    assert batched == single
    assert len(set(batched)) > 1


def test_a_model_whose_connector_reads_several_layers_answers_as_one_by_one(tmp_path, benchmark):
    checkpoint = str(save_vision(tmp_path / "clip"))
    made = compose_tiny(
        tmp_path,
        eye={"use": "hf", "checkpoint": checkpoint, "layers": [0, 1]},
        connector={"use": "deepstack", "layers": 2, "start": 0, "depth": 1},
    )
    found = cases(benchmark, "image", benchmark.items[:3], seed=0)
    batched = LocalBackend(made).answer(found, GenerationSettings(max_new_tokens=4))
    assert batched == [made.answer(case.prompt, case.images, max_new_tokens=4) for case in found]


def test_each_picture_goes_through_the_encoder_once(tiny, benchmark, monkeypatch):
    encoded = []
    whole = tiny.model.model.encode_images
    count = lambda pixels: encoded.append(len(pixels)) or whole(pixels)  # noqa: E731
    monkeypatch.setattr(tiny.model.model, "encode_images", count)
    backend, settings = LocalBackend(tiny), GenerationSettings(max_new_tokens=1)
    for condition in ("image", "shuffled"):
        backend.answer(cases(benchmark, condition, benchmark.items, seed=0), settings)
    assert sum(encoded) == len({item.image_keys for item in benchmark.items})


def test_a_small_budget_for_features_changes_no_answer(tiny, benchmark):
    found = cases(benchmark, "image", benchmark.items[:6], seed=0)
    settings = GenerationSettings(max_new_tokens=4)

    assert LocalBackend(tiny, budget_bytes=1).answer(found, settings) == LocalBackend(tiny).answer(
        found, settings
    )


def test_an_evaluation_writes_every_file_and_the_nearest_neighbour(
    tiny, benchmark, colours, tmp_path
):
    memory = remember(colours / "rows.jsonl")
    out = tmp_path / "out"
    result = evaluate(tiny, benchmark, out, quiet=True, extra=[NearestNeighbour(memory)])

    assert {path.name for path in out.iterdir()} == {
        "answers.jsonl", "predictions.jsonl", "results.json", "details.json", "report.html",
        "contact_sheet.png",
    }  # fmt: skip
    # The held-out pictures are the remembered ones here, so the neighbour is always right.
    assert result.score("colours", "choice", "nearest_neighbour").score == 1.0
    assert "nearest neighbour" in str(result)


@pytest.mark.parametrize("shared", [True, False])
def test_likelihoods_equal_the_loss_of_each_choice(tiny, benchmark, monkeypatch, shared):
    from mmlm.messages import assistant, user

    items = [item for item in benchmark.items if item.kind == "choice"][:3]
    found = [
        case
        for condition in ("image", "blind", "shuffled")
        for case in cases(benchmark, condition, items, seed=0)
    ]
    found[1] = found[1]._replace(prompt=found[1].prompt + " Look twice before you answer.")
    backend = LocalBackend(tiny)
    monkeypatch.setattr(backend._shared, "_can", shared)

    for case, values in zip(found, backend.likelihoods(found), strict=True):
        for choice, value in zip(case.choices, values, strict=True):
            talk = [user(case.prompt, case.images), assistant(choice)]
            row = tiny.processor.encode_chat(talk, with_labels=True)
            with torch.no_grad():
                loss = tiny.model(
                    input_ids=torch.tensor([row.ids]),
                    pixel_values=row.pixel_values,
                    labels=torch.tensor([row.labels]),
                ).loss
            # Worst seen 4e-6: padding changes the order of additions.
            assert value == pytest.approx(-float(loss), abs=1e-4)


def test_a_choice_can_be_decided_by_likelihood(tiny, colours, tmp_path):
    file = colours / "colours.yaml"
    text = file.read_text().replace("path: rows.jsonl", "path: rows.jsonl, where: {kind: choice}")
    file.write_text(text + "decide: likelihood\n")

    result = evaluate(tiny, file, tmp_path / "out", quiet=True, conditions=("image",))
    assert result.score("colours", "choice").parse_fail_rate == 0.0
    line = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    assert len(line["likelihoods"]) == 4


def test_logits_that_are_no_numbers_stop_the_run(tmp_path, colours):
    broken = compose_tiny(tmp_path)
    broken.model.lm_head.weight.data[3] = float("nan")
    file = colours / "colours.yaml"

    with pytest.raises(EvaluationError, match="not numbers"):
        evaluate(broken, file, tmp_path / "out", quiet=True)
    file.write_text(
        file.read_text().replace("rows.jsonl", "rows.jsonl, where: {kind: choice}")
        + "decide: likelihood\n"
    )
    with pytest.raises(EvaluationError, match="not numbers"):
        evaluate(broken, file, tmp_path / "out", quiet=True)


def test_a_picture_that_cannot_be_opened_stops_the_run_and_is_named(tiny, colours, tmp_path):
    whole = (colours / "3.png").read_bytes()
    (colours / "3.png").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(EvaluationError, match=r"cannot be shown: .*3\.png"):
        evaluate(tiny, colours / "colours.yaml", tmp_path / "out", quiet=True)


class TestTheFingerprintOfAModel:
    def test_is_the_same_twice(self, tiny):
        assert fingerprint(tiny) == fingerprint(tiny)

    def test_changes_with_one_weight(self, tmp_path):
        model = compose_tiny(tmp_path)
        before = fingerprint(model)
        model.model.lm_head.weight.data[0, 0] += 1e-3
        assert fingerprint(model) != before

    def test_changes_with_the_chat_template(self, tmp_path):
        model = compose_tiny(tmp_path)
        before = fingerprint(model)
        model.processor.chat.template += " "
        assert fingerprint(model) != before
