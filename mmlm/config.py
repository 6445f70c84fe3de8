"""What every config of MMLM has in common: frozen, strict, all complaints at once.

A config stands beside the class it builds; this module only holds the base classes and
the one reader of YAML. It does not know any recipe, part or path convention.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmlm.errors import ConfigError


class Config(BaseModel):
    """Base of all configs: frozen, no unknown keys, field docstrings become descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, origin: str = "config") -> Self:
        """Build a config from plain values, as YAML or JSON give them.

        Args:
            values: Plain values; lists stand for tuples, as in JSON.
            origin: Where the values came from, for the message.

        Raises:
            ConfigError: naming every wrong key at once.
        """
        try:
            return cls.model_validate_json(json.dumps(values))
        except ValidationError as error:
            complaints = "\n".join(f"  {_complaint(fault)}" for fault in error.errors())
            raise ConfigError(f"{origin} is not a valid {cls.__name__}:\n{complaints}") from None
        except TypeError as error:
            raise ConfigError(f"{origin} holds a value that is not plain YAML: {error}.") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which `from_dict` makes an equal config."""
        return self.model_dump(mode="json")


class PartConfig(Config):
    """Base of the configs that stand in a registry: `to_dict` also gives the name, as `use`."""

    use: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that the registry's `read` turns into an equal config."""
        return {"use": self.use, **super().to_dict()}


def _complaint(fault: Any) -> str:
    """Put one pydantic fault as `key: message (got value)`."""
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{key}: no such key"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{key}: {message} (got {fault['input']!r})" if key else message


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2, ``558_000`` besides, and no duplicate keys.

    Dates, ``1:30``, ``010`` and ``on`` are strings; only true and false are booleans.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice: the first would be lost in silence."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    letter: [
        (tag, rule)
        for tag, rule in rules
        if not tag.endswith((":bool", ":float", ":int", ":timestamp"))
    ]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\.[0-9_]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, origin: str) -> Any:
    """Read YAML 1.2 scalars safely: ``5e-4`` is a float, ``on`` is a string.

    Raises:
        ConfigError: if the text is not YAML; the message holds the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from None


def read_yaml(path: Path) -> Any:
    """Read one YAML file.

    Raises:
        ConfigError: if the file cannot be read or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a YAML file: {error}") from None
    return parse_yaml(text, origin=str(path))
