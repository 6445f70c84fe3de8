"""Tells the Auto classes of transformers about MMLM, without importing transformers.

`install` puts a finder in front of `sys.meta_path` that finds nothing by itself: it only
watches the imports of `transformers` and of MMLM's own rooms. When the outermost of them is
done and the Auto classes are among what was loaded, MMLM's classes are registered and the
finder steps away. Waiting for the outermost import matters: in the middle of it, both
packages hold half-made modules. Where the Auto classes are loaded already, `install`
registers at once.

This module names the rooms by strings only, and imports none of them until then.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO = "transformers.models.auto.configuration_auto"
_WATCHED = ("transformers.", "mmlm.")


def install() -> None:
    """Register MMLM's classes now if the Auto classes are loaded, else when they will be."""
    if _AUTO in sys.modules:
        register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def register() -> None:
    """Make `AutoConfig`, `AutoProcessor` and `AutoModelForImageTextToText` know our folders."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    modeling, processing = import_module("mmlm.modeling"), import_module("mmlm.processing")
    config = modeling.MMLMConfig
    AutoConfig.register("mmlm", config, exist_ok=True)
    # TRL falls back to AutoModelForCausalLM for classes that transformers does not hold.
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto.register(config, modeling.MMLMForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(config, processing.MMLMImageProcessor, exist_ok=True)
    AutoProcessor.register(config, processing.MMLMProcessor, exist_ok=True)


class _Watcher:
    """A finder that finds nothing: it counts how deep the watched imports are nested."""

    def __init__(self) -> None:
        self._depth = threading.local()

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Return what the other finders find, with a loader that reports when it is done."""
        if not name.startswith(_WATCHED):
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: ModuleSpec) -> None:
        """Shadow `exec_module` of this one loader; class and `__loader__` stay what they are."""
        execute: Callable[[ModuleType], None] | None = getattr(spec.loader, "exec_module", None)
        if execute is None:
            return

        def execute_and_report(module: ModuleType) -> None:
            vars(spec.loader).pop("exec_module", None)
            self._depth.value = getattr(self._depth, "value", 0) + 1
            try:
                execute(module)
            finally:
                self._depth.value -= 1
            if self._depth.value == 0 and _AUTO in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        spec.loader.exec_module = execute_and_report  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
