"""What a stage learns: from a batch to a loss that is summed over a whole step.

An objective returns its loss divided by a number that is counted over all rows of all
devices of the step, so that micro-batches and ranks change nothing. To add one: a config
class registered in `objectives`, whose `build` returns an `Objective`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmlm.config import PartConfig
from mmlm.data.mixture import Mixture
from mmlm.data.planning import NOT_LEARNT, Planned, Planner
from mmlm.registry import Registry

LossWeight = Literal["token", "sample", "sqrt"]


class Objective:
    """Base of the objectives."""

    in_step: ClassVar[bool] = False
    """Whether every row goes through the same passes of the whole model, called by its name: then
    its weights may be spread over ranks."""

    stand_in: ClassVar[Literal["words", "sample", "picture"]] = "words"
    """What a rank without a row computes on: two words, a sample, or a sample with a picture."""

    def prepare(self, model: nn.Module, tokenizer: Any, mixture: Mixture) -> None:
        """Look at the model and the data before the stage begins, or goes on; most need not."""

    def weigh(self, samples: Sequence[Planned]) -> tuple[list[Tensor] | None, float]:
        """Return a factor for each position of each sample, and the sum over what is learnt.

        Shapes:
            factors: one ``(tokens,)`` for each sample; None where every learnt token counts one
        """
        raise NotImplementedError

    def loss(self, model: nn.Module, inputs: dict[str, Any], num_items: float) -> Tensor:
        """Return the loss of one batch, divided by the `num_items` of the whole step."""
        raise NotImplementedError


class ObjectiveConfig(PartConfig):
    """Base of the configs of objectives."""

    sees_pixels: ClassVar[bool] = False
    """Whether it looks at the pixels itself, so that nothing may stand in their place."""

    planner: ClassVar[type[Planner]] = Planner
    """What makes samples of rows: single conversations, or pairs."""

    def build(self, *, loss_weight: LossWeight) -> Objective:
        """Return the objective; `loss_weight` says what counts the same."""
        raise NotImplementedError


objectives: Registry[ObjectiveConfig] = Registry("objective")


def planner_of(words: dict[str, Any], *, origin: str = "objective") -> type[Planner]:
    """Return what makes the samples of an objective, given its words in a recipe."""
    return objectives.read(words, origin=origin).planner


@objectives.register("next_token")
class NextTokenConfig(ObjectiveConfig):
    """Every learnt token is predicted from what stands before it."""

    def build(self, *, loss_weight: LossWeight) -> Objective:
        """Return the objective."""
        return NextToken(loss_weight)


class NextToken(Objective):
    """Cross-entropy of the next token, on the labelled positions alone."""

    in_step = True

    def __init__(self, loss_weight: LossWeight) -> None:
        self.loss_weight = loss_weight

    def weigh(self, samples: Sequence[Planned]) -> tuple[list[Tensor] | None, float]:
        """Count tokens, samples, or the roots of the tokens of each sample."""
        counts = [sample.num_labels for sample in samples]
        if self.loss_weight == "token":
            return None, float(sum(counts))
        power = 1.0 if self.loss_weight == "sample" else 0.5
        factors: list[Tensor] = []
        for sample, count in zip(samples, counts, strict=True):
            learnt = torch.from_numpy(sample.labels != NOT_LEARNT)
            factors.append(learnt.float() / max(count, 1) ** power)
        total = float(sum(count ** (1.0 - power) for count in counts if count))
        return factors, total

    def loss(self, model: nn.Module, inputs: dict[str, Any], num_items: float) -> Tensor:
        """Ask the model for its loss alone."""
        return model(**inputs, loss_only=True, num_items_in_batch=num_items, use_cache=False).loss
