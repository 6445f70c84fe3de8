"""DeepSpeed's ZeRO behind the same few methods as our own optimiser.

DeepSpeed spreads the moments over the ranks (ZeRO-1; Rajbhandari et al. 2020, arXiv 1910.02054). It
owns backward
pass, clipping and step; loss, rates and checkpoints are ours: what a checkpoint holds is gathered
whole, by name, so that it is the same with every sharding and every number of ranks. DeepSpeed's
own settings are JSON files in `train/deepspeed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmlm.errors import MissingExtraError, TrainingError
from mmlm.recipes import deepspeed_folder
from mmlm.training.optim import Moved, stable_name

if TYPE_CHECKING:
    from mmlm.training.recipe import RunConfig, StageConfig
    from mmlm.training.shared import Run

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedAdamW:
    """AdamW under ZeRO.

    Args:
        run: What the stages share; its model is frozen as the stage says.
        stage: What learns, and how fast.
        rates: The peak rate of the name of each parameter that learns.

    Raises:
        MissingExtraError: if DeepSpeed is not installed.
    """

    def __init__(self, run: Run, stage: StageConfig, rates: Mapping[str, float]) -> None:
        deepspeed = load_deepspeed()
        self._processes = run.engine
        model: Any = run.assistant.model
        self._named = [
            (stable_name(name), p) for name, p in model.named_parameters() if name in rates
        ]
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if name in rates:
                groups.setdefault((rates[name], parameter.ndim >= 2), []).append(parameter)
        inner = torch.optim.AdamW(
            [
                {"params": parameters, "lr": peak, "peak_lr": peak,
                 "weight_decay": stage.weight_decay if decays else 0.0}
                for (peak, decays), parameters in groups.items()
            ],
            betas=stage.betas,
        )  # fmt: skip
        config = settings(run.recipe.run, stage, run.precision.name, run.engine.world)
        self._deepspeed: Any = deepspeed.initialize(
            model=model, optimizer=inner, config=config, dist_init_required=False
        )[0]
        self._zero: Any = self._deepspeed.optimizer
        if run.masters and run.precision.name != "fp32":
            self.put(run.masters)

    def loss_of(
        self,
        objective: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items: float,
        *,
        is_last: bool,
    ) -> Tensor:
        """Return the loss of one row; the model is called through DeepSpeed."""
        del model
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        return objective.loss(self._deepspeed, inputs, num_items)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one row."""
        # DeepSpeed averages over ranks; the loss is already divided by what all of them learn.
        self._deepspeed.backward(loss * self._processes.world, scale_wrt_gas=False)

    def step(self, factor: float, most: float | None, *, may_move: bool) -> Moved:
        """Move the weights; DeepSpeed clips, and leaves a gradient out that is not a number."""
        del most, may_move
        for group in self._zero.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self._deepspeed.step()
        return Moved(float(self._deepspeed.get_global_grad_norm()), not self._zero.overflow)

    def forget(self) -> None:
        """Forget the gradient."""
        self._zero.zero_grad()

    def masters(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Return what learns, whole, in float32, by stable name."""
        return self._gathered(None, keep)

    def state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Return the moments, whole, by name; the same names as without DeepSpeed."""
        steps = [int(one["step"]) for one in self._zero.optimizer.state.values() if "step" in one]
        if not self._processes.any(bool(steps)):
            return {}
        self._link_moments()
        found: dict[str, Tensor] = {}
        for moment in _MOMENTS:
            whole = self._gathered(moment, keep)
            found |= {f"{name}//{moment}": value for name, value in whole.items()}
        count = torch.tensor(float(max(steps, default=0)))
        return found | ({f"{name}//step": count.clone() for name, _ in self._named} if keep else {})

    def _gathered(self, moment: str | None, keep: bool) -> dict[str, Tensor]:
        fragments: Any = import_module("deepspeed.utils")
        found: dict[str, Tensor] = {}
        for name, parameter in self._named:
            if moment is None:
                whole = fragments.safe_get_full_fp32_param(parameter)
            else:
                whole = fragments.safe_get_full_optimizer_state(parameter, moment)
            if keep:
                found[name] = whole.detach().to("cpu", copy=True)
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the moments of a checkpoint."""
        steps = next((value for key, value in tensors.items() if key.endswith("//step")), None)
        if steps is None:
            return
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat] = {
                "step": steps.clone(),
                **{moment: torch.zeros_like(flat.data) for moment in _MOMENTS},
            }
        self._link_moments()
        fragments: Any = import_module("deepspeed.utils")
        for name, parameter in self._named:
            for moment in _MOMENTS:
                fragments.safe_set_full_optimizer_state(
                    parameter, tensors[f"{name}//{moment}"], moment
                )

    def _link_moments(self) -> None:
        """Let each parameter find its moments.

        DeepSpeed does so when its first group has stepped, and the other groups have none yet.
        """
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights, by stable name."""
        fragments: Any = import_module("deepspeed.utils")
        for name, parameter in self._named:
            if name in weights:
                fragments.safe_set_full_fp32_param(parameter, weights[name])
                parameter.data.copy_(weights[name])

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self._deepspeed.destroy()


def settings(run: RunConfig, stage: StageConfig, precision: str, world: int) -> dict[str, Any]:
    """Return what DeepSpeed is told: a JSON file of `train/deepspeed`, and what the recipe says.

    Raises:
        TrainingError: if the precision is none that ZeRO knows.
    """
    if precision not in ("fp32", "bf16"):
        raise TrainingError(
            f"run.precision {precision} does not go with run.sharding {run.sharding}: DeepSpeed "
            f"keeps float32 copies of its own. Use bf16 or fp32."
        )
    path: Path = deepspeed_folder() / f"{run.sharding}.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        # The true number differs from step to step; we say where a step ends.
        "gradient_accumulation_steps": 2,
        "train_batch_size": 2 * world,
        "gradient_clipping": stage.max_grad_norm or 0.0,
        "bf16": {"enabled": precision == "bf16"},
    }
    return config


def load_deepspeed() -> Any:
    """Import DeepSpeed.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return import_module("deepspeed")
    except ImportError:
        raise MissingExtraError(
            "deepspeed", needed_for="run.sharding zero1", extra="deepspeed"
        ) from None
