"""A stock folder answered by vLLM: large evaluations, over several GPUs of one machine.

    runner ──► VLLMBackend ──► vllm.LLM.chat
               you are here

vLLM opens a folder only if it is a stock class (`mmlm check` says so). It batches by itself, so
the runner's batches may be large; its kernels add in another order than ours, so near ties may
fall either way, and scores of the two are compared on the same backend only.

Choices are compared by vLLM's log-probabilities of a prompt. The conversation with each choice is
encoded here, so that what is compared are the tokens that `LocalBackend` compares: those of the
choice, and the end of the turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from mmlm.errors import EvaluationError, ImageError, MissingExtraError
from mmlm.evaluation.asking.answers import hashed
from mmlm.evaluation.asking.endpoint import data_url
from mmlm.evaluation.benchmarks.conditions import Case
from mmlm.generation import GenerationSettings
from mmlm.images import open_image
from mmlm.language.chat import NOT_LEARNT, ChatFormat
from mmlm.language.template import IMAGE_TOKEN
from mmlm.messages import assistant, user
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
        self._model = str(model)
        self._llm: Any = self._vllm.LLM(model=self._model, **options)
        settings = {key: str(value) for key, value in sorted(engine.items())}
        self.weights = hashed(
            f"vllm {self._vllm.__version__} {json.dumps(settings)} {_name(model)}"
        )

    def answer(self, cases: Sequence[Case], settings: GenerationSettings) -> list[str]:
        """Answer cases, as one batch, in their order.

        Raises:
            EvaluationError: if logits are not numbers, or a setting is not vLLM's.
        """
        outputs = self._llm.chat(
            [_talk(case) for case in cases], self._sampling(settings), use_tqdm=False
        )
        for output, case in zip(outputs, cases, strict=True):
            _check_number(case, output.outputs[0].cumulative_logprob)
        return [str(output.outputs[0].text).strip() for output in outputs]

    def likelihoods(self, cases: Sequence[Case]) -> list[list[float]]:
        """Return the mean log-probability of a token of each choice of each case.

        As in `LocalBackend`, the end of the turn counts as a token.

        Raises:
            EvaluationError: if vLLM reads a conversation otherwise than it was written, or a
                picture cannot be opened.
        """
        asked = [(case, choice) for case in cases for choice in case.choices]
        rows = [self._encode(case, choice) for case, choice in asked]
        sampling = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        prompts = [
            {"prompt_token_ids": ids, **_shown(case)}
            for (case, _), (ids, _) in zip(asked, rows, strict=True)
        ]
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        values = [
            mean_of_learnt(case, output, *row)
            for (case, _), output, row in zip(asked, outputs, rows, strict=True)
        ]
        counts = [len(case.choices) for case in cases]
        return [[values.pop(0) for _ in range(count)] for count in counts]

    @cached_property
    def _chat(self) -> ChatFormat:
        """The words of the folder: its tokenizer, and the template that its processor brings."""
        from transformers import AutoProcessor

        processor: Any = AutoProcessor.from_pretrained(self._model)
        tokenizer = getattr(processor, "tokenizer", processor)
        token = getattr(processor, "image_token", None) or IMAGE_TOKEN
        return ChatFormat(tokenizer, processor.chat_template, image_token=str(token))

    def _encode(self, case: Case, choice: str) -> tuple[list[int], list[int]]:
        """Return ids and labels of a question with its answer; vLLM spreads the one placeholder."""
        talk = [user(case.prompt, case.images), assistant(choice)]
        row = self._chat.encode(talk, image_tokens=[1] * len(case.images), with_labels=True)
        assert row.labels is not None
        return row.ids, row.labels

    def _sampling(self, settings: GenerationSettings) -> Any:
        if settings.num_beams > 1:
            raise EvaluationError("vLLM searches no beams here; take num_beams out of `generate`.")
        return self._vllm.SamplingParams(
            max_tokens=settings.max_new_tokens, temperature=settings.temperature,
            top_p=settings.top_p, top_k=settings.top_k or -1,
            repetition_penalty=settings.repetition_penalty, stop=list(settings.stop) or None,
            seed=settings.seed, logprobs=0,
        )  # fmt: skip


def _talk(case: Case) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in case.images
    ]
    return [{"role": "user", "content": [*content, {"type": "text", "text": case.prompt}]}]


def _shown(case: Case) -> dict[str, Any]:
    """Return the pictures of a case as vLLM takes them."""
    try:
        pictures = [open_image(image) for image in case.images]
    except ImageError as error:
        raise EvaluationError(
            f"A picture of {case.benchmark}, item {case.item.id}, cannot be shown: {error} Mend or "
            f"replace it; the answers so far are kept."
        ) from None
    return {"multi_modal_data": {"image": pictures}} if pictures else {}


def mean_of_learnt(case: Case, output: Any, ids: Sequence[int], labels: Sequence[int]) -> float:
    """Return the mean log-probability of the tokens of a prompt that carry a label.

    They are counted from the end, because vLLM puts many placeholders where `ids` has one.

    Args:
        case: What was asked, for messages.
        output: What vLLM says of the prompt.
        ids: The prompt as it was sent.
        labels: For each token its id, or -100.

    Raises:
        EvaluationError: if vLLM read other tokens.
    """
    read, given = output.prompt_token_ids, output.prompt_logprobs
    found: list[float] = []
    for place, label in enumerate(labels):
        if label == NOT_LEARNT:
            continue
        from_end = place - len(ids)
        if len(given) != len(read) or len(read) < len(ids) or read[from_end] != label:
            raise EvaluationError(
                f"vLLM reads the choices of {case.benchmark}, item {case.item.id}, otherwise than "
                f"they are written. Take decide: generate, or leave --vllm out."
            )
        found.append(float(given[from_end][label].logprob))
    return sum(found) / len(found)


def _check_number(case: Case, logprob: float | None) -> None:
    """Refuse an answer whose tokens have no likelihood: the logits were no numbers.

    Raises:
        EvaluationError: naming the item.
    """
    if logprob is not None and not isfinite(logprob):
        raise EvaluationError(
            f"The model gives logits that are not numbers (NaN) for {case.benchmark}/"
            f"{case.item.id}. No answer of it means anything. Load it with dtype float32, or look "
            f"for the step at which training broke."
        )


def _name(model: str | Path) -> str:
    """Return what tells a folder from another: its files; of a Hub id, the id."""
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    return " ".join(f"{path.name}:{sha256_of_file(path)}" for path in files)
