"""`mmlm app`: the web page on one model, or on two; `mmlm serve`: the API for programs."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from mmlm.cli.base import Command, Options, Parser, hush
from mmlm.errors import UsageError


def _app_arguments(parser: Parser) -> None:
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
    add_bits(parser)


def add_bits(parser: Parser) -> None:
    """Add the flag that packs the language model."""
    parser.add_argument(
        "--bits",
        metavar="N",
        type=int,
        choices=(4, 8),
        help="hold the language model in 4 bits (NF4) or 8; needs bitsandbytes",
    )


def _named_folder(word: str) -> tuple[str, str]:
    name, mark, folder = word.partition("=")
    if not (mark and name and folder):
        raise argparse.ArgumentTypeError(f"NAME=FOLDER was expected (got {word!r}).")
    return name, folder


def _app(options: Options) -> None:
    if len(options.models) > 2:
        raise UsageError(f"mmlm app: one model or two (got {len(options.models)}).")
    auth = None
    if options.auth is not None:
        password = os.environ.get("MMLM_PASSWORD")
        if not password:
            raise UsageError("mmlm app: --auth needs a password in the variable MMLM_PASSWORD.")
        auth = (options.auth, password)
    _refuse_missing(options.models)
    from mmlm.serving.chat_ui import serve_page

    hush()
    serve_page(
        options.models,
        host=options.host,
        port=options.port,
        open_browser=options.open,
        auth=auth,
        bits=options.bits,
    )


def _serve_arguments(parser: Parser) -> None:
    parser.word("models", metavar="MODEL", nargs="+", help="runs, model folders, or Hub ids")
    parser.add_argument(
        "--host",
        metavar="HOST",
        default="127.0.0.1",
        help="where to listen; 0.0.0.0 lets other machines in (default: 127.0.0.1)",
    )
    parser.add_argument("--port", metavar="N", type=int, default=8000, help="default: 8000")
    parser.add_argument("--ui", action="store_true", help="serve the web page too")
    parser.add_argument(
        "--auth",
        action="store_true",
        help="clients must send one of the keys in the variable MMLM_API_KEYS (key,key)",
    )
    parser.add_argument(
        "--allow-host",
        metavar="HOST",
        action="append",
        default=[],
        help="pictures may be fetched from this host; may stand several times (default: none)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "vllm"),
        default="local",
        help="local: this process, for few users (default); vllm: a vLLM process, for many",
    )
    parser.add_argument(
        "--engine-url",
        metavar="URL",
        help="with --engine vllm: an OpenAI server that runs already, on this machine or near it",
    )
    parser.add_argument(
        "--engine-options",
        metavar="WORDS",
        default="",
        help="with --engine vllm: more words for `vllm serve`",
    )
    add_bits(parser)
    parser.add_argument(
        "--adapter",
        metavar="NAME=FOLDER",
        action="append",
        default=[],
        type=_named_folder,
        help="an adapter on the model, chosen by `model` in a request; may stand several times",
    )
    parser.add_argument(
        "--cache-mb",
        metavar="N",
        type=int,
        default=1024,
        help="memory for the conversations of a model that are remembered (default: 1024)",
    )


def _serve(options: Options) -> None:
    keys: list[str] = []
    if options.auth:
        keys = [key.strip() for key in os.environ.get("MMLM_API_KEYS", "").split(",")]
        if not all(keys):
            raise UsageError("mmlm serve: --auth needs keys in the variable MMLM_API_KEYS.")
    _refuse_missing(options.models)
    from mmlm.serving.serve import EngineChoice, serve_api

    if options.cache_mb < 0:
        raise UsageError(f"mmlm serve: --cache-mb must be 0 or more (got {options.cache_mb}).")
    engine = EngineChoice(
        kind=options.engine,
        url=options.engine_url,
        options=tuple(shlex.split(options.engine_options)),
        bits=options.bits,
        adapters=tuple(options.adapter),
        cache_bytes=options.cache_mb << 20,
    )
    hush()
    serve_api(
        options.models,
        host=options.host,
        port=options.port,
        keys=keys,
        allowed_hosts=options.allow_host,
        page=options.ui,
        engine=engine,
    )


def _refuse_missing(models: list[str]) -> None:
    """Refuse what is plainly meant as a folder and is none, before the Hub is asked for it."""
    for model in models:
        if model.startswith((".", "/", "runs/")) and not Path(model).exists():
            raise UsageError(f"There is no folder {model}.")


COMMANDS = {
    "app": Command(
        name="app",
        usage="MODEL [MODEL] [options]",
        about="Open the web page: talk to a model about pictures, or to two side by side.",
        arguments=_app_arguments,
        run=_app,
        examples=[
            ("mmlm app runs/quickstart", "the page on what the quickstart trained"),
            ("mmlm app runs/a runs/b", "the same questions to both"),
        ],
    ),
    "serve": Command(
        name="serve",
        usage="MODEL ... [options]",
        about="Serve models to programs that speak the OpenAI API, at http://HOST:PORT/v1.",
        arguments=_serve_arguments,
        run=_serve,
        examples=[
            ("mmlm serve runs/quickstart", "for this machine"),
            ("mmlm serve runs/quickstart --ui --host 0.0.0.0 --auth", "for others, with keys"),
            ("mmlm serve runs/a/model --engine vllm", "for many, where vLLM is installed"),
        ],
    ),
}
