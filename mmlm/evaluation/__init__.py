"""Measuring: benchmarks as data, scores with intervals, and proof that the picture mattered.

    assistant, generation ──► evaluation ──► reports
                              you are here

`benchmark` reads and checks a YAML and its rows, `conditions` asks the same without the
picture and with another one, `runner` answers and keeps every answer, `scorers` mark,
`statistics` say how sure a score is, `results` puts it together. To add a benchmark, write a
YAML into `eval/benchmarks/`; to add a scorer, see `scorers.base`.
"""

from mmlm.evaluation.benchmark import Benchmark as Benchmark
from mmlm.evaluation.benchmark import load_benchmark as load_benchmark
from mmlm.evaluation.items import Item as Item
from mmlm.evaluation.results import Prediction as Prediction
from mmlm.evaluation.results import Score as Score
from mmlm.evaluation.runner import Evaluation as Evaluation
from mmlm.evaluation.runner import evaluate as evaluate
from mmlm.evaluation.schema import BenchmarkConfig as BenchmarkConfig
