"""Training in stages: exact, resumable, and the same on one core and on many devices.

    data, assistant ──► training ──► runs/NAME
                        you are here

`recipe` says what a recipe may say, `entry` is the door, `trainer` goes through the stages and
`stage` through the steps. `learning` decides what learns, `optim` moves it, `objectives` says
towards what; `checkpoint` keeps it. To change what is trained, write a recipe; to add an
objective, register one in `objectives`. No model is defined here and no file format is read.
"""

from mmlm.training.contrast import ContrastConfig as ContrastConfig
from mmlm.training.distillation import DistillationConfig as DistillationConfig
from mmlm.training.entry import train as train
from mmlm.training.old_space import OldSpaceConfig as OldSpaceConfig
from mmlm.training.preference import PreferenceConfig as PreferenceConfig
from mmlm.training.recipe import Recipe as Recipe
from mmlm.training.recipe import RunConfig as RunConfig
from mmlm.training.recipe import StageConfig as StageConfig
from mmlm.training.recipe import read_recipe as read_recipe
from mmlm.training.references import write_references as write_references
from mmlm.training.text_space import TextSpaceConfig as TextSpaceConfig
from mmlm.training.word_match import WordMatchConfig as WordMatchConfig
from mmlm.training.word_units import WordUnitsConfig as WordUnitsConfig
