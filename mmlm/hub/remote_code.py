"""A folder of MMLM's own class that opens without MMLM: the modules it needs travel with it.

    mmlm.modeling, mmlm.processing ──► every module below them ──► modeling_mmlm.py
    config.json, processor_config.json ──► auto_map ───────────────┘

`AutoModelForImageTextToText` and `AutoProcessor` load such a folder with `trust_remote_code=True`.
It is one file, in which the modules stand as readable text, each under its name: transformers
copies it whole, and packages that only some parts need (timm, PEFT) are asked for when they are
used. The modules live under a name of their own, so that an installed MMLM is not touched.
"""

from __future__ import annotations

import ast
import hashlib
import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmlm.errors import CheckpointError

FILE = "modeling_mmlm.py"
_ROOT = "mmlm"
_ENTRIES = ("mmlm.modeling", "mmlm.processing")
_CLASSES = {
    "AutoConfig": "MMLMConfig",
    "AutoModel": "MMLMModel",
    "AutoModelForImageTextToText": "MMLMForConditionalGeneration",
    "AutoProcessor": "MMLMProcessor",
}

_LOADER = '''"""MMLM {version}: the modules that this model needs.

Written by `mmlm export --to remote-code`.
The text of each module stands in `SOURCES`; at the end they are imported as one private package.
Needed beside torch and transformers: pydantic, jaxtyping, numpy and Pillow{extra}.
Licence of this code: Apache-2.0.
"""

import importlib
import importlib.abc
import importlib.util
import sys

import jaxtyping
import numpy
import PIL
import pydantic
import torch
import transformers

PACKAGE = {package!r}
SOURCES = {{}}
{sources}

class _Bundled(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `SOURCES`, and no others."""

    def find_spec(self, name, path=None, target=None):
        known = name == PACKAGE or name.removeprefix(PACKAGE + ".") in SOURCES
        if not (known and (name == PACKAGE or name.startswith(PACKAGE + "."))):
            return None
        inner = name.removeprefix(PACKAGE).lstrip(".")
        is_package = not inner or any(other.startswith(inner + ".") for other in SOURCES)
        return importlib.util.spec_from_loader(name, self, is_package=is_package)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        inner = module.__name__.removeprefix(PACKAGE).lstrip(".")
        text = SOURCES.get(inner, "")
        exec(compile(text, f"<{{module.__name__}}>", "exec"), module.__dict__)


if PACKAGE not in sys.modules:
    sys.meta_path.insert(0, _Bundled())
_modeling = importlib.import_module(PACKAGE + ".modeling")
_processing = importlib.import_module(PACKAGE + ".processing")

MMLMConfig = _modeling.MMLMConfig
MMLMModel = _modeling.MMLMModel
MMLMForConditionalGeneration = _modeling.MMLMForConditionalGeneration
MMLMProcessor = _processing.MMLMProcessor
MMLMImageProcessor = _processing.MMLMImageProcessor
# A processor asks the Auto classes whether it knows its own image processor.
transformers.AutoImageProcessor.register(MMLMConfig, MMLMImageProcessor, exist_ok=True)
'''


def add_code(folder: Path) -> None:
    """Put the code into a folder of MMLM's own class, and name it where transformers looks.

    Raises:
        CheckpointError: if the folder is not of MMLM's own class.
    """
    config = _read(folder / "config.json")
    if config.get("model_type") != _ROOT:
        raise CheckpointError(
            f"{folder} is a class of transformers, which needs no code beside it. Export it to "
            f"mmlm first if the code is wanted."
        )
    (folder / FILE).write_text(bundle(_extra(config)), encoding="utf-8")
    module = FILE.removesuffix(".py")
    table = {auto: f"{module}.{name}" for auto, name in _CLASSES.items()}
    model_table = {auto: name for auto, name in table.items() if auto != "AutoProcessor"}
    _write(folder / "config.json", {**config, "auto_map": model_table})
    processor = _read(folder / "processor_config.json")
    own = {"AutoProcessor": table["AutoProcessor"]}
    _write(folder / "processor_config.json", {**processor, "auto_map": own})


def bundle(extra: str = "") -> str:
    """Return the one file that holds the modules which model and processor need.

    Args:
        extra: What else must be installed, for its docstring.
    """
    sources = modules()
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:10]
    package = f"mmlm_bundled_{digest}"
    texts = [
        f"\nSOURCES[{name.removeprefix(_ROOT + '.')!r}] = {_literal(_renamed(text, package))}"
        for name, text in sources.items()
    ]
    return _LOADER.format(
        version=version(_ROOT), package=package, sources="\n".join(texts), extra=extra
    )


def modules() -> dict[str, str]:
    """Return the text of every module that model and processor import, by name."""
    found: dict[str, str] = {}
    waiting: list[str] = [*_ENTRIES]
    while waiting:
        name = waiting.pop()
        if name in found or name == _ROOT:
            continue
        text = _source(name)
        if text is None:
            continue  # a class or function, named in `from module import name`
        found[name] = text
        waiting.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_ROOT}."):
                module = str(node.module)
                waiting += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return dict(sorted(found.items()))


def _source(name: str) -> str | None:
    """Return the text of a module of MMLM, or None if there is no such module."""
    place = files(_ROOT)
    *folders, last = name.split(".")[1:]
    for folder in folders:
        place = place / folder
    for path in (place / f"{last}.py", place / last / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def _renamed(text: str, package: str) -> str:
    """Return a module's text with its imports from MMLM turned to the private package."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_ROOT}."):
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {_ROOT}.", f"from {package}.", 1)
    return "".join(lines)


def _literal(text: str) -> str:
    """Return a literal of a text that stays readable, line for line."""
    if "'''" in text or text.endswith("'"):
        return "".join(["(\n", *(f"    {line!r}\n" for line in text.splitlines(True)), ")"])
    escaped = text.replace("\\", "\\\\")
    return f"'''{escaped}'''"


def _extra(config: dict[str, Any]) -> str:
    """Say which further package a composition needs."""
    return "; timm" if "timm" in json.dumps(config.get("vision")) else ""


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
