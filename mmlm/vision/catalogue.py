"""Which image encoders the installed libraries have, and what each would be in a recipe.

For `mmlm parts vision`: names by family, without building anything; and rows with sizes, tokens
and parameters of the few that were asked for, built untrained.
"""

from __future__ import annotations

from fnmatch import fnmatch
from importlib.util import find_spec
from typing import Any, NamedTuple

from mmlm.errors import MMLMError
from mmlm.vision.base import VisionEncoder, VisionFacts, encoders
from mmlm.vision.hf_facts import image_model_types


class Known(NamedTuple):
    """One encoder that can be named."""

    library: str
    family: str
    name: str

    @property
    def words(self) -> dict[str, Any]:
        """The words that build it untrained."""
        if self.library == "timm":
            return {"use": "timm", "checkpoint": self.name, "pretrained": False}
        return {"use": "hf", "config": {"model_type": self.name}, "layer": "last"}


class Row(NamedTuple):
    """What an encoder is, or why it is none."""

    known: Known
    encoder: VisionEncoder | None
    reason: str

    @property
    def facts(self) -> VisionFacts | None:
        """Its facts."""
        return None if self.encoder is None else self.encoder.facts

    @property
    def num_parameters(self) -> int:
        """How many weights it has."""
        return 0 if self.encoder is None else sum(p.numel() for p in self.encoder.parameters())


def all_known() -> list[Known]:
    """Return every image encoder of transformers and timm, by their own lists."""
    found = [
        Known("hf", model_type, model_type)
        for model_type in image_model_types()
        if model_type != "timm_wrapper"
    ]
    if find_spec("timm") is not None:
        import timm

        for module in timm.list_modules():
            found += [Known("timm", module, name) for name in timm.list_models(module=module)]
    return found


def matching(pattern: str) -> list[Known]:
    """Return the encoders whose name or family is like a pattern; `*` stands for anything."""
    wanted = pattern if "*" in pattern else f"*{pattern}*"
    return [
        known
        for known in all_known()
        if fnmatch(known.name, wanted) or fnmatch(known.family, wanted)
    ]


def describe(known: Known) -> Row:
    """Build one, untrained, and find out about it."""
    words = known.words
    if known.library == "hf":
        words |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    try:
        return Row(known, encoders.read(words, origin="vision").load(), "")
    except MMLMError as error:
        return Row(known, None, " ".join(str(error).split()))
    except Exception as error:  # a network may raise whatever it likes while it is built
        return Row(known, None, f"{type(error).__name__}: {' '.join(str(error).split())}")
