"""Several questions about one picture: the picture is read once, and the questions behind it.

    prompts ──► the part up to the last picture ──► once for each picture, kept
            ──► the rest of each question       ──► all at once, behind their pictures
            ──► the next words                  ──► all at once; who is done leaves the batch
            or  the choices                     ──► all at once, behind their questions

A benchmark asks several things about a picture, and a picture is most of a prompt. What the
language model made of it (its keys and values) is kept within a memory budget; a question costs
its own tokens and no more, and so does a choice whose likelihood is wanted. A question without a
picture has its first token as its prefix. In float32 the answers are those that each question gets
alone, token for token. Only the likeliest token is taken here; sampling and beams go through
`generate` (see `backend`). Models whose cache forgets, such as those with states, are refused
by `serves`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmlm.generation import GenerationSettings
from mmlm.generation.batch import pad_id
from mmlm.generation.session import can_crop
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.processing import Encoded, MMLMProcessor

PREFIX_BUDGET_BYTES = 1 << 30
"""Memory for what is kept of pictures between batches."""

_AT_ONCE = 16
_HEAD_AT_ONCE = 256
_SHRINK = 0.75
"""A batch is made smaller when no more than this share of its rows still grows."""

_HARMLESS = frozenset(
    {
        "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "do_sample",
        "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "use_cache",
        "_from_model_config", "repetition_penalty", "num_beams", "output_attentions",
        "output_hidden_states",
    }
)  # fmt: skip
"""Settings of a checkpoint that change nothing where the likeliest token is taken."""

Vision = Callable[[Sequence[int]], dict[str, Any]]
"""From numbers of prompts to what the model takes for their pictures, in their order."""

Check = Callable[[Tensor, Sequence[int]], None]
"""Looks at the logits ``(rows, vocabulary)`` of these prompts before they are used."""


class SharedPrefix:
    """Answers prompts behind what was kept of their pictures.

    Args:
        model: The model.
        processor: Its processor.
        budget_bytes: Memory for what is kept.
    """

    def __init__(
        self,
        model: MMLMForConditionalGeneration,
        processor: MMLMProcessor,
        *,
        budget_bytes: int = PREFIX_BUDGET_BYTES,
    ) -> None:
        self._model, self._processor, self._budget_bytes = model, processor, budget_bytes
        self._kept: OrderedDict[Any, _Read] = OrderedDict()
        self._held_bytes = 0
        plain = set(_changed(model)) <= _HARMLESS
        # Connectors that write into the layers keep their pictures beside the cache.
        alone = getattr(model.model, "injection", None) is None
        # And what a picture becomes may hang on the question behind it.
        alone &= not getattr(model.model, "reads_question", False)
        cuts = can_crop(DynamicCache(config=model.config.text_config))
        self._can = plain and alone and cuts

    def serves(self, settings: GenerationSettings, prompts: Sequence[Encoded]) -> bool:
        """Whether answers here are those of `generate`."""
        greedy = settings.temperature == 0 and settings.num_beams == 1
        simple = settings.repetition_penalty == 1.0 and not settings.stop
        return greedy and simple and self.scores(prompts)

    def scores(self, prompts: Sequence[Encoded]) -> bool:
        """Whether something can be read behind the pictures of these prompts."""
        return self._can and all(_end(prompt) < len(prompt.ids) for prompt in prompts)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Encoded],
        pictures: Sequence[tuple[str, ...]],
        vision: Vision,
        settings: GenerationSettings,
        check: Check,
    ) -> list[list[int]]:
        """Return the tokens of every answer, the end of the turn included where it came.

        Args:
            prompts: The questions.
            pictures: The names of the pictures of each.
            vision: Gives the pictures of some prompts.
            settings: How to answer; see `serves`.
            check: Looks at all logits.
        """
        reads, rests = self._behind(prompts, pictures, vision)
        return self._answer(reads, rests, settings, check)

    @torch.inference_mode()
    def likelihoods(
        self,
        prompts: Sequence[Encoded],
        pictures: Sequence[tuple[str, ...]],
        vision: Vision,
        choices: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[float]]:
        """Return the mean log-probability of a token of each choice of each prompt.

        Args:
            prompts: The questions; see `scores`.
            pictures: The names of the pictures of each.
            vision: Gives the pictures of some prompts.
            choices: The tokens of each choice, at least one.
        """
        reads, rests = self._behind(prompts, pictures, vision)
        flat = [ids for each in choices for ids in each]
        longest = max(map(len, flat)) - 1
        batch = _Batch(reads, rests, room=longest, device=self._model.device)
        rows = [row for row, each in enumerate(choices) for _ in each]
        hidden = self._hidden(_padded_left(rests, pad_id(self._processor)), batch)[rows, -1:]
        if longest:
            batch.keep(rows)
            batch.append([len(ids) - 1 for ids in flat])
            ids = _padded_right([ids[:-1] for ids in flat], pad_id(self._processor))
            hidden = torch.cat([hidden, self._hidden(ids, batch)], dim=1)
        targets = _padded_right(flat, 0).to(hidden.device)
        lengths = torch.tensor([len(ids) for ids in flat], device=hidden.device)
        learnt = torch.arange(longest + 1, device=hidden.device) < lengths[:, None]
        values = torch.zeros(learnt.shape, device=hidden.device)
        values[learnt] = self._log_probabilities(hidden[learnt], targets[learnt])
        found = iter((values.sum(-1) / lengths).tolist())
        return [[next(found) for _ in each] for each in choices]

    def _hidden(self, ids: Tensor, batch: _Batch) -> Tensor:
        """Read tokens behind a batch; return the last hidden states, ``(rows, tokens, width)``."""
        return self._model.model(
            input_ids=ids.to(self._model.device), attention_mask=batch.mask,
            position_ids=batch.positions, past_key_values=batch.cache, use_cache=True,
        ).last_hidden_state  # fmt: skip

    def _log_probabilities(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return those of the targets, ``(positions,)``, with few logits at a time."""
        found: list[Tensor] = []
        pieces = zip(hidden.split(_HEAD_AT_ONCE), targets.split(_HEAD_AT_ONCE), strict=True)
        for states, wanted in pieces:
            all_of_them = self._model.lm_head(states).float().log_softmax(-1)
            found.append(all_of_them.gather(-1, wanted[:, None])[:, 0])
        return torch.cat(found)

    def _behind(
        self, prompts: Sequence[Encoded], pictures: Sequence[tuple[str, ...]], vision: Vision
    ) -> tuple[list[_Read], list[list[int]]]:
        """Return what the model made of the prefix of each prompt, and the tokens behind it."""
        ends = [_end(prompt) for prompt in prompts]
        names = [
            (tuple(prompt.ids[:end]), keys)
            for prompt, end, keys in zip(prompts, ends, pictures, strict=True)
        ]
        reads = self._reads(names, vision)
        rests = [prompt.ids[end:] for prompt, end in zip(prompts, ends, strict=True)]
        return [reads[name] for name in names], rests

    def _reads(self, names: Sequence[Any], vision: Vision) -> dict[Any, _Read]:
        """Return what the model made of each picture, reading those that are not kept."""
        first = {name: number for number, name in reversed(list(enumerate(names)))}
        found = {name: self._kept[name] for name in first if name in self._kept}
        by_length: dict[int, list[Any]] = {}
        for name in first:
            if name not in found:
                by_length.setdefault(len(name[0]), []).append(name)
        for group in by_length.values():
            for start in range(0, len(group), _AT_ONCE):
                some = group[start : start + _AT_ONCE]
                found |= zip(some, self._read(some, vision([first[n] for n in some])), strict=True)
        for name in first:
            self._keep(name, found[name])
        return found

    def _read(self, names: Sequence[Any], pictures: dict[str, Any]) -> list[_Read]:
        """Let the model read prefixes of one length."""
        cache: Any = DynamicCache(config=self._model.config.text_config)
        ids = torch.tensor([name[0] for name in names], device=self._model.device)
        self._model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **pictures
        )
        keys: list[Tensor] = [layer.keys for layer in cache.layers]
        values: list[Tensor] = [layer.values for layer in cache.layers]
        return [
            _Read([k[row].clone() for k in keys], [v[row].clone() for v in values])
            for row in range(len(names))
        ]

    def _keep(self, name: Any, read: _Read) -> None:
        if name not in self._kept:
            self._kept[name] = read
            self._held_bytes += read.num_bytes
        self._kept.move_to_end(name)
        while self._held_bytes > self._budget_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._held_bytes -= dropped.num_bytes

    def _answer(
        self,
        reads: Sequence[_Read],
        rests: Sequence[Sequence[int]],
        settings: GenerationSettings,
        check: Check,
    ) -> list[list[int]]:
        """Read the questions behind their pictures, then one word after another."""
        stops, padding = set(self._processor.chat.stop_ids), pad_id(self._processor)
        batch = _Batch(reads, rests, room=settings.max_new_tokens, device=self._model.device)
        answers: list[list[int]] = [[] for _ in reads]
        ids = _padded_left(rests, padding).to(self._model.device)
        for step in range(settings.max_new_tokens):
            logits = self._model(
                input_ids=ids, attention_mask=batch.mask, position_ids=batch.positions,
                past_key_values=batch.cache, use_cache=True, logits_to_keep=1,
            ).logits[:, -1].float()  # fmt: skip
            check(logits, batch.rows)
            chosen = logits.argmax(dim=-1)
            for row, token in zip(batch.rows, chosen.tolist(), strict=True):
                if not (answers[row] and answers[row][-1] in stops):
                    answers[row].append(token)
            going = [place for place, row in enumerate(batch.rows) if answers[row][-1] not in stops]
            if not going or step + 1 == settings.max_new_tokens:
                break
            if len(going) <= _SHRINK * len(batch.rows):
                batch.keep(going)
                chosen = chosen[torch.tensor(going, device=chosen.device)]
            batch.advance()
            ids = chosen[:, None]
        return answers


@dataclass(frozen=True)
class _Read:
    """Keys and values of one prefix, one tensor ``(heads, tokens, width)`` for each layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


class _Batch:
    """Rows that grow together: prefixes on the left, questions behind them, both padded left.

    Shapes:
        mask: ``(rows, prefix + question + answer so far)``
        positions: ``(rows, tokens that are read next)``
    """

    def __init__(
        self, reads: Sequence[_Read], rests: Sequence[Sequence[int]], *, room: int, device: Any
    ) -> None:
        self.rows = list(range(len(reads)))
        self.width = max(map(len, rests))
        longest = max(read.length for read in reads)
        capacity = longest + self.width + room
        self.cache: Any = DynamicCache()
        self.cache.layers = [
            _Room(
                _side_by_side([read.keys[number] for read in reads], longest, capacity),
                _side_by_side([read.values[number] for read in reads], longest, capacity),
                longest,
            )
            for number in range(len(reads[0].keys))
        ]
        self.mask = torch.zeros(len(reads), longest + self.width, dtype=torch.long, device=device)
        self.positions = torch.zeros(len(reads), self.width, dtype=torch.long, device=device)
        for row, (read, rest) in enumerate(zip(reads, rests, strict=True)):
            self.mask[row, longest - read.length : longest] = 1
            self.mask[row, longest + self.width - len(rest) :] = 1
            places = torch.arange(read.length, read.length + len(rest), device=device)
            self.positions[row, self.width - len(rest) :] = places

    def advance(self) -> None:
        """Make place for one more token of each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1

    def append(self, lengths: Sequence[int]) -> None:
        """Make place for so many more tokens of each row, padded on the right."""
        places = torch.arange(max(lengths), device=self.mask.device)
        wanted = places < torch.tensor(lengths, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, wanted.to(self.mask.dtype)], dim=1)
        self.positions = self.positions[:, -1:] + 1 + places

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some of the rows, or with several of each."""
        self.rows = [self.rows[place] for place in places]
        index = torch.tensor(list(places), device=self.mask.device)
        self.mask, self.positions = self.mask[index], self.positions[index]
        for layer in self.cache.layers:
            layer.batch_select_indices(index)


class _Room(DynamicLayer):
    """A layer of a cache with room for the whole answer, so that a token copies only itself."""

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._all, self._used = (keys, values), used
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (room[:, :, : self._used] for room in self._all)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the others, and return all of them."""
        end = self._used + key_states.shape[2]
        for room, new in zip(self._all, (key_states, value_states), strict=True):
            room[:, :, self._used : end] = new
        self._used = end
        self._show()
        return _of(self.keys), _of(self.values)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows."""
        keys, values = self._all
        self._all = keys[indices], values[indices]
        self._show()


def _end(prompt: Encoded) -> int:
    """Return where the prefix of a prompt ends: behind its last picture, or its first token."""
    return prompt.image_spans[-1][1] if prompt.image_spans else 1


def _padded_left(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows])


def _padded_right(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([list(row) + [padding] * (width - len(row)) for row in rows])


def _side_by_side(parts: Sequence[Tensor], longest: int, capacity: int) -> Tensor:
    """Put prefixes beside one another, padded on the left, with room behind them."""
    heads, _, width = parts[0].shape
    room = parts[0].new_zeros(len(parts), heads, capacity, width)
    for row, part in enumerate(parts):
        room[row, :, longest - part.shape[1] : longest] = part
    return room


def _of(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _changed(model: Any) -> dict[str, Any]:
    """Return what a checkpoint's generation settings change."""
    config = getattr(model, "generation_config", None)
    return {} if config is None else config.to_diff_dict()
