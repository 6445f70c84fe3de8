"""When memory runs out, rows are cut, the step is repeated, and the loss is the same."""

import json

import pytest
import torch

from mmlm.errors import TrainingError
from mmlm.training import train
from mmlm.training.checkpoint import last_checkpoint, load_checkpoint
from mmlm.training.objectives import NextToken
from mmlm.training.step import is_out_of_memory
from tests.training.tiny_run import tiny_recipe, write_rows

# Only the order of float32 additions differs.
LOSS_RTOL = 1e-4


def losses(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def run_out_above(monkeypatch, tokens):
    """Let every pass over more than so many tokens fail as an allocator does."""
    loss = NextToken.loss

    def loss_or_fail(self, model, inputs, num_items):
        if inputs["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(self, model, inputs, num_items)

    monkeypatch.setattr(NextToken, "loss", loss_or_fail)


def test_rows_are_cut_and_the_loss_stays(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path, 30)
    recipe = tiny_recipe(tmp_path, row_tokens=128)
    recipe["stages"] = recipe["stages"][:1]
    train(recipe, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        run_out_above(patch, 100)
        train(recipe, tmp_path / "cut")
    assert "memory ran out in step 1: rows are cut into 2 pieces" in capsys.readouterr().err
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert len(whole) == len(cut)
    assert cut == pytest.approx(whole, rel=LOSS_RTOL)
    # A run that goes on does not have to find out again.
    path = last_checkpoint(tmp_path / "cut" / "checkpoints" / "align")
    assert load_checkpoint(path).state["cuts"] >= 1


def test_a_sample_that_does_not_fit_alone_is_an_error_with_the_mend(tmp_path, monkeypatch):
    write_rows(tmp_path, 10)
    recipe = tiny_recipe(tmp_path, row_tokens=128)
    run_out_above(monkeypatch, 0)
    with pytest.raises(TrainingError, match=r"one sample at a time.*gradient_checkpointing"):
        train(recipe, tmp_path / "run", quiet=True)


def test_other_errors_are_no_lack_of_memory():
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
