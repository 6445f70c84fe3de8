"""A stream is split among ranks by shards; together they read each row once, and go on exactly."""

import json
import threading

import pytest

from mmlm.data import Mixture, PackingConfig, Share, open_mixture
from mmlm.data.pipeline import StepStream
from mmlm.data.planning import Planner
from mmlm.data.ranks import steps_of_rank
from mmlm.errors import DataError, TrainingError
from tests.data.made import answer, open_source, png, write_lines, write_tar, write_tars
from tests.tiny import compose_tiny

WORDS = {"use": "webdataset", "path": "tars", "window": 4, "shards_at_once": 2}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    eye = {"use": "patches", "patch_px": 8, "side_px": 16}
    return compose_tiny(tmp_path_factory.mktemp("model"), vision="patches", eye=eye).processor


class Ranks:
    """As many threads as there are ranks, whose lists are joined as processes would join them."""

    def __init__(self, world):
        self.world = world
        self.barrier = threading.Barrier(world, timeout=60)
        self.slots = [None] * world

    def gather(self, rank):
        def joined(values):
            self.slots[rank] = values
            self.barrier.wait()
            found = [value for one in self.slots for value in one]
            self.barrier.wait()
            return found

        return joined

    def run(self, work):
        found = [None] * self.world
        faults = []

        def one(rank):
            try:
                found[rank] = work(rank, self.gather(rank))
            except BaseException as error:
                faults.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]
        return found


def steps(folder, processor, words, *, world, samples, state=None):
    """The steps of every rank."""

    def make(mixture, **settings):
        packing = PackingConfig(row_tokens=256, pool_samples=3)
        planner = Planner(mixture, processor, max_tokens=256, max_tiles=64)
        pixels = processor.image_processor.pixels
        return StepStream(planner, packing, pixels=lambda i: ("", pixels(i)), **settings)

    def work(rank, gather):
        mixture = open_mixture(words, folder=folder, seed=2)
        return list(
            steps_of_rank(
                make, mixture, rows_per_step=2 * world, num_samples=samples, rank=rank,
                world=world, state=state, gather=gather,
            )
        )  # fmt: skip

    return Ranks(world).run(work)


def used(ranks):
    return [s.id for found in ranks for step in found for row in step.rows for s in row.samples]


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_together_read_every_row_once(tmp_path, processor, world):
    write_tars(tmp_path / "tars", [5, 9, 4, 7, 6])
    found = steps(tmp_path, processor, [WORDS], world=world, samples=31)
    assert sorted(used(found)) == sorted(f"{n:06d}" for n in range(31))
    shards = [{s.id for step in own for row in step.rows for s in row.samples} for own in found]
    assert all(not one & other for one in shards for other in shards if one is not other)


def test_every_rank_counts_the_same_and_the_sum_of_all(tmp_path, processor):
    write_tars(tmp_path / "tars", [5, 9, 4, 7])
    write_tar(tmp_path / "tars" / "004.tar", {"a.png": b"broken", "a.txt": "A."})
    first, second = steps(tmp_path, processor, [WORDS], world=2, samples=26)
    told = ("num_rows", "num_samples", "num_tokens", "num_seen", "consumed", "state")
    assert [[getattr(s, name) for name in told] for s in first] == [
        [getattr(s, name) for name in told] for s in second
    ]
    assert sum(step.num_samples for step in first) == len(used([first, second])) == 25
    assert first[-1].consumed == 26
    planned = [d.cause for step in first for d in step.drops]
    assert planned == [d.cause for step in second for d in step.drops] == ["bad_image"]


def test_streams_on_two_ranks_go_on_exactly_from_any_step(tmp_path, processor):
    write_tars(tmp_path / "tars", [5, 9, 4, 7])
    write_lines(tmp_path / "a.jsonl", [{"question": "a", "answer": str(n)} for n in range(9)])
    words = [WORDS, "a.jsonl"]
    whole = steps(tmp_path, processor, words, world=2, samples=50)
    assert len(whole[0]) > 2
    for cut in range(len(whole[0]) - 1):
        state = json.loads(json.dumps(whole[0][cut].state))
        rest = steps(tmp_path, processor, words, world=2, samples=50, state=state)
        for rank in range(2):
            assert ids(rest[rank]) == ids(whole[rank][cut + 1 :])
            assert [s.state for s in rest[rank]] == [s.state for s in whole[rank][cut + 1 :]]


def ids(found):
    return [[s.id for row in step.rows for s in row.samples] for step in found]


def test_another_number_of_ranks_is_refused_and_not_guessed(tmp_path, processor):
    write_tars(tmp_path / "tars", [5, 9, 4])
    state = steps(tmp_path, processor, [WORDS], world=2, samples=18)[0][0].state
    with pytest.raises(TrainingError, match=r"2 ranks .* with 3"):
        steps(tmp_path, processor, [WORDS], world=3, samples=18, state=state)
    with pytest.raises(TrainingError, match=r"2 ranks .* with 1"):
        steps(tmp_path, processor, [WORDS], world=1, samples=18, state=state)


def test_indexed_sources_and_streams_that_are_not_split_are_dealt_out_as_before(
    tmp_path, processor
):
    write_tars(tmp_path / "tars", [5, 6])
    write_lines(tmp_path / "a.jsonl", [{"question": "a", "answer": str(n)} for n in range(12)])
    for words in ([{**WORDS, "split_ranks": False}], ["a.jsonl"]):
        alone = used(steps(tmp_path, processor, words, world=1, samples=11))
        both = used(steps(tmp_path, processor, words, world=2, samples=11))
        assert sorted(alone) == sorted(both)


def test_too_few_shards_for_the_readers_say_so(tmp_path, processor):
    write_tars(tmp_path / "tars", [5, 6])
    with pytest.raises(DataError, match=r"2 shards, too few for 3 .* split_ranks: false"):
        steps(tmp_path, processor, [WORDS], world=3, samples=11)


def test_parts_of_parts_are_workers_of_ranks(tmp_path):
    write_tars(tmp_path / "tars", [3, 2, 4, 1])
    mixture = Mixture([(open_source(tmp_path, **WORDS), Share())], shuffle=False)
    parts = [mixture.part(rank, 2).part(worker, 2) for rank in range(2) for worker in range(2)]
    found = [answer(part.sources[0], row) for part in parts for row in range(part.epoch_rows)]
    assert sorted(found) == sorted(f"number {n}" for n in range(10))


def test_rows_of_a_shard_list_without_counts_are_shared_out_by_shards(tmp_path):
    write_tars(tmp_path / "tars", [3, 3, 3])
    source = open_source(tmp_path, **{**WORDS, "rows": 90})
    assert [len(source.part(number, 2)) for number in range(2)] == [60, 30]


def test_parts_of_parquet_streams_read_their_own_files(tmp_path):
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "shards").mkdir()
    for index in range(4):
        rows = [{"image": {"bytes": png(n), "path": None}, "answer": f"number {n}"}
                for n in range(3 * index, 3 * index + 3)]  # fmt: skip
        file = tmp_path / "shards" / f"train-{index:05d}-of-00004.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
    source = open_source(tmp_path, use="hub", repo="shards", window=2)
    parts = [source.part(number, 2) for number in range(2)]
    found = [[answer(part, row) for row in range(len(part))] for part in parts]
    assert [len(one) for one in found] == [6, 6]
    assert sorted(found[0] + found[1]) == sorted(f"number {n}" for n in range(12))
