"""A package from outside: an encoder that averages squares, registered by an entry point."""

from torch import nn

from mmlm.features import Size, VisionFeatures
from mmlm.vision import VisionConfig, VisionEncoder, VisionFacts, encoders


@encoders.register("squares")
class SquaresConfig(VisionConfig):
    """One learnt colour map over the mean of each square."""

    def load(self, *, dtype=None):
        half = (0.5, 0.5, 0.5)
        facts = VisionFacts(
            width=8, side=(32, 32), grid=(4, 4), stride=8, mean=half, std=half, feature="means"
        )
        return self.build(facts, None)

    def build(self, facts, tower_config):
        return Squares(facts)


class Squares(VisionEncoder):
    def __init__(self, facts):
        super().__init__(facts)
        self.colours = nn.Conv2d(3, 8, 8, stride=8)

    def forward(self, pixels):
        grid = self.facts.out_grid(Size(*pixels.shape[-2:]))
        values = self.colours(pixels).permute(0, 2, 3, 1).reshape(-1, 8)
        return VisionFeatures(values, (grid,) * len(pixels))
