"""What every connector is: a module from the vision width to the text width.

The widths are not settings: they follow from the two models that a connector joins.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from mmlm.config import PartConfig
from mmlm.features import Grid, VisionFeatures
from mmlm.registry import Registry


class ConnectorConfig(PartConfig):
    """Base of the configs of connectors."""

    ordered: ClassVar[bool] = False
    """Whether the first k tokens of an item do not depend on the others, for every k."""

    reads_question: ClassVar[bool] = False
    """Whether what it gives hangs on the question: see `mmlm.connectors.question`."""

    @property
    def cell(self) -> int:
        """Side of the square of features that one token stands for, where there is one."""
        return 1

    def out_grid(self, grid: Grid) -> Grid:
        """Return the grid that comes out; most connectors keep it."""
        return grid

    def resolved(self) -> ConnectorConfig:
        """Return the config with what has to be read once; called when parts are joined."""
        return self

    def build(self, *, vision_width: int, text_width: int) -> Connector:
        """Build the connector between features and embeddings of these widths."""
        raise NotImplementedError


class Connector(nn.Module):
    """From packed features of the vision width to packed features of the text width."""

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Project the features; items do not see one another."""
        raise NotImplementedError

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters on which no token depends: an objective of their own teaches them."""
        return frozenset()

    def last_linear(self) -> nn.Linear | None:
        """Return the layer whose weights set the scale of the output, or None if none does."""
        return None


class Remembering(Connector):
    """A connector that keeps something of the samples that it learns from.

    It notes what it sees while it learns, and takes it in when the optimiser's step is over, so
    that what a sample becomes does not hang on the samples beside it in the step. The trainer
    calls both; under another trainer, call `after_step` behind each step.
    """

    def before_step(self) -> None:
        """Forget what was noted: a step begins, or begins again."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Take in what was noted; called on every rank, when the weights have moved."""
        raise NotImplementedError


connectors: Registry[ConnectorConfig] = Registry("connector")
