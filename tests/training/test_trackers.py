"""W&B and trackio get every number of the log by a word, without a network."""

import json
import struct

import pytest

from mmlm.training import train
from mmlm.training.display import flat
from tests.training.tiny_run import tiny_recipe

_BLOCK = 1 << 15
_BEGINS, _HEAD = 7, 7
_FIRST, _MIDDLE = 2, 3


def logged(out):
    """The numbers of each line of the log, as trackers name them."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        flat({k: v for k, v in row.items() if k != "stage"}, f"{row['stage']}/") for row in rows
    ]


def records(path):
    """The records of a file of W&B: those of LevelDB's log format, behind seven bytes."""
    data, place, whole, found = path.read_bytes(), _BEGINS, b"", []
    while place + _HEAD <= len(data):
        if _BLOCK - place % _BLOCK < _HEAD:
            place += _BLOCK - place % _BLOCK
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + _HEAD : place + _HEAD + size]
        place += _HEAD + size
        if kind not in (_FIRST, _MIDDLE):
            found.append(whole)
            whole = b""
    return found


@pytest.mark.slow
def test_wandb_gets_the_numbers_of_the_log_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = train(tiny_recipe(tmp_path, log_to=["wandb"]), tmp_path / "run", quiet=True)
    (file,) = (result.out / "wandb").glob("offline-run-*/run-*.wandb")
    found = []
    for data in records(file):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            found.append(
                {one.key or "/".join(one.nested_key): json.loads(one.value_json)
                 for one in record.history.item}
            )  # fmt: skip
    rows = logged(result.out)
    assert len(found) == len(rows)
    for ours, theirs in zip(rows, found, strict=True):
        assert ours == {key: pytest.approx(theirs[key]) for key in ours}


@pytest.mark.slow
def test_trackio_gets_the_numbers_of_the_log(tmp_path, monkeypatch):
    # Where it keeps its own is settled when it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    result = train(tiny_recipe(tmp_path, log_to=["trackio"]), tmp_path / "run", quiet=True)
    rows, found = logged(result.out), SQLiteStorage.get_logs("mmlm", "run")
    assert len(found) == len(rows)
    for ours, theirs in zip(rows, found, strict=True):
        assert ours == {key: pytest.approx(theirs[key]) for key in ours}
    assert SQLiteStorage.get_run_config("mmlm", "run")["run"]["log_to"] == ["trackio"]
