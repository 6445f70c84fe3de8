"""What every command has in common: its help page, its words, and its complaints.

A help page says what happens, then the words, then examples with their cost. Unknown
words are errors that name the nearest known one. This module knows no command.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from mmlm.errors import UsageError

Options = argparse.Namespace


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Args:
        name: The word after ``mmlm``.
        usage: The rest of the usage line: ``"RECIPE [KEY=VALUE …] [options]"``.
        about: What happens, in a sentence or two.
        arguments: Adds the words and flags to a `Parser`.
        run: Does the work; what it returns is the exit code, None is 0.
        examples: Lines of ``(command, cost or purpose)``.
    """

    name: str
    usage: str
    about: str
    arguments: Callable[[Parser], None]
    run: Callable[[Options], int | None]
    examples: Sequence[tuple[str, str]] = ()

    def parser(self) -> Parser:
        """Return the parser of this command."""
        parser = Parser(
            prog=f"mmlm {self.name}",
            usage=f"mmlm {self.name} {self.usage}".rstrip(),
            description=self.about,
            epilog=_examples(self.examples),
        )
        self.arguments(parser)
        return parser

    def read(self, words: Sequence[str]) -> Options:
        """Turn the words after the command's name into options.

        Raises:
            UsageError: for a word or flag that the command does not know.
        """
        parser = self.parser()
        options, unknown = parser.parse_known_intermixed_args(words)
        if unknown:
            raise UsageError(f"mmlm {self.name}: {parser.complain(unknown[0])}")
        return options


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are `UsageError` and name the nearest known flag."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **settings)
        self._positionals.title = None  # the words stand in the help without a heading

    def word(self, name: str, **settings: Any) -> None:
        """Add a positional argument. With ``nargs="*"`` it needs a default, or it is required."""
        self.add_argument(name, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        raise UsageError(f"{self.prog}: {message}")

    def complain(self, unknown: str) -> str:
        """Say that a flag or word is unknown, and which known one is nearest."""
        if not unknown.startswith("-"):
            return f"one word too many: {unknown!r}. Usage: {self.usage}"
        flags = sorted(self._option_string_actions)
        return f"no flag is named {unknown!r}.{nearest(unknown.partition('=')[0], flags)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?``, or nothing where no known name is near.

    >>> nearest("trian", ["train", "eval"])
    " Did you mean 'train'?"
    """
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def one_of(kind: str, names: Iterable[str]) -> Callable[[str], str]:
    """Return an argparse type that takes one of `names` and names the nearest otherwise."""
    known = list(names)

    def read(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(
                f"no {kind} is named {word!r}.{nearest(word, known)} Known: {', '.join(known)}."
            )
        return word

    return read


def key_values(words: Sequence[str]) -> dict[str, str]:
    """Split ``KEY=VALUE`` words.

    >>> key_values(["run.seed=1"])
    {'run.seed': '1'}

    Raises:
        UsageError: for a word without ``=``, or a key that stands twice.
    """
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not KEY=VALUE, such as stages.align.peak_lr=5e-4.")
        if key in values:
            raise UsageError(f"The key {key!r} is given twice: {values[key]!r} and {value!r}.")
        values[key] = value
    return values


def hush() -> None:
    """Let transformers show no bars for weights read from disk; downloads keep theirs."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging

    downloads_are_quiet = are_progress_bars_disabled()
    logging.disable_progress_bar()  # this one silences downloads as well
    (disable_progress_bars if downloads_are_quiet else enable_progress_bars)()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the words of descriptions as they stand, and lines up the help in one column."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 100) - 2
        super().__init__(prog, max_help_position=24, width=width)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        """Print the usage line as the command wrote it."""
        super().add_usage(usage, actions, groups, "usage: " if prefix is None else prefix)


def _examples(rows: Sequence[tuple[str, str]]) -> str | None:
    if not rows:
        return None
    width = max(len(command) for command, _ in rows)
    lines = [f"  {command:{width}}  {cost}".rstrip() for command, cost in rows]
    return "\n".join(["examples:", *lines])
