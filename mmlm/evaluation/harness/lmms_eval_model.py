"""`lmms-eval --model mmlm --model_args pretrained=FOLDER`, once MMLM is installed beside it.

    lmms-eval ──► entry point `lmms_eval.models` ──► `manifest` ──► `MMLM`
                                                     you are here

The class is made when lmms-eval asks for it, because its base belongs to lmms-eval.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from typing import Any

from mmlm.evaluation.harness.asking import request, settings_of


def manifest() -> Any:
    """Return what lmms-eval's registry reads of the entry point."""
    registry: Any = import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id="mmlm", simple_class_path=f"{__name__}.MMLM")


def __getattr__(name: str) -> Any:
    """Make the class `MMLM` when it is looked up."""
    if name != "MMLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model_class()


@cache
def _model_class() -> Any:
    base: Any = import_module("lmms_eval.api.model").lmms

    class MMLM(base):
        """Any checkpoint that `mmlm.load` opens.

        Args:
            pretrained: A folder or Hub id.
            batch_size: Questions answered at once.
            device: Where to; a GPU if there is one when left out.
            dtype: The precision, such as bfloat16; that of the checkpoint when left out.
        """

        def __init__(
            self,
            pretrained: str = "",
            batch_size: int | str = 8,
            device: str | None = None,
            dtype: str | None = None,
            **more: Any,
        ) -> None:
            import torch

            from mmlm.assistant import load

            super().__init__()
            unknown = {key: value for key, value in more.items() if key != "max_batch_size"}
            if unknown or not pretrained:
                raise ValueError(
                    f"--model_args of mmlm are pretrained=FOLDER, batch_size, device and dtype "
                    f"(got {', '.join(unknown) or 'no pretrained'})."
                )
            precision = None if dtype in (None, "auto") else getattr(torch, str(dtype))
            self._assistant = load(pretrained, dtype=precision, device=device)
            self._batch_size = int(batch_size)

        @property
        def batch_size(self) -> int:
            """Questions answered at once."""
            return self._batch_size

        def generate_until(self, requests: Any) -> list[str]:
            """Answer; questions with the same settings share batches."""
            groups: dict[str, list[int]] = {}
            asked: list[Any] = []
            for number, each in enumerate(requests):
                prompt, options, visuals, doc, task, split = each.args
                shown = _flat(visuals(self.task_dict[task][split][doc]))
                asked.append(request(prompt, shown))
                words = json.dumps(settings_of(options), sort_keys=True)
                groups.setdefault(words, []).append(number)
            answers: dict[int, str] = {}
            for words, numbers in groups.items():
                texts = self._assistant.answer_all(
                    [asked[number] for number in numbers], self._batch_size, **json.loads(words)
                )
                answers.update(zip(numbers, texts, strict=True))
            return [answers[number] for number in range(len(asked))]

        def loglikelihood(self, requests: Any) -> Any:
            """Refuse; `mmlm eval` decides choices by likelihood."""
            del requests
            raise NotImplementedError(
                "MMLM answers in lmms-eval by writing. For choices by likelihood, take `mmlm eval` "
                "with decide: likelihood."
            )

        def generate_until_multi_round(self, requests: Any) -> Any:
            """Refuse tasks of several rounds."""
            del requests
            raise NotImplementedError("MMLM answers one round in lmms-eval.")

    MMLM.__module__, MMLM.__qualname__ = __name__, "MMLM"
    return MMLM


def _flat(visuals: Any) -> list[Any]:
    """Return pictures in one list; tasks without any give None."""
    if visuals is None:
        return []
    several = visuals if isinstance(visuals, list | tuple) else [visuals]
    return [inner for each in several for inner in (_flat(each) if _is_many(each) else [each])]


def _is_many(each: Any) -> bool:
    return isinstance(each, list | tuple)
