"""Train a recipe: `python train/train.py quickstart`, the same as `mmlm train quickstart`.

The launchers of many processes take a script: `torchrun --nproc-per-node 8 train/train.py RECIPE`.
"""

import sys

from mmlm.cli import run

if __name__ == "__main__":
    sys.exit(run(["train", *sys.argv[1:]]))
