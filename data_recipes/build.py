"""Make a data set: `python data_recipes/build.py quickstart`, the same as `mmlm data build`."""

import sys

from mmlm.cli import run

if __name__ == "__main__":
    sys.exit(run(["data", "build", *sys.argv[1:]]))
