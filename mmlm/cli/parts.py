"""`mmlm parts`: what can be named in a recipe, a line each; one part with all its settings."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from mmlm.cli.base import Command, Options, Parser, one_of
from mmlm.config import PartConfig
from mmlm.registry import Registry

# The key in a recipe, and where its registry is.
REGISTRIES: dict[str, tuple[str, str]] = {
    "image": ("mmlm.images", "image_policies"),
    "reader": ("mmlm.images", "picture_readers"),
    "vision": ("mmlm.vision", "encoders"),
    "reducer": ("mmlm.reducers", "reducers"),
    "connector": ("mmlm.connectors", "connectors"),
    "language": ("mmlm.language", "languages"),
    "adapters": ("mmlm.language.adapters", "adapters"),
    "source": ("mmlm.data", "sources"),
    "objective": ("mmlm.training.objectives", "objectives"),
    "scorer": ("mmlm.evaluation.scorers", "scorers"),
}


def _arguments(parser: Parser) -> None:
    kinds = ", ".join(REGISTRIES)
    parser.word(
        "kind", metavar="KIND", nargs="?", type=one_of("kind", REGISTRIES), help=f"one of: {kinds}"
    )
    parser.word("name", metavar="NAME", nargs="?", help="a part; prints its settings")


def _run(options: Options) -> None:
    if options.name is None:
        kinds = [options.kind] if options.kind else list(REGISTRIES)
        print("\n\n".join(_list(kind) for kind in kinds))
    else:
        print(_describe(options.kind, load_registry(options.kind)[options.name]))


def load_registry(kind: str) -> Registry[Any]:
    """Return the registry behind a key of a recipe."""
    module, name = REGISTRIES[kind]
    return getattr(import_module(module), name)


def _list(kind: str) -> str:
    registry = load_registry(kind)
    width = max((len(name) for name in registry), default=0) + 2
    lines = [f"  {name:{width}}{_first_sentence(registry[name])}" for name in registry]
    return "\n".join([f"{kind}: {{use: …}}", *lines])


def _describe(kind: str, config: type[PartConfig]) -> str:
    lines = [f"{kind}: {{use: {config.use}}}", "", inspect.getdoc(config) or "", "", "settings:"]
    width = max((len(name) for name in config.model_fields), default=0) + 2
    for name, field in config.model_fields.items():
        default = "required" if field.is_required() else f"default: {field.get_default()!r}"
        about = " ".join((field.description or "").split())
        lines += [f"  {name:{width}}{default}", f"  {'':{width}}{about}"]
    if not config.model_fields:
        lines.append("  none")
    return "\n".join(lines)


def _first_sentence(config: type[PartConfig]) -> str:
    return (inspect.getdoc(config) or "").partition("\n")[0]


COMMANDS = {
    "parts": Command(
        name="parts",
        usage="[KIND [NAME]]",
        about="List what can be named in a recipe; with a NAME, all settings of that part.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm parts", "everything, a line each"),
            ("mmlm parts connector", "one kind"),
            ("mmlm parts connector mlp", "the settings of one part"),
        ],
    )
}
