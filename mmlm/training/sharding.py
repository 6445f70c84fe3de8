"""Spreads a model over ranks with FSDP2, and builds the optimiser that goes with each sharding.

FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers the weights of one layer at a time, and
adds up its gradients as soon as they are there. A layer is a member of the longest list of
modules in each part. What a pass calls a number of times that differs from rank to rank is
gathered once, for the whole pass. An encoder that stands still while its features are cached runs a
different number of times on each rank; it is not spread. Each rank builds the whole model on
the CPU and keeps its pieces of it, one layer after another, on its device.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mmlm.errors import TrainingError
from mmlm.training.depth import with_layer_decay
from mmlm.training.learning import matching, public_name
from mmlm.training.objectives import Objective
from mmlm.training.optim import MasterAdamW, Optimizer
from mmlm.whole import WholeModel

if TYPE_CHECKING:
    from mmlm.training.parallel import Engine
    from mmlm.training.recipe import StageConfig
    from mmlm.training.shared import Run


def build_optimizer(run: Run, stage: StageConfig, *, vision_stands_aside: bool) -> Optimizer:
    """Spread the model as the engine says, and return what moves its weights.

    Args:
        run: What the stages share; its model is frozen as the stage says.
        stage: What learns, and how fast.
        vision_stands_aside: Whether the encoder is frozen and its features are cached.
    """
    model: Any = run.assistant.model
    chosen = matching(model, stage.patterns)
    rates = {n: stage.patterns.get(pattern, stage.peak_lr) for n, pattern in chosen.items()}
    rates = with_layer_decay(rates, {n: public_name(n) for n in rates}, stage.layer_decay)
    if run.engine.in_step and stage.optimizer != "adamw":
        raise TrainingError(
            f"stages.{stage.name}.optimizer {stage.optimizer} is not proven where moments are "
            f"spread over processes by run.sharding {run.engine.sharding}, which saves as much. "
            f"Use optimizer: adamw."
        )
    if run.engine.is_zero:
        from mmlm.training.zero import DeepSpeedAdamW

        return DeepSpeedAdamW(run, stage, rates, vision_stands_aside=vision_stands_aside)
    if run.engine.shards_weights:
        spread(model, run.engine, aside=model.model.vision if vision_stands_aside else None)
    return MasterAdamW(
        [(name, p) for name, p in model.named_parameters() if name in chosen],
        engine=run.engine,
        rates=rates,
        masters=run.masters,
        betas=stage.betas,
        weight_decay=stage.weight_decay,
        keep_copies=run.precision.keep_copies,
        kind=stage.optimizer,
    )


def check_objective(objective: Objective, run: Run, stage: StageConfig) -> None:
    """Refuse what does not run the whole model in one pass, where ranks have to stay in step.

    Raises:
        TrainingError: naming the mend.
    """
    engine, name = run.engine, stage.objective.get("use")
    if engine.in_step and not objective.in_step:
        raise TrainingError(
            f"Stage {stage.name} learns {name!r}, which does not run the whole model in the same "
            f"passes for each row, as every rank has to under sharding {engine.sharding}. Use "
            f"run.sharding ddp, or objective next_token, preference or distillation."
        )
    if engine.in_step and isinstance(run.assistant.model, WholeModel) and name != "next_token":
        raise TrainingError(
            f"Stage {stage.name} learns {name!r} with a stock class taken whole, which is not "
            f"proven under sharding {engine.sharding}. Use run.sharding ddp."
        )


def check_spreadable(model: nn.Module, sharding: str) -> None:
    """Refuse weights that are packed into few bits.

    Raises:
        TrainingError: naming the mend.
    """
    packed = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if packed:
        raise TrainingError(
            f"run.sharding {sharding} cannot spread weights that are packed into few bits, such as "
            f"{packed[0]}. Use run.sharding ddp: packed weights are small enough for each device."
        )


def spread(model: nn.Module, engine: Engine, *, aside: nn.Module | None) -> None:
    """Spread all parameters of a model over the ranks, layer by layer, in place.

    Args:
        model: On the CPU, whole.
        engine: The processes.
        aside: A part that stays whole on every rank, or None.

    Raises:
        TrainingError: if weights are packed into 4 or 8 bits.
    """
    check_spreadable(model, "fsdp2")
    mesh = init_device_mesh(engine.device.type, (engine.world,))
    ignored: set[nn.Parameter] = set()
    if aside is not None:
        aside.to(engine.device)
        ignored = set(aside.parameters())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    whole = {p for part in held_whole(model) for p in part.parameters()} | ignored
    outermost: Any = model
    with _every_owner(outermost):
        for layer in layers_of(model):
            if not any(p in whole for p in layer.parameters()):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored or None)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # The loss is divided by what all ranks learn: gradients are added, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(engine.device)
        # It must be told that it is the outermost, or the first layer that runs takes its place.
        outermost._get_fsdp_state()._lazy_init()


@contextmanager
def _every_owner(model: Any) -> Generator[None]:
    """Let FSDP2 see the class around the parts of a stock model, which reads weights, too."""
    owners: dict[str, Any] = model._modules
    if isinstance(model, WholeModel):
        owners["stock"] = model.stock
    try:
        yield
    finally:
        owners.pop("stock", None)


@contextmanager
def whole_passes(model: nn.Module, engine: Engine) -> Generator[None]:
    """Let the model be called in any way, part by part: all ranks hold all weights meanwhile."""
    if not engine.shards_weights:
        yield
        return
    spread_out: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in spread_out:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in spread_out:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def held_whole(model: nn.Module) -> list[nn.Module]:
    """Return the parts that have to be there for a whole pass, once it has begun.

    They are read by other parts, or called a number of times that hangs on the row: the head once
    for each answer of a pair, an encoder once for each size of tiles; connectors and reducers give
    features, in which DeepSpeed sees no tensors to hang its hooks on, and are small. A stock class
    reads its parts as it likes; only the layers of its language model are gathered one by one.
    """
    joined: Any = model
    inner = joined.model
    found: list[nn.Module] = [joined.lm_head, inner.connector]
    if isinstance(model, WholeModel):
        return [*found, inner.vision]
    found += [one for one in (inner.reducer, inner.marks) if one is not None]
    return [*found, inner.vision] if inner.counter.is_flat else found


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of the weights of a module."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of each part: the members of its longest list of modules."""
    joined: Any = model
    layers: list[nn.Module] = []
    for part in (joined.model.vision, joined.model.language):
        lists = [m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        if lists:
            layers += list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters())))
    return layers
