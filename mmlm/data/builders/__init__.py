"""Data sets that MMLM makes itself, out of packages that anybody can install.

    npm packages ──► builders ──► a folder of pictures and rows ──► sources
                     you are here

`build(name)` makes the data set of that name once and keeps it in the cache; a source
``{use: build, name: quickstart, rows: align}`` reads it. A builder knows pictures and words,
and no model. To add one: a module with a function from an empty folder to a finished one,
and a line in `base.BUILDERS`.
"""

from mmlm.data.builders.base import BUILDERS as BUILDERS
from mmlm.data.builders.base import Built as Built
from mmlm.data.builders.base import build as build
from mmlm.data.builders.base import built_folder as built_folder
