"""Measure a model; the same as `mmlm eval`.

python eval/evaluate.py runs/quickstart pope textvqa --limit 500
python eval/evaluate.py llava-hf/llava-1.5-7b-hf my_benchmark.yaml
"""

from __future__ import annotations

import sys

from mmlm.cli import run

if __name__ == "__main__":
    sys.exit(run(["eval", *sys.argv[1:]]))
