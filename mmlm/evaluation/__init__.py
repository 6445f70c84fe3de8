"""Measuring: benchmarks as data, scores with intervals, and proof that the picture mattered.

    assistant, generation ──► evaluation ──► reports
                              you are here

    benchmarks/  what is asked: YAMLs, their rows, the conditions
    asking/      who answers: a model of ours, vLLM, an address; the log of answers
    scorers/     one answer, its target, a mark
    reports/     the page, the card, comparisons, dialects, contamination
    probes/      what the parts know without the whole
    harness/     our models in lmms-eval and VLMEvalKit, our answers under theirs

`runner` puts a run together, `results` turns marks into scores, `statistics` says how sure a
score is, `outcome` writes the files. To add a benchmark, write a YAML into `eval/benchmarks/`;
to add a scorer, see `scorers.base`.
"""

from mmlm.evaluation.benchmarks.benchmark import Benchmark as Benchmark
from mmlm.evaluation.benchmarks.benchmark import load_benchmark as load_benchmark
from mmlm.evaluation.benchmarks.items import Item as Item
from mmlm.evaluation.benchmarks.schema import BenchmarkConfig as BenchmarkConfig
from mmlm.evaluation.results import Prediction as Prediction
from mmlm.evaluation.results import Score as Score
from mmlm.evaluation.runner import Evaluation as Evaluation
from mmlm.evaluation.runner import evaluate as evaluate
