"""Tables from a short public name to a part.

A registry knows names and classes and nothing about what the parts do. Each room that
has parts to choose from owns one registry, in its `base` module; the part registers its
config class there. Packages outside MMLM register through an entry point of the group
`mmlm.<kind>s`, which is read only when a name is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, cast

from mmlm.errors import ConfigError, RegistryError


class Part(Protocol):
    """What a registered config class offers: a name, and reading itself from plain values."""

    use: ClassVar[str]

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, origin: str = "config") -> Self:
        """Build the config from plain values; `origin` says where they came from."""
        ...


PartT = TypeVar("PartT", bound=Part)
ClassT = TypeVar("ClassT", bound=type[Any])


class Registry(Generic[PartT]):
    """A table from a short public name to a config class.

    Args:
        kind: What the entries are, in the singular, for messages: ``"connector"``.
        plural: The plural, where it is not `kind` + "s"; names the entry-point group.
    """

    def __init__(self, kind: str, *, plural: str | None = None) -> None:
        self.kind = kind
        self._group = f"mmlm.{plural or kind + 's'}"
        self._entries: dict[str, type[PartT]] = {}
        self._plugins_loaded = False

    def register(self, name: str) -> Callable[[ClassT], ClassT]:
        """Return a decorator that files a class under `name` and tells the class its name."""

        def file_under_name(cls: ClassT) -> ClassT:
            holder = self._entries.setdefault(name, cast("type[PartT]", cls))
            if holder is not cls:
                raise RegistryError(
                    f"The {self.kind} name {name!r} is already taken by "
                    f"{holder.__module__}.{holder.__qualname__}. "
                    f"Choose another name for {cls.__module__}.{cls.__qualname__}."
                )
            cls.use = name
            return cls

        return file_under_name

    def read(self, values: Any, *, origin: str) -> PartT:
        """Turn ``{"use": name, **settings}`` into the config of that part.

        Raises:
            ConfigError: if `values` is not such a mapping; the message begins with `origin`.
        """
        if not isinstance(values, dict) or not isinstance(values.get("use"), str):
            raise ConfigError(
                f"{origin} must name a {self.kind}, such as {{use: {next(iter(self), 'name')}}} "
                f"(got {values!r}). Known: {', '.join(self)}."
            )
        settings = {key: value for key, value in values.items() if key != "use"}
        return self[values["use"]].from_dict(settings, origin=f"{origin} (use: {values['use']})")

    def __getitem__(self, name: str) -> type[PartT]:
        if name not in self._entries:
            self._load_plugins()
        if name in self._entries:
            return self._entries[name]
        near = get_close_matches(name, self._entries, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RegistryError(f"No {self.kind} is named {name!r}.{hint} Known: {', '.join(self)}.")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for plugin in entry_points(group=self._group):
            plugin.load()
