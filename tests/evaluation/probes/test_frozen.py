"""Probes of frozen parts: linear maps find what is in the features, and nothing that is not."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest
import torch

from mmlm.assistant import load
from mmlm.evaluation import load_benchmark
from mmlm.evaluation.asking.backend import LocalBackend
from mmlm.evaluation.probes.alignment import align_by_layer, mutual_neighbours
from mmlm.evaluation.probes.frozen import (
    covered,
    draw_disc,
    one_each,
    probe_all,
    probe_kinds,
    probe_places,
    probe_tables,
)
from mmlm.features import Grid, VisionFeatures
from tests.evaluation.conftest import THINGS, write_rows
from tests.tiny import compose_tiny
from tests.whole.families import save_family

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    from PIL import Image

    folder, rows = tmp_path_factory.mktemp("colours"), []
    for number in range(36):
        thing = THINGS[number % len(THINGS)]
        Image.new("RGB", (8 + number, 8), thing).save(folder / f"{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "thing": thing,
                     "question": f"Which colour has {number}?", "answer": thing})  # fmt: skip
    write_rows(folder, rows)
    (folder / "colours.yaml").write_text("dataset: {path: rows.jsonl}\n")
    return load_benchmark(folder / "colours.yaml")


class Sees(LocalBackend):
    """A backend whose features say what `show` wants of a picture."""

    def __init__(self, tiny, show):
        super().__init__(tiny)
        self._show = show

    def features(self, images, keys):
        return [self._show(image, key) for image, key in zip(images, keys, strict=True)]


def noise(key):
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(crc32(key.encode())))


def test_kinds_are_found_by_an_encoder_that_sees_and_by_no_other(tiny, benchmark):
    items = one_each(benchmark.items)
    seen = probe_kinds(LocalBackend(tiny), "colours", items, seed=0)
    assert seen.score > 0.9  # one colour a kind, in a random tower's features
    blind = Sees(tiny, lambda image, key: VisionFeatures(noise(key), (Grid(1, 8, 8),)))
    guessed = probe_kinds(blind, "colours", items, seed=0)
    assert guessed.low < 0.4 < seen.low


def test_places_are_found_in_features_that_hold_them(tiny):
    pictures = {}

    def where(image, key):
        number = int(key.split()[-1])
        inside = torch.tensor(covered(draw_disc(number), Grid(1, 8, 8))).float()
        pictures[key] = image
        return VisionFeatures(torch.stack([inside, -inside], dim=1) + 0.1 * noise(key)[:, :2],
                              (Grid(1, 8, 8),))  # fmt: skip

    found = probe_places(Sees(tiny, where))
    assert found.low > 0.95
    blind = Sees(tiny, lambda image, key: VisionFeatures(noise(key), (Grid(1, 8, 8),)))
    assert probe_places(blind).score == pytest.approx(0.5, abs=0.06)
    assert len(pictures) == 96


def test_a_disc_covers_the_patches_in_its_middle():
    drawn = draw_disc(3)
    inside = covered(drawn, Grid(1, 16, 16)).reshape(16, 16)
    middle = (drawn.left + drawn.size / 2, drawn.top + drawn.size / 2)
    assert inside[int(16 * middle[1]), int(16 * middle[0])]
    assert inside.mean() == pytest.approx(np.pi * (drawn.size / 2) ** 2, abs=0.03)
    assert draw_disc(3).image.tobytes() == drawn.image.tobytes()


def test_equal_neighbours_align_and_strangers_do_as_chance_says():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(100, 16, generator=draw)
    turned = features @ torch.linalg.qr(torch.randn(16, 16, generator=draw))[0]
    assert mutual_neighbours(features, turned, 10) == pytest.approx(1.0)
    strangers = torch.randn(100, 16, generator=draw)
    # 100 rows of 10 neighbours: the spread of the mean is about 0.01.
    assert mutual_neighbours(features, strangers, 10) == pytest.approx(10 / 99, abs=0.04)


def test_every_layer_of_the_language_model_has_an_alignment(tiny, benchmark):
    found = align_by_layer(LocalBackend(tiny), "colours", one_each(benchmark.items)[:12])
    assert [each.layer for each in found] == [0, 1, 2]
    assert all(0 <= each.score <= 1 and each.n == 12 for each in found)


def test_what_cannot_be_probed_is_said(tiny, colours):
    found = probe_all(tiny, [load_benchmark(colours / "colours.yaml")], most=6)
    assert any("fewer than two kinds" in text for text in found.left_out)
    assert [each.probe for each in found.encoder] == ["places"]
    assert probe_tables(found)[0].row_count == 1


def test_a_stock_class_taken_whole_shows_its_layers_too(tmp_path, benchmark):
    whole = load(save_family(tmp_path / "qwen2_vl", "qwen2_vl"), device="cpu", whole=True)
    found = probe_all(whole, [benchmark], most=12)
    assert found.encoder == ()
    assert "does not show it" in found.left_out[0]
    layers = whole.model.config.get_text_config().num_hidden_layers
    assert [each.layer for each in found.alignment] == list(range(layers + 1))
    assert all(0 <= each.score <= 1 for each in found.alignment)
