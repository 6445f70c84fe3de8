"""`mmlm chat`: one answer, or a conversation in the terminal.

What is typed is a question, but for words that begin with a slash. `Terminal` holds the
conversation; how answers come about is in `mmlm.generation`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.base import Command, Options, Parser, hush, nearest
from mmlm.errors import MMLMError, UsageError

if TYPE_CHECKING:
    from mmlm.generation import Chat

HELP = """\
  /image FILE …   show pictures with the next question
  /undo           take back the last question and its answer
  /save FILE      write the conversation down, as .md or .json
  /new            begin again, with nothing said and nothing shown
  /help           these words
  /quit           leave (so does Ctrl-D); Ctrl-C stops an answer"""


def _arguments(parser: Parser) -> None:
    parser.word("model", metavar="MODEL", help="a run, a model folder, or a Hub id")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, print the answer, and leave")
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        type=Path,
        help="a picture for the first question; may stand several times",
    )
    parser.add_argument("--json", action="store_true", help="print each answer as one line of JSON")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=128, help="longest answer (default: 128)"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0, the default, always answers alike",
    )
    parser.add_argument(
        "--visual-tokens",
        metavar="K",
        type=int,
        help="show the first K tokens of each picture; for models with ordered_queries",
    )
    parser.add_argument(
        "--bits",
        metavar="N",
        type=int,
        choices=(4, 8),
        help="hold the language model in 4 bits (NF4) or 8; needs bitsandbytes",
    )


def _run(options: Options) -> None:
    missing = [str(path) for path in options.image if not path.is_file()]
    if missing:
        raise UsageError(f"mmlm chat: there is no picture {missing[0]}.")
    from mmlm.assistant import load

    hush()
    assistant = load(options.model)
    if options.bits is not None:
        from mmlm.generation.bits import hold_in_bits

        hold_in_bits(assistant.model, options.bits)
    chat = assistant.chat(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        visual_tokens=options.visual_tokens,
    )
    terminal = Terminal(chat, as_json=options.json)
    terminal.show(options.image)
    if options.prompt is not None:
        terminal.ask(options.prompt)
    else:
        talk(terminal, options.model)


def talk(terminal: Terminal, model: str | Path) -> None:
    """Hold a conversation until the person leaves, after saying what the model can see."""
    from mmlm.serving.about import read_about

    live = sys.stdin.isatty() and not terminal.as_json
    if live:
        about = read_about(model)
        print(f"{about.title}: {about.sentence}\n{HELP}\n")
        _remember_lines()
    for line in _lines("you: " if live else ""):
        try:
            if not terminal.take(line):
                break
        except MMLMError as error:
            print(error, file=sys.stderr)


class Terminal:
    """A conversation whose questions are lines of text.

    Args:
        chat: The conversation.
        as_json: Print each answer as a line of JSON, all at once.
    """

    def __init__(self, chat: Chat, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._chat = chat
        self._shown: list[Path] = []
        self._commands: dict[str, Callable[[list[str]], bool]] = {
            "/image": self._image,
            "/undo": self._undo,
            "/save": self._save,
            "/new": self._new,
            "/help": self._help,
            "/quit": lambda words: False,
        }

    def take(self, line: str) -> bool:
        """Take one line; returns whether the conversation goes on.

        Raises:
            UsageError: for an unknown slash word.
        """
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self.ask(line)
            return True
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"{line!r} cannot be read: {error}.") from None
        if name not in self._commands:
            raise UsageError(
                f"No word is named {name!r}.{nearest(name, self._commands)} See /help."
            )
        return self._commands[name](words)

    def show(self, paths: list[Path]) -> None:
        """Put pictures before the next question.

        Raises:
            ImageError: if one cannot be opened; then none is shown.
        """
        from mmlm.images import all_readers, open_image

        for path in paths:
            open_image(path, readers=all_readers())
        self._shown += paths

    def ask(self, question: str) -> None:
        """Ask, and print the answer as it comes; Ctrl-C ends it early."""
        images, self._shown = self._shown, []
        if self.as_json:
            answer = self._chat.ask(question, images)
            row: dict[str, Any] = {"question": question, "images": [str(path) for path in images]}
            print(json.dumps({**row, "answer": answer}, ensure_ascii=False), flush=True)
            return
        pieces = self._chat.ask(question, images, stream=True)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" …", end="")
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()
        print(flush=True)

    def _image(self, words: list[str]) -> bool:
        if not words:
            raise UsageError("/image needs the path of a picture: /image photo.jpg")
        self.show([Path(word).expanduser() for word in words])
        self._draw(len(words))
        names = ", ".join(path.name for path in self._shown)
        self._say(f"The next question is asked about {names}.")
        return True

    def _undo(self, words: list[str]) -> bool:
        del words
        self._shown = []
        if not self._chat.messages:
            raise UsageError("Nothing was asked yet, so there is nothing to take back.")
        question = self._chat.messages[-2].text
        self._chat.undo()
        self._say(f"Taken back: {question}")
        return True

    def _draw(self, number: int) -> None:
        """Show the last pictures as blocks, where the terminal has colours."""
        from mmlm.cli.chat_loop import blocks, shows_colours
        from mmlm.images import all_readers, open_image

        if not self.as_json and shows_colours(sys.stdout):
            for path in self._shown[-number:]:
                print(blocks(open_image(path, readers=all_readers())))

    def _save(self, words: list[str]) -> bool:
        from mmlm.cli.chat_loop import save_talk

        if len(words) != 1:
            raise UsageError("/save needs the name of one file: /save talk.md")
        path = Path(words[0]).expanduser()
        save_talk(self._chat.messages, path)
        self._say(f"Written to {path}.")
        return True

    def _new(self, words: list[str]) -> bool:
        del words
        self._shown = []
        while self._chat.messages:
            self._chat.undo()
        self._say("A new conversation.")
        return True

    def _help(self, words: list[str]) -> bool:
        del words
        self._say(HELP)
        return True

    def _say(self, text: str) -> None:
        """Say something that is no answer; not among answers that a program reads."""
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)


def _lines(prompt: str) -> Iterator[str]:
    """Give what is typed until the end of the input, or Ctrl-C at the prompt."""
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            if prompt:
                print()
            return


def _remember_lines() -> None:
    """Let the arrow keys bring earlier lines back, where this Python can."""
    try:
        import readline
    except ImportError:
        return
    readline.set_history_length(1000)


COMMANDS = {
    "chat": Command(
        name="chat",
        usage="MODEL [--prompt TEXT] [--image FILE ...] [options]",
        about="Talk to a model in the terminal, or get one answer.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm chat runs/quickstart", "a conversation; /help lists its words"),
            ('mmlm chat runs/quickstart --image a.png --prompt "What is this?"', "one answer"),
            ("mmlm chat runs/quickstart --json < questions.txt", "a line of JSON each"),
        ],
    )
}
