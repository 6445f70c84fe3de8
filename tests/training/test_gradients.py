"""The same samples give the same gradients, however they are cut into rows."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmlm.data import open_mixture
from mmlm.data.pipeline import PreparedRow
from mmlm.data.planning import Planned, Planner
from mmlm.modeling import SEGMENTS
from mmlm.training.attention import choose_attention, prove_isolation, set_attention
from mmlm.training.batches import Batcher
from mmlm.training.learning import freeze
from mmlm.training.objectives import NextToken
from mmlm.training.optim import MasterAdamW
from mmlm.training.parallel import Engine
from mmlm.training.recipe import RunConfig
from tests.tiny import compose_tiny
from tests.training.tiny_run import write_rows

# Only the order of float32 additions differs. The largest relative difference seen over all
# cuts is 7e-7; without restarting positions or with one row's own normalisation it is above 0.1.
RTOL = 2e-5
ALONE = Engine(RunConfig(device="cpu"))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("scene")
    write_rows(folder, 8)
    assistant = compose_tiny(folder)
    mixture = open_mixture("rows.jsonl", folder=folder)
    planner = Planner(mixture, assistant.processor, max_tokens=4096, max_tiles=64)
    samples = [planner.plan(position) for position in range(8)]
    assert all(isinstance(sample, Planned) for sample in samples)
    freeze(assistant.model, {"connector.*": 1.0, "language.*": 1.0})
    return assistant, samples


def gradients(scene, cut, *, packed, loss_weight="token"):
    """Return the gradients of one step whose rows hold so many samples each."""
    assistant, samples = scene
    set_attention(assistant.model, SEGMENTS if packed else "sdpa")
    device = torch.device("cpu")
    batcher = Batcher(
        assistant.model, assistant.processor, packed=packed, cache=None, device=device
    )
    objective = NextToken(loss_weight)
    waiting = list(samples)
    rows = []
    for count in cut:
        mine, waiting = waiting[:count], waiting[count:]
        rows.append(PreparedRow(mine, [batcher.pixels(i) for s in mine for i in s.images]))
    weighed = [objective.weigh(row.samples) for row in rows]
    num_items = sum(count for _, count in weighed)
    assistant.model.zero_grad()
    total = 0.0
    for row, (factors, _) in zip(rows, weighed, strict=True):
        loss = objective.loss(assistant.model, batcher.inputs(row, factors), num_items)
        loss.backward()
        total += float(loss.detach())
    found = {n: p.grad.clone() for n, p in assistant.model.named_parameters() if p.grad is not None}
    return total, found


CUTS = {"1x8": [8], "2x4": [4, 4], "8x1": [1] * 8, "uneven": [1, 5, 2]}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("cut", "loss_weight"),
    [*((cut, "token") for cut in CUTS.values()), (CUTS["uneven"], "sample"), (CUTS["2x4"], "sqrt")],
    ids=[*CUTS, "uneven by sample", "2x4 by root"],
)
def test_rows_change_neither_loss_nor_gradients(scene, cut, packed, loss_weight):
    loss, found = gradients(scene, cut, packed=packed, loss_weight=loss_weight)
    wanted_loss, wanted = gradients(scene, [1] * 8, packed=False, loss_weight=loss_weight)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=RTOL * scale, msg=name)


def test_sample_weighting_is_the_mean_of_the_samples_own_losses(scene):
    assistant, samples = scene
    alone = [gradients(([assistant][0], [s]), [1], packed=False)[0] for s in samples]
    together, _ = gradients(scene, [8], packed=True, loss_weight="sample")
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def test_bf16_copies_add_up_gradients_in_float32():
    layer = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    optimizer = MasterAdamW(
        [("model.connector.weight", layer.weight)],
        engine=ALONE,
        rates={"model.connector.weight": 1e-5},
        masters={},
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    for _ in range(1000):
        optimizer.backward((layer.weight * 0.01).sum())
    # In bfloat16 the sum would stop growing at 256 times the summand.
    expected = 1000 * float(torch.tensor(0.01, dtype=torch.bfloat16))
    assert float(optimizer.learnables[0].master.grad[0, 0]) == pytest.approx(expected, rel=1e-4)


def test_small_updates_are_kept_beside_bf16_weights():
    layer = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(layer.weight)
    name = "model.connector.weight"
    optimizer = MasterAdamW(
        [(name, layer.weight)], engine=ALONE, rates={name: 1e-4}, masters={}, betas=(0.9, 0.99),
        weight_decay=0.0,
    )  # fmt: skip
    for _ in range(100):
        optimizer.backward(layer.weight.sum())
        optimizer.step(1.0, None, may_move=True)
    # 100 steps of 1e-4; one such step is below the spacing of bfloat16 near one (0.0039).
    assert layer.weight[0, 0].item() == pytest.approx(0.99, abs=0.004)


def test_our_adamw_is_torchs_in_float32():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    names = {f"model.connector.{n}": p for n, p in ours.named_parameters()}
    optimizer = MasterAdamW(
        names.items(), engine=ALONE, rates=dict.fromkeys(names, 1e-2), masters={},
        betas=(0.9, 0.95), weight_decay=0.1,
    )  # fmt: skip
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.weight], "weight_decay": 0.1},
            {"params": [theirs.bias], "weight_decay": 0.0},
        ],
        lr=1e-2, betas=(0.9, 0.95),
    )  # fmt: skip
    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for layer in (ours, theirs):
            layer(x).square().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        norm, moved = optimizer.step(1.0, 0.5, may_move=True)
        assert moved
        assert norm == pytest.approx(float(expected), rel=1e-6)
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.fixture
def leaky():
    """An attention that is causal over the whole row: the samples see each other."""

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("leaky", attend)
    return "leaky"


def test_the_proof_of_isolation_holds_and_finds_a_leak(scene, leaky):
    assistant, _ = scene
    choice = choose_attention(assistant.model, RunConfig(), torch.device("cpu"))
    assert choice.packed
    assert prove_isolation(assistant.model).holds
    set_attention(assistant.model, leaky)
    assert not prove_isolation(assistant.model).holds


def test_a_model_that_leaks_is_padded_with_the_reason(scene, leaky):
    assistant, _ = scene
    choice = choose_attention(assistant.model, RunConfig(attention=leaky), torch.device("cpu"))
    assert not choice.packed
    assert "see each other" in choice.reason


def test_the_planner_leaves_the_processor_as_it_was(scene):
    assistant, samples = scene
    again = copy.deepcopy(assistant.processor)
    assert again.chat.stop_ids == assistant.processor.chat.stop_ids
    assert samples[0].labels[0] == -100
