"""A stock folder answered by vLLM: large evaluations, over several GPUs of one machine.

    runner ──► VLLMBackend ──► vllm.LLM.chat
               you are here

vLLM opens a folder only if it is a stock class (`mmlm check` says so). It batches by itself, so
the runner's batches may be large; its kernels add in another order than ours, so near ties may
fall either way, and scores of the two are compared on the same backend only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlm.errors import EvaluationError, MissingExtraError
from mmlm.evaluation.asking.answers import hashed
from mmlm.evaluation.asking.endpoint import data_url
from mmlm.evaluation.benchmarks.conditions import Case
from mmlm.generation import GenerationSettings
from mmlm.storage import sha256_of_file


class VLLMBackend:
    """A model that vLLM runs.

    Args:
        model: A stock folder, or a Hub id.
        max_images: Most pictures of one question.
        engine: Further arguments of `vllm.LLM`, such as ``tensor_parallel_size=4``.

    Raises:
        MissingExtraError: if vLLM is not installed.
    """

    def __init__(self, model: str | Path, *, max_images: int = 8, **engine: Any) -> None:
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingExtraError("vllm", needed_for="--vllm", extra="vllm") from None
        self._vllm: Any = vllm
        options: dict[str, Any] = {
            "limit_mm_per_prompt": {"image": max_images},
            "seed": 0,
            **engine,
        }
        self._llm: Any = self._vllm.LLM(model=str(model), **options)
        settings = {key: str(value) for key, value in sorted(engine.items())}
        self.weights = hashed(
            f"vllm {self._vllm.__version__} {json.dumps(settings)} {_name(model)}"
        )

    def answer(self, cases: Sequence[Case], settings: GenerationSettings) -> list[str]:
        """Answer cases, as one batch, in their order."""
        outputs = self._llm.chat(
            [_talk(case) for case in cases], self._sampling(settings), use_tqdm=False
        )
        return [str(output.outputs[0].text).strip() for output in outputs]

    def likelihoods(self, cases: Sequence[Case]) -> list[list[float]]:
        """Return the mean log-probability of a token of each choice of each case."""
        asked = [(case, choice) for case in cases for choice in case.choices]
        talks = [[*_talk(case), {"role": "assistant", "content": choice}] for case, choice in asked]
        sampling = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = self._llm.chat(
            talks, sampling, use_tqdm=False, add_generation_prompt=False,
            continue_final_message=True,
        )  # fmt: skip
        tokenizer: Any = self._llm.get_tokenizer()
        values = [
            _mean_of_last(output, len(tokenizer.encode(choice, add_special_tokens=False)))
            for output, (_, choice) in zip(outputs, asked, strict=True)
        ]
        found: list[list[float]] = []
        for case in cases:
            found.append(values[: len(case.choices)])
            values = values[len(case.choices) :]
        return found

    def _sampling(self, settings: GenerationSettings) -> Any:
        if settings.num_beams > 1:
            raise EvaluationError("vLLM searches no beams here; take num_beams out of `generate`.")
        return self._vllm.SamplingParams(
            max_tokens=settings.max_new_tokens, temperature=settings.temperature,
            top_p=settings.top_p, top_k=settings.top_k or -1,
            repetition_penalty=settings.repetition_penalty, stop=list(settings.stop) or None,
            seed=settings.seed,
        )  # fmt: skip


def _talk(case: Case) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in case.images
    ]
    return [{"role": "user", "content": [*content, {"type": "text", "text": case.prompt}]}]


def _mean_of_last(output: Any, count: int) -> float:
    """Return the mean log-probability of the last tokens of a prompt, those of the choice."""
    given = [
        each[token].logprob
        for token, each in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        if each is not None
    ]
    return sum(given[-count:]) / max(1, count)


def _name(model: str | Path) -> str:
    """Return what tells a folder from another: its files; of a Hub id, the id."""
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    return " ".join(f"{path.name}:{sha256_of_file(path)}" for path in files)
