"""Features on disk come back bit for bit, for the right picture, within their space."""

import multiprocessing

import pytest
import torch

from mmlm.features import Grid, VisionFeatures
from mmlm.training.feature_cache import FeatureCache, ImageKeys, weights_key
from tests.tiny import picture


def open_cache(folder, most_bytes=1 << 20):
    return FeatureCache(folder, width=8, dtype=torch.bfloat16, most_bytes=most_bytes)


def features(seed, tokens=4):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, 8, generator=draw).bfloat16()
    return VisionFeatures(values, (Grid(1, 2, tokens // 2),))


def test_what_was_added_comes_back_bit_for_bit(tmp_path):
    first = open_cache(tmp_path)
    first.add([("a", features(1)), ("b", features(2, tokens=6))])
    first.close()
    again = open_cache(tmp_path)
    for key, wanted in (("a", features(1)), ("b", features(2, tokens=6))):
        found = again.get(key)
        assert torch.equal(found.values, wanted.values)
        assert found.grids == wanted.grids
    assert again.get("c") is None


@pytest.mark.parametrize("broken", ["part-0000.data", "part-0000.index"])
def test_a_file_that_was_cut_loses_its_last_picture_and_no_other(tmp_path, broken):
    first = open_cache(tmp_path)
    first.add([("a", features(1))])
    first.add([("b", features(2))])
    first.close()
    path = tmp_path / broken
    path.write_bytes(path.read_bytes()[:-3])
    again = open_cache(tmp_path)
    assert torch.equal(again.get("a").values, features(1).values)
    assert again.get("b") is None
    again.add([("b", features(2))])
    again.close()
    assert torch.equal(open_cache(tmp_path).get("b").values, features(2).values)


def test_a_flipped_bit_is_no_feature(tmp_path):
    first = open_cache(tmp_path)
    first.add([("a", features(1))])
    first.close()
    path = tmp_path / "part-0000.data"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert open_cache(tmp_path).get("a") is None


def test_all_writers_together_keep_within_the_space(tmp_path):
    most = 1500
    caches = [open_cache(tmp_path, most) for _ in range(3)]
    for number in range(30):
        caches[number % 3].add([(str(number), features(number))])
    assert caches[0].num_bytes() <= most
    assert caches[0].num_bytes() > most - 3 * 128
    for cache in caches:
        cache.close()
    kept = open_cache(tmp_path, most)
    assert 0 < len(kept) < 30


def _write(folder, rank):
    cache = open_cache(folder)
    for number in range(40):
        cache.add([(f"{rank}-{number}", features(100 * rank + number))])
    cache.close()


def test_ranks_that_write_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_write, args=(tmp_path, rank)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    cache = open_cache(tmp_path)
    assert len(cache) == 120
    for rank in range(3):
        for number in (0, 39):
            found = cache.get(f"{rank}-{number}")
            assert torch.equal(found.values, features(100 * rank + number).values)


def test_other_weights_or_preprocessing_are_another_folder():
    torch.manual_seed(0)
    encoder = torch.nn.Linear(3, 3)
    before = weights_key(encoder.state_dict(), {"side": 224})
    assert weights_key(encoder.state_dict(), {"side": 224}) == before
    assert weights_key(encoder.state_dict(), {"side": 384}) != before
    with torch.no_grad():
        encoder.weight[0, 0] += 1e-6
    assert weights_key(encoder.state_dict(), {"side": 224}) != before


def test_a_picture_is_known_by_its_bytes_and_not_by_its_name(tmp_path):
    picture(1).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    picture(2).save(tmp_path / "c.png")
    keys = ImageKeys()
    one, same, other = (keys.of(str(tmp_path / f"{name}.png")) for name in "abc")
    assert one == same != other
    picture(3).save(tmp_path / "a.png")
    assert ImageKeys().of(str(tmp_path / "a.png")) != one
    assert keys.of(picture(1)) != keys.of(picture(1, height=56, width=40))
