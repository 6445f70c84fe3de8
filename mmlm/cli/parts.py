"""`mmlm parts`: what can be named in a recipe, a line each; one part with all its settings."""

from __future__ import annotations

import inspect
import textwrap
from importlib import import_module
from typing import Any

from mmlm.cli.base import Command, Options, Parser, one_of
from mmlm.config import PartConfig
from mmlm.errors import UsageError
from mmlm.registry import Registry

# The key in a recipe, and where its registry is.
REGISTRIES: dict[str, tuple[str, str]] = {
    "image": ("mmlm.images", "image_policies"),
    "video": ("mmlm.images", "video_policies"),
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


_SHOWN = 12


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
        if options.kind == "vision":
            print(f"\n{_families()}")
    elif options.kind == "vision" and options.name not in load_registry("vision"):
        print(_encoders(options.name))
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


def _encoders(pattern: str) -> str:
    """List the encoders of the installed libraries whose names are like a pattern."""
    from mmlm.vision.catalogue import describe, matching

    found = matching(pattern)
    if not found:
        raise UsageError(
            f"No vision encoder, model of timm or model type of transformers is like {pattern!r}. "
            f"`mmlm parts vision` lists the families; `*` stands for anything."
        )
    head = f"  {'name':44}{'side px':>9}{'others':>14}{'tokens':>8}{'width':>7}{'M params':>10}"
    lines = [f"{head}  stock export (with mlp)"]
    for known in found[:_SHOWN]:
        row = describe(known)
        name = f"{known.library}:{known.name}"
        if row.facts is None:
            lines.append(f"  {name:44}{row.reason[:100]}")
            continue
        facts = row.facts
        others = f"{facts.step}·n" if facts.rule == "multiple" else "fixed"
        tokens = facts.out_grid(facts.side_size).num_tokens
        lines.append(
            f"  {name:44}{facts.side[0]:>9}{others:>14}{tokens:>8,}{facts.width:>7,}"
            f"{row.num_parameters / 1e6:>10,.1f}  {_stock(row.encoder, known.words)}"
        )
    if len(found) > _SHOWN:
        lines.append(f"  … {len(found) - _SHOWN:,} more; name them more closely")
    return "\n".join(lines)


def _stock(encoder: Any, words: dict[str, Any]) -> str:
    """Return the stock class that this encoder, an MLP and a Llama would be saved as, or no."""
    from mmlm.hub.stock import match
    from mmlm.modeling import MMLMConfig

    for layer in (-2, "last"):
        own = encoder.facts.model_copy(
            update={"feature": f"hidden_states[{layer}]"} if layer == -2 else {}
        )
        config = MMLMConfig(
            vision_config=encoder.tower_config,
            vision=words | ({"layer": layer} if words["use"] == "hf" else {}),
            vision_facts=own.to_dict(),
            connector={"use": "mlp", "depth": 2},
        )
        target = match(config).target
        if target is not None:
            return f"yes: {target.class_name} (layer {layer})"
        if words["use"] != "hf":
            break
    return "no"


def _families() -> str:
    """Return the families of encoders that the installed libraries have."""
    from mmlm.vision.catalogue import all_known

    families: dict[str, dict[str, int]] = {}
    for known in all_known():
        own = families.setdefault(known.library, {})
        own[known.family] = own.get(known.family, 0) + 1
    lines = ["families (`mmlm parts vision PATTERN` shows sizes, tokens and parameters):"]
    for library, own in families.items():
        names = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in sorted(own.items()))
        lines += textwrap.wrap(
            f"{library}: {names}", 100, initial_indent="  ", subsequent_indent="    "
        )
    return "\n".join(lines)


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
        about="List what can be named in a recipe; with a NAME, all settings of that part. Behind\n"
        "`vision`, a pattern lists encoders of transformers and timm.",
        arguments=_arguments,
        run=_run,
        examples=[
            ("mmlm parts", "everything, a line each"),
            ("mmlm parts connector", "one kind"),
            ("mmlm parts connector mlp", "the settings of one part"),
            ("mmlm parts vision 'convnext*tiny'", "encoders with sizes, tokens, parameters"),
        ],
    )
}
