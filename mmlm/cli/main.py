"""The table of commands, and what happens to their errors.

`run` finds the command, lets it read its words, and turns what comes back into an exit
code: 0 done, 1 failed, 2 wrong usage. An `MMLMError` is printed without a traceback: it is
something that the user can mend. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from mmlm.cli.base import Command, nearest
from mmlm.errors import MMLMError, UsageError

DONE, FAILED, WRONG_USAGE = 0, 1, 2

# name: (module, what it does). A module is imported when its command is called for.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart", "train a small real assistant here, score it, talk to it"),
    "train": ("train", "train a model, stage by stage, as a recipe says"),
    "sweep": ("sweep", "train a recipe with other parts, on the same tokens, and compare"),
    "check": ("check", "what a recipe will do, cost and learn, before it runs"),
    "data": ("data", "make a source, build it, look at it"),
    "eval": ("evaluate", "measure a model, with and without the image"),
    "chat": ("chat", "talk to a model in the terminal"),
    "app": ("app", "talk to a model on a web page"),
    "serve": ("app", "serve a model to programs that speak the OpenAI API"),
    "export": ("hub", "write a model in another form"),
    "import": ("hub", "read a checkpoint of another project"),
    "push": ("hub", "upload a model to the Hugging Face Hub"),
    "parts": ("parts", "what can be named in a recipe"),
    "probe": ("probe", "what an image encoder takes, gives and costs"),
    "recipes": ("recipes", "the recipes there are; copy one"),
    "doctor": ("doctor", "what this machine and installation can do"),
}


def run(words: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        return _dispatch(list(words))
    except UsageError as error:
        print(error, file=sys.stderr)
        return WRONG_USAGE
    except MMLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as stop:
        # Ctrl-C itself says nothing; what was stopped gently says how to go on.
        print(f"\nStopped: {stop}." if str(stop) else "\nStopped.", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # The reader of our output (head, less) has left; that is no failure of the command.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def find_command(name: str) -> Command:
    """Return a command by its name.

    Raises:
        UsageError: naming the nearest command.
    """
    if name not in COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        known = ["--help", "--version"] if kind == "flag" else COMMANDS
        raise UsageError(
            f"mmlm: no {kind} is named {name!r}.{nearest(name, known)} See: mmlm --help"
        )
    commands: dict[str, Command] = import_module(f"mmlm.cli.{COMMANDS[name][0]}").COMMANDS
    return commands[name]


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return DONE if words else WRONG_USAGE
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"mmlm {version('mmlm')}")
        return DONE
    command = find_command(words[0])
    try:
        options = command.read(words[1:])
    except SystemExit:
        return DONE  # argparse has printed the help page
    return command.run(options) or DONE


def _help() -> str:
    rows = [f"  {name:12}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mmlm COMMAND [words] [options]",
            "",
            "Build vision-language assistants out of parts that somebody else already trained.",
            "",
            *rows,
            "",
            "  mmlm COMMAND --help    the words of a command, with examples",
            "  mmlm --version         the version",
        ]
    )
