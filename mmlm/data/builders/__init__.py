"""Data sets that MMLM makes itself, out of packages that anybody can install.

    npm packages ──► builders ──► a folder of pictures and rows ──► sources
                     you are here

`build(name)` makes the data set of that name once and keeps it in the cache; a source
``{use: build, name: quickstart, rows: align}`` reads it. A builder knows pictures and words,
and no model. To add one: a module with `ABOUT`, `key()` and `make(folder, say)`, and its name in
`base`.

    scenes      drawn things: counting, place, colour, reading     no package; `make_puzzle`
    charts      bars, lines and pies of real figures               npm, once
    documents   forms, tables and letters with real facts          npm, once
    fractals    one picture a formula (OFDB), and pairs            no package
    quickstart  everyday things in six drawing styles              npm, once
"""

from mmlm.data.builders.base import BUILDERS as BUILDERS
from mmlm.data.builders.base import Built as Built
from mmlm.data.builders.base import build as build
from mmlm.data.builders.base import built_folder as built_folder
from mmlm.data.builders.scenes import KINDS as KINDS
from mmlm.data.builders.scenes import Puzzle as Puzzle
from mmlm.data.builders.scenes import make_puzzle as make_puzzle
from mmlm.data.builders.scenes import make_puzzles as make_puzzles
