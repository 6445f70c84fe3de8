"""The image tokens of a new encoder become those of the old one: nothing behind them must relearn.

    pixels ──► new encoder ──► connector ──► tokens ─┐
           └─► the old checkpoint, frozen ─► tokens ─┴─► how far they are apart

After XBT (arXiv 2405.14715), which maps the features of a new CLIP into the space of the old one
so that a trained language model keeps working. Here the map is the connector itself, and the
pairs are pictures instead of texts, so that any encoder may be new. No language model runs: a
step costs two encoders. Distances are relative to the size of the old tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from mmlm.data.mixture import Mixture
from mmlm.errors import ConfigError
from mmlm.hub import load_parts
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.training.distillation import (
    Distillation,
    DistillationConfig,
    as_teacher_sees,
    on_grid,
    plain_tiles,
)
from mmlm.training.objectives import LossWeight, Objective, ObjectiveConfig, objectives


@objectives.register("old_space")
class OldSpaceConfig(ObjectiveConfig):
    """Image tokens become like those that another checkpoint gives for the same picture."""

    sees_pixels: ClassVar[bool] = True

    checkpoint: str
    """The old checkpoint: a folder or a Hub id; usually that of `model.from`."""

    def build(self, *, loss_weight: LossWeight) -> Objective:
        """Return the objective; every tile counts the same, whatever `loss_weight` says."""
        del loss_weight
        return OldSpace(self)


class OldSpace(Distillation):
    """The distance between the image tokens of two checkpoints."""

    def __init__(self, config: OldSpaceConfig) -> None:
        self.config = DistillationConfig(teacher={})
        model, _ = load_parts(config.checkpoint)
        self.old = model.model.eval().requires_grad_(False)
        self.old.language = nn.Identity()  # type: ignore[assignment]  # it is never asked

    def prepare(self, model: nn.Module, tokenizer: Any, mixture: Mixture) -> None:
        """Check that both checkpoints speak to language models of one width.

        Raises:
            ConfigError: if they do not.
        """
        super().prepare(model, tokenizer, mixture)
        assert isinstance(model, MMLMForConditionalGeneration)
        mine, theirs = model.config.text_config.hidden_size, self.old.config.text_config.hidden_size
        if mine != theirs:
            raise ConfigError(
                f"objective old_space: image tokens are {mine} wide here and {theirs} in the old "
                f"checkpoint. It is for a new encoder before the same language model."
            )

    def _loss(
        self, joined: MMLMForConditionalGeneration, inputs: dict[str, Any], num_items: float
    ) -> Tensor:
        pixels = plain_tiles(
            inputs,
            "objective old_space shows the same plain tiles to both encoders: set "
            "run.feature_cache: 'off', and model.image to a policy whose tiles have one size.",
        )
        if pixels is None:
            return torch.zeros((), device=joined.device)
        weight = next(self.old.parameters(), pixels)
        if weight.device != pixels.device:
            nn.Module.to(self.old, pixels.device)
        with torch.no_grad():
            shown = as_teacher_sees(pixels, joined.config.facts, self.old.config.facts)
            taught = self.old.connect(self.old.encode_images(shown.to(weight.dtype)))
        seen = joined.model.connect(joined.model.encode_images(pixels))
        distances = [
            _relative(ours, on_grid(theirs, there, here))
            for ours, theirs, here, there in zip(
                seen.items(), taught.items(), seen.grids, taught.grids, strict=True
            )
        ]
        return torch.stack(distances).sum() / num_items


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean squared distance, 1 for tokens that are all zero."""
    ours, theirs = ours.float(), theirs.float()
    return mse_loss(ours, theirs) / theirs.square().mean().clamp_min(1e-12)
