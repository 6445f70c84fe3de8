"""Weights on disk: whole safetensors files, or an error that names file and mend."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from mmlm.errors import CheckpointError
from mmlm.hub import weights
from mmlm.hub.weights import check_weights, hash_weights, read_state, write_state


def test_tensors_come_back_as_they_were_written(tmp_path):
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    write_state(state, tmp_path)
    again = read_state(tmp_path)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_two_names_of_one_tensor_are_both_written(tmp_path):
    shared = torch.ones(3)
    write_state({"a": shared, "b": shared}, tmp_path)
    assert read_state(tmp_path).keys() == {"a", "b"}


def test_large_weights_are_written_as_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_SIZE", 100)
    write_state({"a": torch.ones(20), "b": torch.zeros(20)}, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 2
    assert read_state(tmp_path).keys() == {"a", "b"}
    next(tmp_path.glob("model-00001*")).unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing: model-00001"):
        read_state(tmp_path)


def test_a_shard_of_another_model_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_SIZE", 100)
    write_state({"a": torch.ones(20), "b": torch.zeros(20)}, tmp_path)
    save_file({"c": torch.ones(2)}, sorted(tmp_path.glob("model-*.safetensors"))[1])
    with pytest.raises(
        CheckpointError, match="promises 1 tensors that no shard holds, such as 'b'"
    ):
        read_state(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 60, 200], ids=lambda n: f"first{n}bytes")
def test_a_file_that_was_cut_off_is_refused(tmp_path, keep):
    write_state({"a": torch.ones(100)}, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors .* is no whole safetensors file"
    ):
        read_state(tmp_path)


def test_a_header_that_claims_terabytes_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        read_state(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin, a pickled file.*safetensors only"
    ):
        read_state(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    index = {"weight_map": {"a": "../other/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="in the same folder"):
        read_state(tmp_path)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="'a' holds values that are not finite"):
        write_state({"a": torch.tensor([1.0, float("nan")])}, tmp_path)


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path):
    write_state({"a": torch.ones(100)}, tmp_path)
    hashes = hash_weights(tmp_path)
    check_weights(tmp_path, hashes)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"sha256 differs.*delete .*mmlm\.json"):
        check_weights(tmp_path, hashes)
