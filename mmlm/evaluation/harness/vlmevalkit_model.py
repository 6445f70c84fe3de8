"""A model of ours inside VLMEvalKit, which has no entry points: import it in a configuration.

    from functools import partial
    from vlmeval.config import supported_VLM
    from mmlm.evaluation.harness.vlmevalkit_model import MMLM
    supported_VLM["mmlm"] = partial(MMLM, model_path="runs/mine/model")

This follows its `BaseModel` (`INTERLEAVE`, `generate_inner`). VLMEvalKit asks for some seventy
packages, so that no extra of ours brings it; a slow test runs the class inside the package
`ms-vlmeval`, which is VLMEvalKit on PyPI, where that is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from mmlm.generation import Request
from mmlm.messages import Clip, ImagePart, Message, Text


def __getattr__(name: str) -> Any:
    """Make the class `MMLM` when it is looked up."""
    if name != "MMLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model_class()


class Answers:
    """What VLMEvalKit calls, without its base class.

    Args:
        model_path: A folder or Hub id.
        **settings: Fields of `GenerationSettings`, such as ``max_new_tokens=512``.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, model_path: str = "", **settings: Any) -> None:
        from mmlm.assistant import load

        self.assistant = load(model_path)
        self.settings = {"max_new_tokens": 512, **settings}

    def generate_inner(
        self, message: Sequence[Mapping[str, str]], dataset: str | None = None
    ) -> str:
        """Answer one prompt of texts and pictures, in their order."""
        del dataset
        return self.assistant.answer_all([request_of(message)], 1, **self.settings)[0]


def request_of(message: Sequence[Mapping[str, str]]) -> Request:
    """Return a request of VLMEvalKit's list of ``{type, value}``.

    >>> parts = [{"type": "image", "value": "a.png"}, {"type": "text", "value": "What?"}]
    >>> request_of(parts).messages[0].text
    'What?'

    Raises:
        ValueError: for another type, such as a sound.
    """
    content: list[Text | ImagePart] = []
    for part in message:
        kind, value = part["type"], part["value"]
        if kind not in ("text", "image", "video"):
            raise ValueError(f"The model takes text, image and video, not {kind!r}.")
        shown = Clip(value) if kind == "video" else value
        content.append(Text(value) if kind == "text" else ImagePart(shown))
    return Request(messages=(Message("user", tuple(content)),))


@cache
def _model_class() -> Any:
    base: Any = import_module("vlmeval.vlm.base").BaseModel

    class MMLM(Answers, base):
        """`Answers` with VLMEvalKit's base class."""

        def __init__(self, model_path: str = "", **settings: Any) -> None:
            base.__init__(self)
            Answers.__init__(self, model_path, **settings)

    return MMLM
