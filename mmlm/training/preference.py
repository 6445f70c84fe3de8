"""Preferences: of two answers to one question, the better one becomes more likely.

Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), with what the field
chooses from: log-probabilities divided by the length of the answer (SimPO, arXiv 2405.14734), a
margin, smoothed labels, the squared loss of IPO (arXiv 2310.12036), and a term that keeps the
better answer likely (RPO, arXiv 2404.19733). The reference is the model without its adapters,
or log-probabilities that stand in the rows, or nothing.

Every pair counts the same, over all rows of all devices of a step; a pair is never parted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mmlm.data.pairs import PairPlanner, PlannedPair
from mmlm.data.planning import Planned, Planner
from mmlm.errors import ConfigError
from mmlm.language.adapters import adapters_off
from mmlm.training.objectives import LossWeight, Objective, ObjectiveConfig, objectives

_MARK = ".lora_"


@objectives.register("preference")
class PreferenceConfig(ObjectiveConfig):
    """The chosen answer becomes more likely than the rejected one (DPO and its kin)."""

    planner: ClassVar[type[Planner]] = PairPlanner

    beta: float = Field(default=0.1, gt=0)
    """How sharply the difference to the reference counts."""

    form: Literal["sigmoid", "ipo"] = "sigmoid"
    """The loss of a difference: -log sigmoid (DPO), or the squared distance of IPO."""

    reference: Literal["adapters_off", "rows", "none"] = "adapters_off"
    """What the answers are compared with: the model without its adapters, numbers that stand in
    the rows (`mmlm.training.write_references` puts them there), or nothing (SimPO)."""

    length_normalised: bool = False
    """Divide the log-probability of an answer by its number of tokens."""

    margin: float = Field(default=0.0, ge=0)
    """By how much the chosen answer must be ahead, for form sigmoid (SimPO's gamma)."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """The share of pairs that are thought to be the wrong way round, for form sigmoid."""

    sft: float = Field(default=0.0, ge=0)
    """Weight of the mean cross-entropy of the chosen answer's tokens."""

    def build(self, *, loss_weight: LossWeight) -> Objective:
        """Return the objective; every pair counts the same, whatever `loss_weight` says."""
        del loss_weight
        return Preference(self)


class Preference(Objective):
    """The loss of pairs of answers."""

    in_step = True
    stand_in = "sample"

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config

    def weigh(self, samples: Sequence[Planned]) -> tuple[list[Tensor] | None, float]:
        """Count pairs.

        Raises:
            ConfigError: if the rows hold no reference and should.
        """
        for sample in samples:
            lacks = isinstance(sample, PlannedPair) and sample.reference is None
            if lacks and self.config.reference == "rows":
                raise ConfigError(
                    f"objective.reference is rows, and sample {sample.id} of {sample.source} has "
                    f"no `reference`. Put the numbers there with mmlm.training.write_references, "
                    f"or use reference: adapters_off."
                )
        return None, float(len(samples))

    def loss(self, model: nn.Module, inputs: dict[str, Any], num_items: float) -> Tensor:
        """Return the loss of the pairs of one batch, divided by the pairs of the whole step."""
        given: Tensor | None = inputs.pop("reference", None)
        lengths = lengths_of(inputs).view(-1, 2)
        ours = log_probabilities(model, inputs).view(-1, 2)
        reference = self._reference(model, inputs, given).to(ours)
        return preference_loss(ours, reference, lengths.to(ours), self.config).sum() / num_items

    def _reference(self, model: nn.Module, inputs: dict[str, Any], given: Tensor | None) -> Tensor:
        """Return what the reference gives to the answers ``(pairs, 2)``."""
        if self.config.reference == "rows":
            assert given is not None
            return given
        if self.config.reference == "none":
            return torch.zeros(1, 2)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        if not any(_MARK in name for name in names) or any(_MARK not in name for name in names):
            raise ConfigError(
                "objective.reference is adapters_off, so adapters must learn and nothing else: "
                "whatever else learns would change the reference too. Write learn: [adapters.*] "
                "and adapters: {use: lora}, or use reference: rows."
            )
        with torch.no_grad(), adapters_off(model):
            return log_probabilities(model, inputs).view(-1, 2)


def preference_loss(
    ours: Tensor, reference: Tensor, lengths: Tensor, config: PreferenceConfig
) -> Tensor:
    """Return the loss of each pair.

    Shapes:
        ours, reference: ``(pairs, 2)``: summed log-probabilities, the chosen answer first
        lengths: ``(pairs, 2)``: learnt tokens of both answers
        returns: ``(pairs,)``
    """
    chosen_alone = ours[:, 0] / lengths[:, 0].clamp(min=1)
    if config.length_normalised:
        ours, reference = (value / lengths.clamp(min=1) for value in (ours, reference))
    ratios = ours - reference
    ahead = ratios[:, 0] - ratios[:, 1]
    if config.form == "ipo":
        losses = (ahead - 1 / (2 * config.beta)) ** 2
    else:
        scaled, smooth = config.beta * ahead - config.margin, config.label_smoothing
        losses = -(1 - smooth) * logsigmoid(scaled) - smooth * logsigmoid(-scaled)
    return losses - config.sft * chosen_alone


def log_probabilities(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the summed log-probability of the learnt tokens of each piece ``(pieces,)``."""
    return -model(**inputs, loss_only=True, loss_by_piece=True, use_cache=False).loss


def lengths_of(inputs: dict[str, Any]) -> Tensor:
    """Return the number of learnt tokens of each piece ``(pieces,)``."""
    learnt = inputs["labels"] != -100
    borders = inputs.get("cu_seq_lens_q")
    if borders is None:
        return learnt[:, 1:].sum(-1)
    counts = [
        int(learnt[0, first + 1 : last].sum())
        for first, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
    ]
    return torch.tensor(counts, device=learnt.device)
