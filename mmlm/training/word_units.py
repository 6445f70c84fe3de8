"""The objective `word_units`: each hidden unit of a two-layer connector stands for one answer.

    features ──► first layer ──► one number for each answer ──► GELU ──► second layer ──► tokens
                 learns: which answers                     keeps few     stands still: the
                 a place of a picture shows                              embedding of each answer

The first layer learns to tell the answers of the training data apart, by cross-entropy of the
mean over a picture and of each place of it. The second layer is set once, from the language
model's own embedding: what an image becomes is a short list of words, the likeliest strongest.
Nothing runs through the language model, so an epoch takes seconds, and the stage behind this
one begins with image tokens that the language model reads as words. It is a visual vocabulary
in the manner of Ovis (Lu et al. 2024, arXiv 2405.20797), written into the plain connector of
LLaVA, which needs no further part and is saved as the same class.

Two things make the list short and its words easy to tell apart. Cross-entropy does not change
when all units of a place move together, so this shift is used to bring the `list_length`-th
unit to zero, where GELU cuts. And the embeddings of the answers are whitened in part, because
they share a large common direction, which a sum of several would strengthen most.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from mmlm.connectors import MLPConnector
from mmlm.data.mixture import Mixture
from mmlm.data.planning import NOT_LEARNT, Planned
from mmlm.data.schema import BadRowError
from mmlm.data.streams import StreamSource
from mmlm.errors import ConfigError
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.training.objectives import LossWeight, Objective, ObjectiveConfig, objectives
from mmlm.training.word_match import mean_by, sample_of_each

_VISION = ("pixel_values", "vision_values", "vision_grids", "image_sizes")

Pieces = tuple[int, ...]


@objectives.register("word_units")
class WordUnitsConfig(ObjectiveConfig):
    """Each hidden unit of a two-layer connector stands for one answer of the data."""

    list_length: int = Field(default=10, ge=1)
    """How many answers a place of a picture names, about."""

    length: float = Field(default=1.0, gt=0)
    """How long the embedding of an answer is in the second layer, its centre taken off."""

    whitening: float = Field(default=1.0, gt=0)
    """Added to the variances before they are made equal, in units of their mean; large values
    leave the embeddings as they are."""

    shift: float = Field(default=1.0, ge=0)
    """Weight of the squared distance of the `list_length`-th unit from zero."""

    def build(self, *, loss_weight: LossWeight) -> Objective:
        """Return the objective; every picture counts the same, whatever `loss_weight` says."""
        del loss_weight
        return WordUnits(self)


class WordUnits(Objective):
    """Cross-entropy over the hidden units of the connector."""

    def __init__(self, config: WordUnitsConfig) -> None:
        self.config = config
        self._unit_of: dict[Pieces, int] = {}

    def prepare(self, model: nn.Module, tokenizer: Any, mixture: Mixture) -> None:
        """Give each answer of the data a unit, and write its embedding into the second layer.

        Raises:
            ConfigError: if the connector is no stack of two linear layers, the language model
                learns, the data are a stream, or they hold more answers than there are units.
        """
        joined, first, second = _layers_of(model)
        answers = sorted(_answers(mixture))
        num_units = first.out_features
        if len(answers) > num_units:
            raise ConfigError(
                f"objective word_units gives each answer a hidden unit of the connector, which has "
                f"{num_units:,}; the data hold {len(answers):,} answers. Use fewer, or objective "
                f"word_match, which has no such limit."
            )
        if len(answers) <= self.config.list_length:
            raise ConfigError(
                f"objective word_units found {len(answers):,} answers in the data, no more than "
                f"list_length ({self.config.list_length}). Lower list_length."
            )
        pieces = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in answers]
        self._unit_of = {piece: unit for unit, piece in enumerate(pieces)}
        table = _embedding(joined)
        centre = table.mean(0)
        words = torch.stack([table[list(piece)].mean(0) for piece in pieces]) - centre
        with torch.no_grad():
            second.weight.zero_()
            columns = self.config.length * _apart(words, self.config.whitening)
            second.weight[:, : len(answers)] = columns.T.to(second.weight.dtype)
            second.bias.copy_(centre)

    def weigh(self, samples: Sequence[Planned]) -> tuple[list[Tensor] | None, float]:
        """Count the samples that have both a picture and an answer."""
        return None, float(sum(1 for s in samples if s.images and s.num_labels > 1))

    def loss(self, model: nn.Module, inputs: dict[str, Any], num_items: float) -> Tensor:
        """Return the loss of one batch, divided by the pictures of the whole step."""
        joined, first, _ = _layers_of(model)
        with _watched(first) as seen:
            features = joined.model.get_image_features(**{k: inputs.get(k) for k in _VISION})
        if features is None:
            return torch.zeros((), device=joined.device)
        given, units = seen[0]
        units = units[:, : len(self._unit_of)].float()
        ids = inputs["input_ids"]
        sample = sample_of_each(ids, inputs.get("cu_seq_lens_q"))
        place = sample[ids == joined.config.image_token_id]
        wanted = self._units(inputs["labels"], sample)
        found = wanted[place] >= 0
        given, units, place = given[found].detach(), units[found], place[found]
        pictures = place.unique()
        means = mean_by(units, place, int(sample.max()) + 1)
        whole = cross_entropy(means[pictures], wanted[pictures], reduction="none")
        each = cross_entropy(units, wanted[place], reduction="none")
        each = each + self.config.shift * self._above(units, first(given).float()) ** 2
        each = mean_by(each[:, None], place, int(sample.max()) + 1)[pictures, 0]
        return (whole + each).sum() / num_items

    def _above(
        self, units: Float[Tensor, "tokens units"], again: Float[Tensor, "tokens all_units"]
    ) -> Float[Tensor, " tokens"]:
        """Return the `list_length`-th unit of each place; all units share its gradient alike.

        Args:
            units: What the places show.
            again: The same without a gradient into the encoder: where the list is cut is the
                connector's affair, and an encoder that learns this too forgets what it sees.
        """
        last = units.detach().topk(self.config.list_length, dim=1).values[:, -1]
        common = again[:, : units.shape[1]].mean(1)
        return last + common - common.detach()

    def _units(
        self, labels: Int[Tensor, "batch tokens"], sample: Tensor
    ) -> Int[Tensor, " samples"]:
        """Return the unit of each sample's answer, -1 for samples without one.

        The last label of a run ends the turn and belongs to no answer.
        """
        following = labels.new_full(labels.shape, NOT_LEARNT)
        following[:, :-1] = labels[:, 1:]
        learnt = (labels != NOT_LEARNT) & (following != NOT_LEARNT)
        spoken: dict[int, list[int]] = {}
        for number, piece in zip(sample[learnt].tolist(), labels[learnt].tolist(), strict=True):
            spoken.setdefault(number, []).append(piece)
        wanted = [-1] * (int(sample.max()) + 1)
        for number, pieces in spoken.items():
            unit = self._unit_of.get(tuple(pieces))
            if unit is None:
                raise ConfigError(
                    f"objective word_units does not know the answer with the tokens {pieces}: in "
                    f"its conversation it is cut into other pieces than alone. Begin answers with "
                    f"a blank, as in ' cat', and give every row one answer."
                )
            wanted[number] = unit
        return torch.tensor(wanted, device=labels.device)


def _layers_of(model: nn.Module) -> tuple[MMLMForConditionalGeneration, nn.Linear, nn.Linear]:
    """Return the model, and the two layers of its connector.

    Raises:
        ConfigError: if the connector is another.
    """
    connector = model.model.connector if isinstance(model, MMLMForConditionalGeneration) else None
    layers = list(connector.layers) if isinstance(connector, MLPConnector) else []
    if not isinstance(model, MMLMForConditionalGeneration) or len(layers) != 3:
        raise ConfigError(
            "objective word_units needs `connector: {use: mlp, depth: 2}`, whose hidden units it "
            "gives a meaning."
        )
    first, _, second = layers
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    if not isinstance(second.bias, Tensor):
        raise ConfigError("objective word_units needs a connector with bias: true.")
    return model, first, second


def _answers(mixture: Mixture) -> set[str]:
    """Return what is answered in the data; rows that cannot be read are told of elsewhere."""
    texts: set[str] = set()
    for source in mixture.sources:
        if isinstance(source, StreamSource):
            raise ConfigError(
                f"objective word_units must know all answers before it begins, and {source.name} "
                f"is a stream. Use a file, or objective word_match."
            )
        for row in range(len(source)):
            try:
                messages = source.sample(row).messages
            except BadRowError:
                continue
            texts |= {message.text for message in messages if message.role == "assistant"}
    return texts


def _embedding(model: MMLMForConditionalGeneration) -> Tensor:
    weight: Any = model.get_input_embeddings().weight
    if weight.requires_grad:
        raise ConfigError(
            "objective word_units writes the embedding of the language model into the connector, "
            "so it must stand still meanwhile. Write learn: [connector.*] in the stage, and let "
            "the language model learn in the next one."
        )
    return weight.detach().float()


def _apart(
    words: Float[Tensor, "answers width"], whitening: float
) -> Float[Tensor, "answers width"]:
    """Return directions of length one that are less alike than the words themselves.

    ZCA whitening (Bell and Sejnowski 1997), with a ridge.
    """
    words = normalize(words, dim=1)
    words = words - words.mean(0)
    variances, axes = torch.linalg.eigh(words.T @ words / len(words))
    scales = (variances.clamp(min=0) + whitening * variances.mean()).rsqrt()
    return normalize(words @ (axes * scales) @ axes.T, dim=1)


@contextmanager
def _watched(layer: nn.Module) -> Generator[list[tuple[Tensor, Tensor]]]:
    """Keep what a layer gets and gives while the block runs."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        del module
        seen.append((given[0], output))

    hook = layer.register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
