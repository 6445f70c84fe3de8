"""Scorers: one answer, its target, a mark.

    benchmark ──► runner ──► scorers ──► results ──► reports
                             you are here

Each module holds functions with worked examples and, beside them, the configs that a
benchmark names. Nothing here runs a model or draws at random.
"""

from mmlm.evaluation.scorers.base import Mark as Mark
from mmlm.evaluation.scorers.base import Row as Row
from mmlm.evaluation.scorers.base import ScorerConfig as ScorerConfig
from mmlm.evaluation.scorers.base import Target as Target
from mmlm.evaluation.scorers.base import read_scorer as read_scorer
from mmlm.evaluation.scorers.base import scorers as scorers
from mmlm.evaluation.scorers.boxes import BoxConfig as BoxConfig
from mmlm.evaluation.scorers.captions import CaptionConfig as CaptionConfig
from mmlm.evaluation.scorers.chair import ChairConfig as ChairConfig
from mmlm.evaluation.scorers.choice import ChoiceConfig as ChoiceConfig
from mmlm.evaluation.scorers.exams import AI2DConfig as AI2DConfig
from mmlm.evaluation.scorers.exams import MMBenchConfig as MMBenchConfig
from mmlm.evaluation.scorers.exams import MMMUConfig as MMMUConfig
from mmlm.evaluation.scorers.exams import ScienceQAConfig as ScienceQAConfig
from mmlm.evaluation.scorers.exams import SeedConfig as SeedConfig
from mmlm.evaluation.scorers.facts import FactsConfig as FactsConfig
from mmlm.evaluation.scorers.judge import JudgeConfig as JudgeConfig
from mmlm.evaluation.scorers.letters import LetterOnlyConfig as LetterOnlyConfig
from mmlm.evaluation.scorers.mentions import AmberDescribeConfig as AmberDescribeConfig
from mmlm.evaluation.scorers.names import ExactConfig as ExactConfig
from mmlm.evaluation.scorers.names import KeywordConfig as KeywordConfig
from mmlm.evaluation.scorers.names import NameConfig as NameConfig
from mmlm.evaluation.scorers.numbers import CountConfig as CountConfig
from mmlm.evaluation.scorers.numbers import MathVistaConfig as MathVistaConfig
from mmlm.evaluation.scorers.pairs import AmberConfig as AmberConfig
from mmlm.evaluation.scorers.pairs import BeafConfig as BeafConfig
from mmlm.evaluation.scorers.pairs import HallusionConfig as HallusionConfig
from mmlm.evaluation.scorers.reading import ANLSConfig as ANLSConfig
from mmlm.evaluation.scorers.reading import ContainsConfig as ContainsConfig
from mmlm.evaluation.scorers.reading import RelaxedConfig as RelaxedConfig
from mmlm.evaluation.scorers.vqa import VQAConfig as VQAConfig
from mmlm.evaluation.scorers.yes_no import MMEConfig as MMEConfig
from mmlm.evaluation.scorers.yes_no import YesNoConfig as YesNoConfig
