"""DeepSpeed's ZeRO behind the same few methods as our own optimiser.

DeepSpeed spreads moments (ZeRO-1), gradients (2) and weights (3) over the ranks (Rajbhandari et
al. 2020, arXiv 1910.02054). It owns backward pass, clipping and step; loss, rates and checkpoints
are ours: what a checkpoint holds is gathered whole, by name, so that it is the same with every
sharding and every number of ranks. DeepSpeed's own settings are JSON files in `train/deepspeed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mmlm.errors import MissingExtraError, TrainingError
from mmlm.recipes import deepspeed_folder
from mmlm.training.optim import Moved, stable_name
from mmlm.training.sharding import check_spreadable, held_whole
from mmlm.vision import VisionEncoder

if TYPE_CHECKING:
    from mmlm.training.recipe import StageConfig
    from mmlm.training.shared import Run

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedAdamW:
    """AdamW under ZeRO.

    Args:
        run: What the stages share; its model is frozen as the stage says.
        stage: What learns, and how fast.
        rates: The peak rate of the name of each parameter that learns.
        vision_stands_aside: Whether the encoder is frozen and its features are cached: then each
            rank runs it when it needs to, so it stays whole on every rank.

    Raises:
        MissingExtraError: if DeepSpeed is not installed.
        TrainingError: if weights are packed into 4 or 8 bits and are to be spread.
    """

    def __init__(
        self,
        run: Run,
        stage: StageConfig,
        rates: Mapping[str, float],
        *,
        vision_stands_aside: bool = False,
    ) -> None:
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
        config = settings(run, stage)
        self._spreads_weights = run.engine.sharding == "zero3"
        aside = self._spreads_weights and vision_stands_aside
        if self._spreads_weights:
            check_spreadable(model, "zero3")
        self._put_vision_back = _vision_aside(model) if aside else None
        if aside:
            model.model.vision.to(run.engine.device)
        self._deepspeed: Any = deepspeed.initialize(
            model=model, optimizer=inner, config=config, dist_init_required=False
        )[0]
        self._zero: Any = self._deepspeed.optimizer
        self._order = _Order([p for _, p in self._named])
        if self._spreads_weights:
            self._hold_what_is_shared(model)
        if run.masters and run.precision.name != "fp32":
            self.put(run.masters)

    def _hold_what_is_shared(self, model: Any) -> None:
        """Gather once in a pass what is read outside its own module, or a number of times.

        The head is called once for each answer of a pair, and how many there are differs from
        rank to rank; so does how often an encoder runs whose tiles have sizes of their own. Marks
        and connectors that work between the layers are read by others.
        """
        register: Any = import_module("deepspeed").zero.register_external_parameter
        parts = {parameter for part in held_whole(model) for parameter in part.parameters()}
        # It sees tensors alone: what a module reads itself that gives features, it would miss.
        seeing = [one for one in model.modules() if isinstance(one, VisionEncoder)]
        parts |= {parameter for one in seeing for parameter in one.parameters(recurse=False)}
        for parameter in model.parameters():
            if parameter in parts:
                register(model, parameter)

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
        self._check_order()
        for group in self._zero.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self._deepspeed.step()
        return Moved(float(self._deepspeed.get_global_grad_norm()), not self._zero.overflow)

    def step_again(self) -> bool:
        """Return no: in bf16 and fp32 a gradient that is no number is no matter of range."""
        return False

    def _check_order(self) -> None:
        """Refuse sums of unlike things: DeepSpeed adds gradients up in the order of their coming.

        Raises:
            TrainingError: if the ranks had them in different orders.
        """
        seen = self._order.take()
        if self._processes.sharding == "zero1":
            return  # its gradients are added up at the end of a step, in the order of the names
        if self._processes.most(seen) != -self._processes.most(-seen):
            raise TrainingError(
                f"The ranks came to the gradients in different orders, so DeepSpeed has added up "
                f"unlike ones under run.sharding {self._processes.sharding}. This model calls its "
                f"parts differently from row to row. Use run.sharding ddp."
            )

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
        if self._spreads_weights:
            flats = self._zero.fp32_partitioned_groups_flat
        else:
            flats = self._zero.single_partition_of_fp32_groups
        for flat in flats:
            self._zero.optimizer.state[flat] = {
                "step": steps.clone(),
                **{moment: torch.zeros_like(flat.data) for moment in _MOMENTS},
            }
        self._link_moments()
        fragments: Any = import_module("deepspeed.utils")
        for name, parameter in self._named:
            for moment in _MOMENTS:
                value = tensors[f"{name}//{moment}"]
                if self._spreads_weights:
                    piece = self._piece(parameter, value)
                    fragments.safe_set_local_optimizer_state(parameter, piece, moment)
                else:
                    fragments.safe_set_full_optimizer_state(parameter, value, moment)

    def _link_moments(self) -> None:
        """Let each parameter find its moments.

        DeepSpeed does so when its first group has stepped, and the other groups have none yet.
        Under ZeRO-3 it looks them up each time.
        """
        if not self._spreads_weights:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _piece(self, parameter: Any, whole: Tensor) -> Tensor:
        """Return what this rank holds of a value of a parameter that is spread.

        DeepSpeed has a way to set whole values, too, but it fails where the last piece is padded.
        """
        size = parameter.ds_tensor.numel()
        room = size * self._processes.world
        flat = pad(whole.flatten(), (0, room - whole.numel()))
        return flat[size * self._processes.rank :][:size]

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights, by stable name."""
        fragments: Any = import_module("deepspeed.utils")
        for name, parameter in self._named:
            if name not in weights:
                continue
            if self._spreads_weights:
                piece = self._piece(parameter, weights[name])
                fragments.safe_set_local_fp32_param(parameter, piece)
                spread: Any = parameter
                spread.ds_tensor.data.copy_(piece)
            else:
                fragments.safe_set_full_fp32_param(parameter, weights[name])
            if parameter.shape == weights[name].shape:  # whole on this rank
                parameter.data.copy_(weights[name])

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model, and let it go."""
        self._order.close()
        self._deepspeed.destroy()
        if self._spreads_weights:
            offload: Any = import_module("deepspeed.runtime.zero.parameter_offload")
            offload.FWD_MODULE_STACK.clear()
        if self._put_vision_back is not None:
            self._put_vision_back()


class _Order:
    """Remembers in which order gradients came, as one number."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._seen = 0
        self._hooks = [
            one.register_post_accumulate_grad_hook(self._note(number))
            for number, one in enumerate(parameters, 1)
        ]

    def _note(self, number: int) -> Callable[[Tensor], None]:
        def note(_: Tensor) -> None:
            self._seen = (self._seen * 1_000_003 + number) % (1 << 40)

        return note

    def take(self) -> int:
        """Return the number, and begin anew."""
        seen, self._seen = self._seen, 0
        return seen

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _vision_aside(model: Any) -> Callable[[], None]:
    """Hide the encoder from DeepSpeed; return what puts it back.

    It can be called as before, and is no longer among the modules that DeepSpeed goes through.
    """
    inner = model.model
    parts = dict(inner._modules)
    del inner._modules["vision"]
    inner.__dict__["vision"] = parts["vision"]

    def put_back() -> None:
        del inner.__dict__["vision"]
        inner._modules.clear()
        inner._modules.update(parts)

    return put_back


def settings(run: Run, stage: StageConfig) -> dict[str, Any]:
    """Return what DeepSpeed is told: a JSON file of `train/deepspeed`, and what the recipe says.

    Raises:
        TrainingError: if the precision is none that ZeRO knows.
    """
    precision, engine = run.precision.name, run.engine
    if precision not in ("fp32", "bf16"):
        raise TrainingError(
            f"run.precision {precision} does not go with run.sharding {engine.sharding}: DeepSpeed "
            f"keeps float32 copies of its own. Use bf16 or fp32."
        )
    path: Path = deepspeed_folder() / f"{engine.sharding}.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if engine.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config = _put_over(config, run.recipe.run.deepspeed)
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        # The true number differs from step to step; we say where a step ends.
        "gradient_accumulation_steps": 2,
        "train_batch_size": 2 * engine.world,
        "gradient_clipping": stage.max_grad_norm or 0.0,
        "bf16": {"enabled": precision == "bf16"},
    }
    return config


def _put_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with others put over them, level by level.

    >>> _put_over({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    found = dict(below)
    for key, value in above.items():
        inner: Any = found.get(key)
        both = isinstance(inner, dict) and isinstance(value, Mapping)
        found[key] = _put_over(inner, value) if both else value
    return found


def load_deepspeed() -> Any:
    """Import DeepSpeed.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return import_module("deepspeed")
    except ImportError:
        raise MissingExtraError(
            "deepspeed", needed_for="run.sharding zero1, zero2 or zero3", extra="deepspeed"
        ) from None
