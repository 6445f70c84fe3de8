"""What answers the questions of a benchmark: a model of ours, or anything with `answer_all`.

    runner ──► backend ──► assistant, generation
               you are here

`LocalBackend` knows that a benchmark asks several questions about one picture, in several
conditions: each picture goes through the encoder once, and its features are kept within a
memory budget; what the language model made of it is shared as well (see `shared_prefix`).
Logits that are not numbers stop the run, because greedy decoding would turn them into an
answer like any other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mmlm.assistant import Assistant
from mmlm.connectors import check_visual_tokens, visual_tokens
from mmlm.errors import EvaluationError, ImageError
from mmlm.evaluation.asking.answers import fingerprint
from mmlm.evaluation.asking.shared_prefix import SharedPrefix
from mmlm.evaluation.benchmarks.conditions import Case
from mmlm.features import Grid, Size, VisionFeatures
from mmlm.generation import GenerationSettings, Request
from mmlm.generation.batch import connector_of, finish, generate_options, model_inputs
from mmlm.language.chat import NOT_LEARNT
from mmlm.messages import Clip, Message, assistant, user
from mmlm.processing import Encoded
from mmlm.whole import WholeProcessor

FEATURE_BUDGET_BYTES = 1 << 30


class Answerer(Protocol):
    """Anything that answers requests, in their order."""

    def answer_all(
        self, requests: Sequence[Request], batch_size: int = 8, **settings: Any
    ) -> list[str]:
        """Answer all requests."""
        ...


class Backend(Protocol):
    """What the runner needs of a model."""

    @property
    def weights(self) -> str:
        """A hash of everything in the model that can change an answer."""
        ...

    def answer(self, cases: Sequence[Case], settings: GenerationSettings) -> list[str]:
        """Answer cases, as one batch, in their order."""
        ...

    def likelihoods(self, cases: Sequence[Case]) -> list[list[float]]:
        """Return the mean log-probability of a token of each choice of each case."""
        ...


def backend_for(model: Any) -> Backend:
    """Return what can answer with `model`."""
    return LocalBackend(model) if isinstance(model, Assistant) else AnswererBackend(model)


class AnswererBackend:
    """Anything with `answer_all` and a `fingerprint`, which tells its answers from another's.

    Args:
        answerer: What answers.
    """

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        if not hasattr(answerer, "fingerprint"):
            raise EvaluationError(
                f"{type(answerer).__name__} has no `fingerprint`, so that its answers could not be "
                f"told from those of another model. Give it one: a string, or a function of one."
            )
        self.weights = fingerprint(answerer)

    def answer(self, cases: Sequence[Case], settings: GenerationSettings) -> list[str]:
        """Answer cases, as one batch, in their order."""
        requests = [Request(case.prompt, case.images) for case in cases]
        plain = settings.model_dump(mode="json", exclude_defaults=True)
        return self._answerer.answer_all(requests, batch_size=max(1, len(requests)), **plain)

    def likelihoods(self, cases: Sequence[Case]) -> list[list[float]]:
        """Refuse: text alone does not say how likely a choice was."""
        raise EvaluationError(
            f"{type(self._answerer).__name__} gives texts and no likelihoods. Use "
            f"decide: generate, or a model of ours."
        )


class LocalBackend:
    """A model of ours.

    Args:
        assistant: Model and processor.
        budget_bytes: Most memory that kept features may take.
    """

    def __init__(self, assistant: Assistant, *, budget_bytes: int = FEATURE_BUDGET_BYTES) -> None:
        self.assistant = assistant
        self.model: Any = assistant.model
        self.processor: Any = assistant.processor
        self._features: OrderedDict[str, VisionFeatures] = OrderedDict()
        self._budget_bytes, self._held_bytes = budget_bytes, 0
        self._weights: str | None = None
        # A stock class taken whole prepares its pictures itself, and shares no prefix.
        self._whole = isinstance(assistant.processor, WholeProcessor)
        self._shared = None if self._whole else SharedPrefix(self.model, self.processor)
        self.model.eval()

    @property
    def weights(self) -> str:
        """A hash of everything in the model that can change an answer."""
        if self._weights is None:
            self._weights = fingerprint(self.assistant)
        return self._weights

    def answer(self, cases: Sequence[Case], settings: GenerationSettings) -> list[str]:
        """Answer cases, as one batch, in their order.

        Raises:
            EvaluationError: if a picture cannot be opened, or logits are not numbers.
            ConfigError: if `visual_tokens` is asked of a connector that does not order its tokens.
        """
        check_visual_tokens(settings.visual_tokens, connector_of(self.model))
        with visual_tokens(settings.visual_tokens):
            return self._answer(cases, settings)

    def _answer(self, cases: Sequence[Case], settings: GenerationSettings) -> list[str]:
        if settings.num_beams > 1 or any(map(self._is_clip, cases)):
            # Beams repeat the pixels of a row, which kept features do not follow; clips have none.
            requests = [Request(case.prompt, self._shown(case)) for case in cases]
            plain = settings.model_dump(mode="json", exclude_defaults=True)
            return self.assistant.answer_all(requests, batch_size=len(requests), **plain)
        prompts = [self._encode_talk(case) for case in cases]
        if self._shared is not None and self._shared.serves(settings, prompts):
            rows = self._shared.generate(
                prompts,
                [case.image_keys for case in cases],
                lambda picked: self._vision([cases[number] for number in picked]),
                settings,
                lambda logits, numbers: _check_numbers(logits, [cases[n] for n in numbers]),
            )
        else:
            rows = self._generate(cases, prompts, settings)
        return [
            finish(row, prompt, self.processor, settings).text
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def _is_clip(self, case: Case) -> bool:
        """Say whether the model takes the frames of a case as one clip."""
        takes_clips = not self._whole and getattr(self.model.config, "video", None) is not None
        return takes_clips and bool(case.images) and getattr(case.item, "is_clip", False)

    def _shown(self, case: Case) -> tuple[Any, ...]:
        return (Clip(case.images),) if self._is_clip(case) else case.images

    def _generate(
        self, cases: Sequence[Case], prompts: Sequence[Encoded], settings: GenerationSettings
    ) -> list[list[int]]:
        """Answer with transformers' own loop, as one batch padded on the left."""
        inputs = model_inputs(prompts, self.processor, self.model) | self._vision(cases)
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                **generate_options(self.processor, settings),
                logits_processor=LogitsProcessorList([_OnlyNumbers(cases)]),
            )
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def likelihoods(self, cases: Sequence[Case]) -> list[list[float]]:
        """Return the mean log-probability of a token of each choice of each case.

        The end of the turn counts as a token, so that a choice is never preferred for being
        the beginning of another.

        Raises:
            EvaluationError: for clips, or logits that are not numbers.
        """
        if any(map(self._is_clip, cases)):
            raise EvaluationError("Clips are answered in writing; take decide: generate.")
        rows = [[self._encode_talk(case, talk) for talk in _talks(case)] for case in cases]
        parted = [_parted(talks) for talks in rows]
        known = [one for one in parted if one is not None]
        prompts = [prompt for prompt, _ in known]
        if self._shared is None or len(known) < len(rows) or not self._shared.scores(prompts):
            return [self._likelihoods(*one) for one in zip(cases, rows, strict=True)]
        found = self._shared.likelihoods(
            prompts,
            [case.image_keys for case in cases],
            lambda picked: self._vision([cases[number] for number in picked]),
            [choices for _, choices in known],
        )
        for case, values in zip(cases, found, strict=True):
            if not all(map(isfinite, values)):
                raise EvaluationError(_not_numbers([case]))
        return found

    def _likelihoods(self, case: Case, rows: Sequence[Encoded]) -> list[float]:
        """Compute those of one case, every choice behind the whole question."""
        inputs = model_inputs(rows, self.processor, self.model)
        inputs |= self._vision([case] * len(rows))
        width = inputs["input_ids"].shape[1]
        labels = torch.full((len(rows), width), NOT_LEARNT)
        for index, row in enumerate(rows):
            assert row.labels is not None
            labels[index, width - len(row.labels) :] = torch.tensor(row.labels)
        if not self._whole:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        labels = labels.to(inputs["input_ids"].device)
        with torch.inference_mode():
            losses = self.model(
                **inputs, labels=labels, loss_only=True, loss_by_piece=True, use_cache=False
            ).loss
        if not bool(torch.isfinite(losses).all()):
            raise EvaluationError(_not_numbers([case]))
        return (-losses / (labels[:, 1:] != NOT_LEARNT).sum(-1)).tolist()

    def _encode_talk(self, case: Case, talk: list[Message] | None = None) -> Encoded:
        """Turn a question, or a question with its answer, into ids; pictures are only counted."""
        try:
            return self.processor.encode_chat(
                talk or [user(case.prompt, case.images)],
                add_generation_prompt=talk is None,
                with_labels=talk is not None,
                with_pixels=self._whole,
            )
        except ImageError as error:
            raise EvaluationError(
                f"A picture of {case.benchmark}, item {case.item.id}, cannot be shown: {error} "
                f"Mend or replace it; the answers so far are kept."
            ) from None

    def features(self, images: Sequence[Any], keys: Sequence[str]) -> list[VisionFeatures]:
        """Return the encoder's features of pictures, each computed once.

        Raises:
            EvaluationError: if a picture cannot be opened.
        """
        wanted = {key: image for image, key in zip(images, keys, strict=True)}
        missing = {key: image for key, image in wanted.items() if key not in self._features}
        found = {key: self._features[key] for key in wanted if key not in missing}
        found |= self._encode(missing)
        for key in wanted:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _encode(self, pictures: dict[str, Any]) -> dict[str, VisionFeatures]:
        groups: dict[tuple[int, ...], list[tuple[str, tuple[Tensor, Size]]]] = {}
        for key, picture in pictures.items():
            try:
                look = self.processor.image_processor.look(picture)
            except ImageError as error:
                shown = picture if not isinstance(picture, bytes) else f"with the key {key}"
                raise EvaluationError(
                    f"The picture {shown} cannot be shown: {error} Mend or replace it; the answers "
                    f"so far are kept."
                ) from None
            groups.setdefault(tuple(look[0].shape[1:]), []).append((key, look))
        found: dict[str, VisionFeatures] = {}
        for members in groups.values():
            pixels, sizes = zip(*(look for _, look in members), strict=True)
            with torch.inference_mode():
                pieces = self.model.model.encode_pictures(pixels, sizes)
            found |= {key: piece for (key, _), piece in zip(members, pieces, strict=True)}
        return found

    def _keep(self, key: str, features: VisionFeatures) -> None:
        if key in self._features:
            self._features.move_to_end(key)
            return
        self._features[key] = features
        self._held_bytes += _num_bytes(features)
        while self._held_bytes > self._budget_bytes and len(self._features) > 1:
            _, dropped = self._features.popitem(last=False)
            self._held_bytes -= _num_bytes(dropped)

    def _vision(self, cases: Sequence[Case]) -> dict[str, Tensor]:
        """Return the features of all pictures, in reading order, as the model takes them."""
        images = [image for case in cases for image in case.images]
        if not images or self._whole:
            return {}
        layered = self.model.config.facts.num_layers > 0  # of features, one layer alone is kept
        if layered or self.model.model.conditioned is not None:  # the question enters the encoder
            looks = self.processor.image_processor
            seen = looks.together([looks.look(image) for image in images])
            return {name: value.to(self.model.device) for name, value in seen.items()}
        features = self.features(images, [key for case in cases for key in case.image_keys])
        grids: list[Grid] = [grid for each in features for grid in each.grids]
        sizes = [self.processor.size_of(image) for image in images]
        return {
            "vision_values": torch.cat([each.values for each in features]),
            "vision_grids": torch.tensor(grids),
            **self.processor.image_processor.sizes(sizes),
        }


class _OnlyNumbers(LogitsProcessor):
    """Stops generation at logits that are not numbers."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Pass scores on if none of them is NaN."""
        _check_numbers(scores, self._cases)
        return scores


def _check_numbers(scores: Tensor, cases: Sequence[Case]) -> None:
    """Refuse logits of which one is NaN; the cases are those of the rows."""
    broken = scores.isnan().any(dim=-1)
    if bool(broken.any()):
        rows = broken.nonzero()[:, 0].tolist()
        raise EvaluationError(_not_numbers([cases[row] for row in rows]))


def _not_numbers(cases: Sequence[Case]) -> str:
    names = ", ".join(f"{case.benchmark}/{case.item.id}" for case in cases[:5])
    return (
        f"The model gives logits that are not numbers (NaN) for {names}. No answer of it means "
        f"anything. Load it with dtype float32, or look for the step at which training broke."
    )


def _talks(case: Case) -> list[list[Message]]:
    """Return the question with each of its choices as the answer."""
    asked = user(case.prompt, case.images)
    return [[asked, assistant(choice)] for choice in case.choices]


def _parted(talks: Sequence[Encoded]) -> tuple[Encoded, list[list[int]]] | None:
    """Return the prompt that talks have in common and the tokens learnt of each behind it.

    None where they begin differently, or where anything between learnt tokens is not learnt.
    """
    prompt: list[int] = []
    choices: list[list[int]] = []
    for talk in talks:
        assert talk.labels is not None
        places = [place for place, label in enumerate(talk.labels) if label != NOT_LEARNT]
        first, last = places[0], places[-1] + 1
        if len(places) != last - first or (choices and talk.ids[:first] != prompt):
            return None
        prompt = talk.ids[:first]
        choices.append(talk.ids[first:last])
    return replace(talks[0], ids=prompt, labels=None), choices


def _num_bytes(features: VisionFeatures) -> int:
    return features.values.numel() * features.values.element_size()
