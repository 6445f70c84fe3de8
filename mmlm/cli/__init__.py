"""The command line: words in, one call of a room, words out.

    __main__ ──► cli ──► training | evaluation | serving ──► assistant ──► …
                 you are here

Each module holds one command or a small group. A command reads its words with argparse,
imports the room that does the work inside its `run`, and prints what came of it; nothing
here computes. `main` holds the table of commands; to add one, write a module with a
`Command` and one row of that table. Importing this package loads neither torch nor
transformers.
"""

from mmlm.cli.main import run as run
