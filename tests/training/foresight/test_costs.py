"""FLOPs are those that torch counts, and a named machine has hours and a price."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmlm.cli import run as mmlm
from mmlm.errors import UsageError
from mmlm.training.foresight.estimate import Work, assumptions, estimate
from mmlm.training.foresight.flops import costs_of
from mmlm.training.foresight.machines import MACHINES, measured_rate, peak_rate, read_hardware
from mmlm.training.memory import MemoryPlan
from tests.tiny import compose_tiny
from tests.training.tiny_run import tiny_recipe

_GIB = 2**30
_PLAN = MemoryPlan(15 * _GIB, 30 * _GIB, 30 * _GIB, 60 * _GIB, 8 * _GIB)
_WORK = Work(
    plan=_PLAN, layer=_GIB // 2, weights=8_000_000_000, learnt=8_000_000_000,
    flops=6 * 8e9 * 262_144, tokens=1e9, step_tokens=262_144, rows=64,
)  # fmt: skip


@pytest.mark.parametrize("learns", ["language", "connector", "vision"])
def test_useful_flops_are_those_that_torch_counts(tmp_path, learns):
    model = compose_tiny(tmp_path).model
    order = ["language", "connector", "vision"]
    chosen = order[: order.index(learns) + 1] if learns != "connector" else ["connector"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f"model.{part}." in name for part in chosen))
    model.train()
    costs = costs_of(model)
    seen = model.model.counter.tokens_per_tile
    length, labels = seen + 4, 3
    ids = torch.randint(1, 200, (1, length))
    ids[0, :seen] = model.config.image_token_id
    wanted = torch.full((1, length), -100)
    wanted[0, -labels:] = ids[0, -labels:]
    side = model.model.counter.side
    with FlopCounterMode(display=False) as counted:
        loss = model(
            input_ids=ids, pixel_values=torch.rand(1, 3, *side), labels=wanted, loss_only=True
        ).loss
        loss.backward()
    sample = type("Sample", (), {"num_tokens": length, "num_labels": labels, "num_tiles": 1})
    # Torch counts no CPU attention, or all of its square; on tokens this few it is a small part.
    assert costs.of([sample], encoded=1) == pytest.approx(counted.get_total_flops(), rel=0.25)


def test_eight_h100_need_sharding_for_a_model_that_one_cannot_hold():
    eight = estimate(_WORK, read_hardware("8xH100"))
    assert (eight.sharding, eight.fits) == ("fsdp2", True)
    assert 0.2 < eight.mfu <= 0.4
    assert eight.cost == pytest.approx(eight.hours * 8 * MACHINES["h100"].price)
    assert eight.steps == round(1e9 / 262_144)
    ideal = _WORK.flops / (8 * 989e12 * 0.4)
    assert eight.step_seconds >= ideal


def test_a_price_and_a_share_of_the_rate_are_the_users():
    dear = estimate(_WORK, read_hardware("8xH100", price=10.0))
    slow = estimate(_WORK, read_hardware("8xH100", price=10.0), reached=0.2)
    assert dear.cost == pytest.approx(dear.hours * 80.0)
    assert slow.hours > 1.5 * dear.hours
    assert "20 % of 989 TFLOP/s" in assumptions(read_hardware("H100"), 0.2)


def test_what_fits_nowhere_is_said():
    alone = estimate(_WORK, read_hardware("L4"))
    assert not alone.fits
    assert "even that does not fit" in alone.lines(read_hardware("L4"))[0]


def test_an_unknown_machine_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'H100'"):
        read_hardware("8xH10")


def test_a_cpu_is_measured_against_its_own_matrix_product():
    rate, source = peak_rate(torch.device("cpu"), torch.float32)
    assert rate == measured_rate("cpu", torch.float32) > 1e8
    assert "measured" in source


def test_a_dry_run_foresees_the_cost_on_a_named_machine(tmp_path, capsys):
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path)))
    words = [str(path), "--dry-run", "--hardware", "8xH100", "--price", "2"]
    assert mmlm(["train", *words]) == 0
    said = capsys.readouterr().out
    assert "on 8x H100  needs ddp" in said
    assert "s a step, MFU" in said
    assert "$2.00 an hour and device" in said
    assert "assumed     40 % of 989 TFLOP/s" in said
