"""The objective `word_match`: what an image becomes shall point to the words that belong to it.

The mean of an image's tokens is compared with every word piece of the language model's own
embedding, and the pieces of the answer are to win. Nothing runs through the language model, so
an epoch takes seconds. It is meant for a first stage that learns the connector alone: the
stage behind it begins with image tokens that the language model can already read.

It is contrastive learning (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748) with the
vocabulary as the set of negatives and cosine similarity, as in CLIP (Radford et al. 2021, arXiv
2103.00020); the embedding is centred, because all word pieces share a large common part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmlm.data.planning import NOT_LEARNT, Planned
from mmlm.errors import ConfigError
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.training.objectives import LossWeight, Objective, ObjectiveConfig, objectives

_VISION = ("pixel_values", "vision_values", "vision_grids", "image_sizes")


@objectives.register("word_match")
class WordMatchConfig(ObjectiveConfig):
    """The mean of an image's tokens points to the word pieces of its answer."""

    temperature: float = Field(default=0.05, gt=0)
    """Divides the cosine similarity; lower is sharper."""

    anchor: float = Field(default=1.0, ge=0)
    """Weight of the squared distance to the mean of the answer's embeddings, in units of their
    variance; it keeps image tokens as long as the tokens that the language model knows."""

    def build(self, *, loss_weight: LossWeight) -> Objective:
        """Return the objective; every picture counts the same, whatever `loss_weight` says."""
        return WordMatch(self.temperature, self.anchor)


class Table(NamedTuple):
    """An embedding around its centre.

    Shapes:
        words: ``(vocabulary, width)``, of length one
        lengths: ``(vocabulary,)``, their lengths before
        centre: ``(width,)``
    """

    words: Tensor
    lengths: Tensor
    centre: Tensor
    variance: float


class WordMatch(Objective):
    """Cross-entropy between the pieces of an answer and the pieces that an image resembles.

    Args:
        temperature: Divides the cosine similarity.
        anchor: Weight of the distance to the mean embedding of the answer.
    """

    def __init__(self, temperature: float, anchor: float) -> None:
        self.temperature = temperature
        self.anchor = anchor
        self._table: Table | None = None

    def weigh(self, samples: Sequence[Planned]) -> tuple[list[Tensor] | None, float]:
        """Count the samples that have both a picture and words to learn."""
        return None, float(sum(1 for s in samples if s.images and _has_words(s)))

    def loss(self, model: nn.Module, inputs: dict[str, Any], num_items: float) -> Tensor:
        """Return the loss of one batch, divided by the pictures of the whole step."""
        joined: Any = model
        assert isinstance(joined, MMLMForConditionalGeneration)
        vision = {k: inputs.get(k) for k in _VISION}
        features = joined.model.get_image_features(**vision)
        if features is None:
            return torch.zeros((), device=joined.device)
        ids, labels = inputs["input_ids"], inputs["labels"]
        sample = sample_of_each(ids, inputs.get("cu_seq_lens_q"))
        place = sample[ids == joined.config.image_token_id]
        means = mean_by(features.values.float(), place, int(sample.max()) + 1)
        target = _pieces(labels, sample, means.shape[0], joined.config.text_config.vocab_size)
        both = (target.sum(1) > 0) & torch.zeros_like(target[:, 0], dtype=torch.bool).index_fill(
            0, place.unique(), value=True
        )
        table, target = self._embedding(joined), target[both]
        given = means[both] - table.centre
        alike = normalize(given, dim=1) @ table.words.T / self.temperature
        loss = -(target * alike.log_softmax(1)).sum()
        if self.anchor:
            # The centred words times their lengths are the centred embeddings themselves.
            wanted = (target * table.lengths) @ table.words
            loss = loss + self.anchor * ((given - wanted) ** 2).sum() / table.variance
        return loss / num_items

    def _embedding(self, model: MMLMForConditionalGeneration) -> Table:
        """Return the centred embedding; it stands still."""
        if self._table is None:
            weight: Any = model.get_input_embeddings().weight
            if weight.requires_grad:
                raise ConfigError(
                    "objective word_match compares images with the embedding of the language "
                    "model, which must stand still meanwhile. Write learn: [connector.*] in the "
                    "stage, and let the language model learn in the next one."
                )
            rows: Tensor = weight.detach().float()
            centre = rows.mean(0)
            lengths = (rows - centre).norm(dim=1)
            variance = float((lengths**2).mean())
            self._table = Table(normalize(rows - centre, dim=1), lengths, centre, variance)
        return self._table


def _has_words(sample: Planned) -> bool:
    """Whether a sample has a learnt token beside the one that ends the turn."""
    return sample.num_labels > 1


def sample_of_each(ids: Tensor, borders: Tensor | None) -> Int[Tensor, "batch tokens"]:
    """Return the number of the sample at each position of a packed row or a padded batch."""
    if borders is None:
        rows = torch.arange(ids.shape[0], device=ids.device)
        return rows[:, None].expand_as(ids)
    lengths = borders.diff().long()
    return torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths)[None]


def mean_by(
    values: Float[Tensor, "tokens width"], group: Int[Tensor, " tokens"], num_groups: int
) -> Float[Tensor, "groups width"]:
    """Return the mean of the values of each group, zero for a group without any."""
    sums = values.new_zeros(num_groups, values.shape[1]).index_add(0, group, values)
    counts = torch.bincount(group, minlength=num_groups).clamp(min=1)
    return sums / counts[:, None]


def _pieces(
    labels: Int[Tensor, "batch tokens"], sample: Tensor, num_samples: int, vocabulary: int
) -> Float[Tensor, "samples vocabulary"]:
    """Return, for each sample, the share of each word piece in what is to be learnt.

    The last label of a run ends the turn; it is the same for every picture and left out.
    """
    following = labels.new_full(labels.shape, NOT_LEARNT)
    following[:, :-1] = labels[:, 1:]
    learnt = (labels != NOT_LEARNT) & (following != NOT_LEARNT)
    target = torch.zeros(num_samples, vocabulary, device=labels.device)
    ones = torch.ones(int(learnt.sum()), device=labels.device)
    target.index_put_((sample[learnt], labels[learnt]), ones, accumulate=True)
    return target / target.sum(1, keepdim=True).clamp(min=1)
