"""The objective `word_units`: a hidden unit of the connector for each answer."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from mmlm.assistant import load
from mmlm.data import open_mixture
from mmlm.data.collate import collate_packed, collate_padded
from mmlm.data.planning import Planner
from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures
from mmlm.training import train
from mmlm.training.channels import channel_dropout, thinned
from mmlm.training.word_units import WordUnitsConfig
from tests.tiny import compose_tiny
from tests.training.tiny_run import tiny_recipe, write_rows

NAMES = (" cat", " a red ball", " tree", " rain", " two dogs", " house")


def write_names(folder):
    path = write_rows(folder, 12)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["answer"] = NAMES[number % len(NAMES)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    write_names(folder)
    tiny = compose_tiny(folder)
    tiny.model.get_input_embeddings().weight.requires_grad_(False)
    mixture = open_mixture("rows.jsonl", folder=folder)
    objective = WordUnitsConfig(list_length=2).build(loss_weight="token")
    objective.prepare(tiny.model, tiny.processor.tokenizer, mixture)
    planner = Planner(mixture, tiny.processor, max_tokens=4096, max_tiles=64)
    return tiny, mixture, objective, [planner.plan(position) for position in range(8)]


def test_the_second_layer_holds_the_embeddings_of_the_answers(scene):
    tiny, _, _, _ = scene
    table = tiny.model.get_input_embeddings().weight.float()
    second = tiny.model.model.connector.layers[2]
    torch.testing.assert_close(second.bias, table.mean(0))
    for unit, name in enumerate(sorted(NAMES)):
        ids = tiny.processor.tokenizer(name, add_special_tokens=False).input_ids
        word = table[ids].mean(0) - table.mean(0)
        found = [
            float(cosine_similarity(word, second.weight[:, n].detach(), 0))
            for n in range(len(NAMES))
        ]
        assert int(np.argmax(found)) == unit
    assert not second.weight[:, len(NAMES) :].any()


def by_hand(tiny, samples, pixels, shift):
    """The definition, picture by picture; also which places a common shift would move."""
    first = tiny.model.model.connector.layers[0]
    names, total = sorted(NAMES), torch.zeros(())
    picture = iter(pixels)
    with_one = [sample for sample in samples if sample.images]
    for sample in with_one:
        features = tiny.model.model.encode_images(next(picture)[None]).values
        units = first(features)[:, : len(names)]
        text = tiny.processor.tokenizer.decode(sample.labels[sample.labels != -100][:-1])
        wanted = names.index(text if text.startswith(" ") else f" {text}")
        total = total - units.mean(0).log_softmax(0)[wanted]
        total = total - units.log_softmax(1)[:, wanted].mean()
        total = total + shift * (units.topk(2, 1).values[:, 1] ** 2).mean()
    return total / len(with_one)


def test_it_is_what_its_definition_says_packed_and_padded(scene):
    tiny, mixture, objective, samples = scene
    count = objective.weigh(samples)[1]
    pixels = torch.cat([pixels_of(tiny, mixture, s) for s in samples if s.images])
    wanted = by_hand(tiny, samples, pixels, 1.0)
    assert count == sum(1 for s in samples if s.images)
    for batch in (collate_packed(samples), collate_padded(samples, pad_id=0)):
        got = objective.loss(tiny.model, {**batch, "pixel_values": pixels}, count)
        # The same sums in another order; a picture left out changes it by more than a tenth.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def pixels_of(tiny, mixture, sample):
    conversation = mixture.sources[0].sample(sample.row).messages
    return tiny.processor.encode_chat(conversation, with_labels=True).pixel_values


def test_the_shift_moves_all_units_alike(scene):
    _, _, objective, _ = scene
    units = torch.randn(5, 6, requires_grad=True)
    objective._above(units, units).sum().backward()
    assert units.grad is not None
    torch.testing.assert_close(units.grad, torch.full((5, 6), 1 / 6))
    torch.testing.assert_close(objective._above(units, units), units.topk(2, 1).values[:, 1])


def test_where_the_list_is_cut_teaches_the_encoder_nothing(scene):
    tiny, mixture, _, samples = scene
    pixels = torch.cat([pixels_of(tiny, mixture, s) for s in samples if s.images])
    gradients = []
    for shift in (0.0, 5.0):
        objective = WordUnitsConfig(list_length=2, shift=shift).build(loss_weight="token")
        objective.prepare(tiny.model, tiny.processor.tokenizer, mixture)
        tiny.model.zero_grad()
        objective.loss(
            tiny.model, {**collate_packed(samples), "pixel_values": pixels}, 4.0
        ).backward()
        parts = (tiny.model.model.vision, tiny.model.model.connector.layers[0])
        gradients.append(
            [torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])
             for part in parts]
        )  # fmt: skip
    (vision, first), (vision_shifted, first_shifted) = gradients
    assert vision.any()
    torch.testing.assert_close(vision, vision_shifted)
    assert not torch.allclose(first, first_shifted)


def test_a_stage_of_it_makes_tokens_that_name_the_picture_and_is_kept(tmp_path):
    write_names(tmp_path)
    stage = {
        "name": "align",
        "learn": ["connector.*"],
        "objective": {"use": "word_units", "list_length": 2},
        "data": str(tmp_path / "rows.jsonl"),
        "until": {"steps": 150},
        "step_tokens": 512,
        "peak_lr": 1e-2,
        "feature_dropout": 0.1,
    }
    done = train(tiny_recipe(tmp_path, stages=[stage]), out=tmp_path / "run", quiet=True)
    (result,) = done.stages
    assert result.last_loss < 0.7 * result.first_loss
    model = load(tmp_path / "run" / "model").model
    second = model.model.connector.layers[2]
    assert not second.weight[:, len(NAMES) :].any()
    assert second.weight[:, : len(NAMES)].any()


def test_more_answers_than_units_are_refused(tmp_path):
    path = write_rows(tmp_path, 12)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tiny = compose_tiny(tmp_path)
    units = tiny.model.model.connector.layers[0].out_features
    many = [{**rows[1], "answer": f" thing {n}"} for n in range(units + 1)]
    path.write_text("\n".join(json.dumps(row) for row in many))
    objective = WordUnitsConfig().build(loss_weight="token")
    tiny.model.get_input_embeddings().weight.requires_grad_(False)
    mixture = open_mixture("rows.jsonl", folder=tmp_path)
    with pytest.raises(ConfigError, match=f"has {units}; the data hold {units + 1} answers"):
        objective.prepare(tiny.model, tiny.processor.tokenizer, mixture)


@pytest.mark.parametrize(
    ("connector", "learns", "words"),
    [({"use": "linear"}, False, "depth: 2"), ({"use": "mlp"}, True, "must stand still")],
)
def test_what_it_cannot_work_with_is_named(tmp_path, connector, learns, words):
    write_names(tmp_path)
    tiny = compose_tiny(tmp_path, connector=connector)
    tiny.model.get_input_embeddings().weight.requires_grad_(learns)
    objective = WordUnitsConfig(list_length=2).build(loss_weight="token")
    mixture = open_mixture("rows.jsonl", folder=tmp_path)
    with pytest.raises(ConfigError, match=words):
        objective.prepare(tiny.model, tiny.processor.tokenizer, mixture)


def test_channels_are_left_out_for_a_whole_item_and_the_mean_stays():
    grids = (Grid(1, 2, 2), Grid(1, 1, 3))
    features = VisionFeatures(torch.ones(7, 4000), grids)
    torch.manual_seed(0)
    values = thinned(features, 0.9)
    for item in (values[:4], values[4:]):
        assert (item == item[0]).all()
        kept = item[0][item[0] > 0]
        assert len(kept.unique()) == 1
        # Of 4,000 channels the mean is off by at most 5 % here.
        assert float(item.mean()) == pytest.approx(1.0, rel=0.1)
    assert float((values[0] == 0).float().mean()) != float((values[4] == 0).float().mean())


def test_channels_are_left_out_only_while_something_learns():
    seen = []
    connector = torch.nn.Linear(3, 3)
    connector.forward = lambda features: seen.append(features.values) or features
    features = VisionFeatures(torch.ones(4, 3), (Grid(1, 2, 2),))
    torch.manual_seed(1)
    with channel_dropout(connector, 0.9):
        with torch.no_grad():
            connector(features)
        for _ in range(5):
            connector(features)
    connector(features)
    assert [bool((values == 1).all()) for values in (seen[0], seen[-1])] == [True, True]
    assert not all(bool((values == 1).all()) for values in seen[1:-1])
