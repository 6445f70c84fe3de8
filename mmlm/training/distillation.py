"""Feature distillation: the encoder learns to see what a frozen teacher sees.

    pixels ──► encoder ─────► features ─┐
           └─► teacher (any encoder, any layer, frozen) ─► features ─┴─► how far they are apart

The teacher is named like an encoder in a recipe, its layer included; the pictures are put into
its own size and normalisation, and its grid onto the encoder's. Features of one width are
compared one by one; of unlike widths by their relations: how alike any two places of a picture
are (Tung and Mori 2019, arXiv 1907.09682), which needs no projection that would be thrown away.

Every tile counts the same over all rows of all devices of a step. With `next_token`, the
cross-entropy of a sample counts as much as its tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss, normalize

from mmlm.data.mixture import Mixture
from mmlm.data.planning import NOT_LEARNT, Planned
from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.training.objectives import LossWeight, Objective, ObjectiveConfig, objectives
from mmlm.vision import VisionEncoder, encoders


@objectives.register("distillation")
class DistillationConfig(ObjectiveConfig):
    """The encoder's features become like those of a frozen teacher."""

    sees_pixels: ClassVar[bool] = True

    teacher: dict[str, Any]
    """An encoder as under `model.vision`, with its layer: {use: hf, checkpoint: …, layer: -2}."""

    compare: Literal["auto", "cosine", "mse", "relations"] = "auto"
    """How features are compared; auto is cosine where both widths are one, else relations."""

    next_token: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy of the answers beside it; 0 learns from pictures alone."""

    def build(self, *, loss_weight: LossWeight) -> Objective:
        """Return the objective; every tile counts the same, whatever `loss_weight` says."""
        del loss_weight
        return Distillation(self)


class Distillation(Objective):
    """The distance between the features of two encoders, and the next token beside it."""

    in_step = True
    stand_in = "picture"

    def __init__(self, config: DistillationConfig) -> None:
        self.config = config
        part = encoders.read(config.teacher, origin="objective.teacher")
        self.teacher: VisionEncoder = part.load().eval().requires_grad_(False)

    def prepare(self, model: nn.Module, tokenizer: Any, mixture: Mixture) -> None:
        """Check that the model shows the features of its encoder.

        Raises:
            ConfigError: if it does not.
        """
        if not isinstance(model, MMLMForConditionalGeneration):
            raise ConfigError(
                "objective distillation needs a model that MMLM reads as parts; a stock class "
                "taken whole does not show the features of its encoder."
            )

    def weigh(self, samples: Sequence[Planned]) -> tuple[list[Tensor] | None, float]:
        """Count tiles; the labels of a sample share the weight of its tiles."""
        factors: list[Tensor] = []
        for sample in samples:
            learnt = torch.from_numpy(sample.labels != NOT_LEARNT).float()
            factors.append(learnt * sample.num_tiles / max(sample.num_labels, 1))
        return factors, float(sum(sample.num_tiles for sample in samples))

    def loss(self, model: nn.Module, inputs: dict[str, Any], num_items: float) -> Tensor:
        """Return the loss of one batch, divided by the tiles of the whole step.

        Raises:
            ConfigError: if the encoder stands still, or its pixels are no plain tiles.
        """
        return model(instead=lambda joined: self._loss(joined, inputs, num_items))

    def _loss(
        self, joined: MMLMForConditionalGeneration, inputs: dict[str, Any], num_items: float
    ) -> Tensor:
        pixels = plain_tiles(
            inputs,
            "objective distillation teaches the encoder with plain tiles: `learn` must name "
            "vision.*, and model.image a policy whose tiles have one size.",
        )
        if pixels is None:
            return torch.zeros((), device=joined.device)
        seen = joined.model.encode_images(pixels)
        total = self._apart(joined, pixels, seen).sum() / num_items
        if not self.config.next_token:
            return total
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        grids = torch.tensor([list(grid) for grid in seen.grids])
        words = joined.forward(
            **rest, vision_values=seen.values, vision_grids=grids, loss_only=True,
            num_items_in_batch=torch.tensor(num_items), use_cache=False,
        ).loss  # fmt: skip
        assert words is not None
        return total + self.config.next_token * words

    def _apart(
        self, model: MMLMForConditionalGeneration, pixels: Tensor, seen: VisionFeatures
    ) -> Tensor:
        """Return how far the features of each tile are from the teacher's ``(tiles,)``."""
        weight = next(self.teacher.parameters(), pixels)
        if weight.device != pixels.device:
            self.teacher.to(pixels.device)
        with torch.no_grad():
            shown = as_teacher_sees(pixels, model.config.facts, self.teacher.facts)
            taught = self.teacher(shown.to(weight.dtype))
        distances = [
            features_apart(ours, on_grid(theirs, there, here), self.config.compare)
            for ours, theirs, here, there in zip(
                seen.items(), taught.items(), seen.grids, taught.grids, strict=True
            )
        ]
        return torch.stack(distances)


def plain_tiles(inputs: dict[str, Any], refusal: str) -> Tensor | None:
    """Return the pixels that two encoders can both see, None for a row without a picture.

    Shapes:
        returns: ``(tiles, channels, height, width)``

    Raises:
        ConfigError: with `refusal`, if they are no plain tiles, or only features are there.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None and inputs.get("vision_values") is None:
        return None
    if pixels is None or pixels.dim() != 4:
        raise ConfigError(refusal)
    return pixels


def as_teacher_sees(pixels: Tensor, ours: Any, theirs: Any) -> Tensor:
    """Bring normalised tiles into the size and normalisation of another encoder.

    Shapes:
        pixels: ``(tiles, channels, height, width)``
    """
    mean, std, their_mean, their_std = (
        torch.tensor(values, device=pixels.device).view(1, -1, 1, 1)
        for values in (ours.mean, ours.std, theirs.mean, theirs.std)
    )
    plain = pixels.float() * std + mean
    side = tuple(theirs.side)
    if tuple(plain.shape[-2:]) != side:
        plain = interpolate(plain, side, mode="bicubic", antialias=True).clamp(0, 1)
    return (plain - their_mean) / their_std


def on_grid(values: Tensor, there: Grid, here: Grid) -> Tensor:
    """Put features on another grid.

    Shapes:
        values: ``(places there, width)``
        returns: ``(places here, width)``
    """
    if there == here:
        return values
    picture = values.view(there.rows, there.columns, -1).permute(2, 0, 1)[None].float()
    resized = interpolate(picture, (here.rows, here.columns), mode="bilinear", antialias=True)
    return resized[0].flatten(1).T


def features_apart(ours: Tensor, theirs: Tensor, compare: str) -> Tensor:
    """Return one number: the mean over places, or over pairs of places.

    Shapes:
        ours, theirs: ``(places, width)``, each with a width of its own for relations
    """
    ours, theirs = ours.float(), theirs.float()
    same = ours.shape[-1] == theirs.shape[-1]
    if compare == "auto":
        compare = "cosine" if same else "relations"
    if compare == "relations":
        one, other = normalize(ours, dim=-1), normalize(theirs, dim=-1)
        return mse_loss(one @ one.T, other @ other.T)
    if not same:
        raise ConfigError(
            f"objective.compare is {compare}, and the encoder has width {ours.shape[-1]} where the "
            f"teacher has {theirs.shape[-1]}. Use compare: relations."
        )
    if compare == "mse":
        return mse_loss(ours, theirs)
    return (1 - (normalize(ours, dim=-1) * normalize(theirs, dim=-1)).sum(-1)).mean()
