"""What learns: patterns over public names, and the table that says what they matched.

Public names begin with a part (vision, connector, language, head; adapters for what a stage
adds) and go on as the parameter is called inside it, whatever wraps the model. A pattern that
matches nothing is nearly always a misspelling; a silent freeze is the classic bug of this field.
``vision.*[12:]`` means the layers from 12 on.

Where there are adapters, ``language.layers.0.*`` means those that stand there, as
``adapters.language.layers.0.*`` does, and the language model's own weights stand still. A pattern
that reaches no adapter (``language.norm.*``) still means the weights that it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from mmlm.errors import ConfigError
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.training.depth import is_inside, split_slice

PARTS = ("vision", "connector", "language", "head")
_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "_checkpoint_wrapped_module.")
_ADAPTER_MARKS = ("lora_", "modules_to_save", "trainable_tokens_")
_ADAPTERS, _BELOW = "adapters.", ".base_layer."


@dataclass(frozen=True)
class PartReport:
    """How much of a part learns, in numbers of weights."""

    part: str
    learning: int
    total: int


def plain_name(name: str) -> str:
    """Return the name of a parameter without what wrappers put before it.

    >>> plain_name("module.base_model.model.model.connector.0.weight")
    'model.connector.0.weight'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def public_name(name: str) -> str:
    """Return the name that `learn` patterns match.

    >>> public_name("model.language.layers.0.mlp.up_proj.weight")
    'language.layers.0.mlp.up_proj.weight'
    >>> public_name("lm_head.weight")
    'head.weight'
    >>> public_name("model.language.layers.0.q_proj.lora_A.default.weight")
    'adapters.language.layers.0.q_proj.lora_A.default.weight'
    """
    plain = plain_name(name)
    part = MMLMForConditionalGeneration.part_of(plain)
    rest = plain.removeprefix("model.").split(".", 1)[1].replace("base_layer.", "")
    public = f"{part}.{rest}"
    return f"{_ADAPTERS}{public}" if any(mark in plain for mark in _ADAPTER_MARKS) else public


def matching(model: nn.Module, patterns: Mapping[str, float]) -> dict[str, str]:
    """Return, for every parameter that learns, the pattern that chose it; see `match_names`.

    Raises:
        ConfigError: if a pattern matches nothing.
    """
    return match_names([name for name, _ in model.named_parameters()], patterns)


def match_names(names: Sequence[str], patterns: Mapping[str, float]) -> dict[str, str]:
    """Return, for the name of every parameter that learns, the pattern that chose it.

    Of several patterns that match, the last one counts, so that a general one can stand first.

    Raises:
        ConfigError: if a pattern matches nothing, or there are adapters that no pattern reaches.
    """
    public = {name: public_name(name) for name in names}
    adapters = [one for one in public.values() if one.startswith(_ADAPTERS)]
    reaching = {p for p in patterns if any(_matches(one, p) for one in adapters)}
    chosen: dict[str, str] = {}
    used: set[str] = set()
    for name, one in public.items():
        own = one.startswith("language.")
        for pattern in patterns:
            if _BELOW in name or (own and pattern in reaching) or not _matches(one, pattern):
                continue
            chosen[name] = pattern
            used.add(pattern)
    idle = [pattern for pattern in patterns if pattern not in used]
    if idle:
        raise ConfigError(_no_match(idle, public))
    if adapters and not reaching:
        raise ConfigError(
            f"The stage has adapters, and `learn` ({', '.join(map(repr, patterns))}) names none of "
            f"them. Write 'adapters.*', or leave `adapters` out of the stage."
        )
    return chosen


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter, an adapter of it, or a module that holds it."""
    pattern, layers = split_slice(pattern)
    ways = (name, name.removeprefix(_ADAPTERS))
    named = any(fnmatchcase(one, pattern) or one.startswith(f"{pattern}.") for one in ways)
    return named and is_inside(name, layers)


def _no_match(idle: list[str], public: Mapping[str, str]) -> str:
    parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in sorted(public.values())))
    message = (
        f"`learn` names {', '.join(map(repr, idle))}, which matches no parameter"
        f"{' that can learn' if 'adapters' in parts else ''}. "
        f"Parts of this model: {parts}. Write e.g. 'connector.*'."
    )
    if any(pattern.startswith("head") for pattern in idle) and "head" not in parts:
        message += (
            " The head shares its weights with the embedding of the language model; name it as "
            "'language.embed_tokens.*'."
        )
    if any(pattern.startswith("adapters") for pattern in idle) and "adapters" not in parts:
        message += " Adapters are put beside the weights by `adapters:` in the stage."
    if any(_matches(one, p) for p in idle for name, one in public.items() if _BELOW in name):
        message += " A weight that has an adapter stands still; 'adapters.*' names the adapters."
    return message


def freeze(model: nn.Module, patterns: Mapping[str, float]) -> list[PartReport]:
    """Freeze all of `model` but the parameters that a pattern matches; report by part.

    Raises:
        ConfigError: if a pattern matches nothing.
    """
    chosen = matching(model, patterns)
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        part = public_name(name).split(".")[0]
        count = counts.setdefault(part, [0, 0])
        count[0] += parameter.numel() if name in chosen else 0
        count[1] += parameter.numel()
    order = [*PARTS, "adapters"]
    return [PartReport(part, *counts[part]) for part in sorted(counts, key=order.index)]


def table(reports: list[PartReport]) -> str:
    """Return the table of what learns, one part a line.

    >>> print(table([PartReport("vision", 0, 9), PartReport("connector", 1500, 1500)]))
    vision         0 of      9 learn (  0.0 %)
    connector  1,500 of  1,500 learn (100.0 %)
    """
    name_width = max(len(report.part) for report in reports)
    width = max(len(f"{report.total:,}") for report in reports) + 1
    return "\n".join(
        f"{report.part:{name_width}} {report.learning:>{width},} of {report.total:>{width},} "
        f"learn ({100 * report.learning / max(report.total, 1):5.1f} %)"
        for report in reports
    )
