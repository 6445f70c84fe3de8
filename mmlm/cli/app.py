"""`mmlm app`: the web page on one model, or on two side by side."""

from __future__ import annotations

import os
from pathlib import Path

from mmlm.cli.base import Command, Options, Parser, hush
from mmlm.errors import UsageError


def _arguments(parser: Parser) -> None:
    parser.word(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a run, a model folder, or a Hub id; two are shown side by side",
    )
    parser.add_argument(
        "--host",
        metavar="HOST",
        default="127.0.0.1",
        help="where to listen; 0.0.0.0 lets other machines in (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--port", metavar="N", type=int, help="the port (default: the first free one from 7860)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument(
        "--auth",
        metavar="NAME",
        help="ask visitors for this name and the password in the variable MMLM_PASSWORD",
    )


def _run(options: Options) -> None:
    if len(options.models) > 2:
        raise UsageError(f"mmlm app: one model or two (got {len(options.models)}).")
    auth = None
    if options.auth is not None:
        password = os.environ.get("MMLM_PASSWORD")
        if not password:
            raise UsageError("mmlm app: --auth needs a password in the variable MMLM_PASSWORD.")
        auth = (options.auth, password)
    missing = [
        m for m in options.models if m.startswith((".", "/", "runs/")) and not Path(m).exists()
    ]
    if missing:
        raise UsageError(f"mmlm app: there is no folder {missing[0]}.")
    from mmlm.serving.chat_ui import serve_page

    hush()
    serve_page(
        options.models,
        host=options.host,
        port=options.port,
        open_browser=options.open,
        auth=auth,
    )


COMMANDS = {
    "app": Command(
        name="app",
        usage="MODEL [MODEL] [options]",
        about="Open the web page: talk to a model about pictures, or to two side by side.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm app runs/quickstart", "the page on what the quickstart trained"),
            ("mmlm app runs/a runs/b", "the same questions to both"),
        ],
    )
}
