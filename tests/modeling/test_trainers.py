"""Under HF Trainer and TRL the model behaves like a stock class."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from mmlm.data.collate import MMLMCollator
from tests.tiny import compose_tiny, picture

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


@pytest.fixture
def tiny(tmp_path):
    return compose_tiny(tmp_path)


def quiet(folder, **more):
    return dict(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
        seed=0, data_seed=0, remove_unused_columns=False, **more,
    )  # fmt: skip


def changed(before, model):
    return {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_trainer_trains_it(tiny, tmp_path):
    rows = [
        {
            "messages": [*PROMPT, {"role": "assistant", "content": f"Number {n}."}],
            "image": picture(n),
        }
        for n in range(4)
    ]
    before = snapshot(tiny.model)
    trainer = Trainer(
        model=tiny.model,
        args=TrainingArguments(**quiet(tmp_path / "out", gradient_accumulation_steps=2)),
        train_dataset=rows,
        data_collator=MMLMCollator(tiny.processor),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert {tiny.model.part_of(n) for n in changed(before, tiny.model)} >= {
        "vision",
        "connector",
        "language",
    }


def rows_for_trl(prompted: bool) -> Dataset:
    def answer(text):
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    rows = []
    for n in range(4):
        row = {"images": [picture(n)]}
        if prompted:
            row |= {"prompt": PROMPT, "chosen": answer(f"Yes {n}."), "rejected": answer("No.")}
        else:
            row |= {"messages": PROMPT + answer(f"Number {n}.")}
        rows.append(row)
    return Dataset.from_list(rows)


def test_sft_trainer_trains_it(tiny, tmp_path):
    from trl import SFTConfig, SFTTrainer

    before = snapshot(tiny.model)
    trainer = SFTTrainer(
        model=tiny.model,
        args=SFTConfig(**quiet(tmp_path / "out"), max_length=None),
        train_dataset=rows_for_trl(prompted=False),
        processing_class=tiny.processor,
    )
    trainer.train()
    assert any(name.startswith("model.connector") for name in changed(before, tiny.model))


def test_dpo_trainer_trains_it(tiny, tmp_path):
    from trl import DPOConfig, DPOTrainer

    # TRL reads the reference model from where the trained one came from.
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    before = snapshot(tiny.model)
    trainer = DPOTrainer(
        model=tiny.model,
        args=DPOConfig(**quiet(tmp_path / "out"), max_length=None),
        train_dataset=rows_for_trl(prompted=True),
        processing_class=tiny.processor,
    )
    trainer.train()
    assert any(name.startswith("model.connector") for name in changed(before, tiny.model))
