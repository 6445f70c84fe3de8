"""MMLM: vision-language assistants out of parts that somebody else already trained.

The public names are listed in `_PUBLIC` and loaded when they are first used, so that
``import mmlm`` takes neither torch nor transformers into memory. What the names do is
written in the rooms that they come from; the rooms themselves never import this module.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmlm.autoclasses import install as _install_auto_classes

if TYPE_CHECKING:
    from mmlm.assistant import Assistant as Assistant
    from mmlm.assistant import compose as compose
    from mmlm.assistant import load as load
    from mmlm.errors import MMLMError as MMLMError
    from mmlm.evaluation import evaluate as evaluate
    from mmlm.generation import Chat as Chat
    from mmlm.generation import GenerationSettings as GenerationSettings
    from mmlm.generation import Request as Request
    from mmlm.messages import Clip as Clip
    from mmlm.training import train as train

__version__ = "0.1.0"

_PUBLIC = {
    "Assistant": "mmlm.assistant",
    "Chat": "mmlm.generation",
    "GenerationSettings": "mmlm.generation",
    "MMLMError": "mmlm.errors",
    "Request": "mmlm.generation",
    "Clip": "mmlm.messages",
    "compose": "mmlm.assistant",
    "evaluate": "mmlm.evaluation",
    "load": "mmlm.assistant",
    "train": "mmlm.training",
}
__all__ = [
    "Assistant",
    "Chat",
    "Clip",
    "GenerationSettings",
    "MMLMError",
    "Request",
    "__version__",
    "compose",
    "evaluate",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(
            f"module 'mmlm' has no attribute {name!r}. It has: {', '.join(__all__)}."
        )
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install_auto_classes()
