"""The objective `contrast`: a picture points to its own caption, and a caption to its picture.

    picture ─► frozen encoder ─► connector `dual_projector` ─► vector ─┐
    caption ─► frozen encoder of texts ─► its other MLP ─────► vector ─┴─► who belongs to whom?

The symmetric cross-entropy of CLIP (arXiv 2103.00020) over the pairs of one row of the data, with
two frozen encoders that never saw one another (arXiv 2409.19425). No language model runs, and with
the feature cache no encoder of pictures either after the first epoch. `run.row_tokens` says how
many pairs stand together: a pair takes its tokens. Ranks and rows per step change nothing; where
memory runs out and rows are cut, fewer pairs are told apart at once. Pairs with one and the same
caption are no strangers to one another, and are left out of each other's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmlm.connectors import DualProjectorConnector
from mmlm.data.mixture import Mixture
from mmlm.data.planning import Planned
from mmlm.errors import ConfigError
from mmlm.language.sentences import SentenceConfig, SentenceEncoder
from mmlm.modeling import MMLMForConditionalGeneration, places_of_pictures
from mmlm.training.objectives import LossWeight, Objective, ObjectiveConfig, objectives
from mmlm.training.said import on_device, stretches, texts_of
from mmlm.training.word_match import sample_of_each

_VISION = ("pixel_values", "vision_values", "vision_grids", "image_sizes")


@objectives.register("contrast")
class ContrastConfig(ObjectiveConfig):
    """Pictures and captions of one row find one another in the space of `dual_projector`."""

    def build(self, *, loss_weight: LossWeight) -> Objective:
        """Return the objective; every pair counts the same, whatever `loss_weight` says."""
        del loss_weight
        return Contrast()


class Contrast(Objective):
    """Cross-entropy over the pictures and over the captions of a row."""

    def __init__(self) -> None:
        self._texts: SentenceEncoder | None = None
        self._tokenizer: Any = None

    def prepare(self, model: nn.Module, tokenizer: Any, mixture: Mixture) -> None:
        """Load the encoder of texts.

        Raises:
            ConfigError: if the connector is another one, or the texts have another width.
        """
        connector = connector_of(model, "objective contrast")
        config, self._tokenizer = connector.config, tokenizer
        self._texts = SentenceConfig.from_dict(config.text, origin="connector.text").load()
        if self._texts.width != config.sentence_width:
            raise ConfigError(
                f"objective contrast: vectors of {config.text['checkpoint']} are "
                f"{self._texts.width} wide, and the connector was made for "
                f"{config.sentence_width}. Bring back the encoder that it was composed with."
            )

    def weigh(self, samples: Sequence[Planned]) -> tuple[list[Tensor] | None, float]:
        """Count the samples that have both a picture and a caption."""
        return None, float(sum(bool(s.images) and bool(stretches(s.labels)) for s in samples))

    def loss(self, model: nn.Module, inputs: dict[str, Any], num_items: float) -> Tensor:
        """Return the loss of one row, divided by the pairs of the whole step."""
        connector = connector_of(model, "objective contrast")
        joined: Any = model
        assert self._texts is not None
        pairs = self._pairs(joined, inputs)
        if not pairs:
            return torch.zeros((), device=inputs["labels"].device)
        features = joined.model.reduced(joined.model.seen(**{k: inputs.get(k) for k in _VISION}))
        vectors = connector.embed(features)
        shown = torch.stack([vectors[first:last].mean(0) for first, last, _ in pairs])
        shown = nn.functional.normalize(shown, dim=-1)
        texts = [text for _, _, text in pairs]
        on_device(self._texts, shown.device)
        said = connector.embed_texts(self._texts(texts))
        alike = connector.scale.clamp(max=4.6052).exp() * shown @ said.T  # 100 at most, as in CLIP
        number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        names = torch.tensor([number[text] for text in texts], device=shown.device)
        own = torch.arange(len(texts), device=shown.device)
        same = (names[:, None] == names) & (own[:, None] != own)
        alike = alike.masked_fill(same, -torch.inf)
        both = cross_entropy(alike, own, reduction="sum")
        both = both + cross_entropy(alike.T, own, reduction="sum")
        return both / 2 / num_items

    def _pairs(self, joined: Any, inputs: dict[str, Any]) -> list[tuple[int, int, str]]:
        """Return the first picture of each sample, as its tiles, and the sample's first caption."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        sample = sample_of_each(ids, inputs.get("cu_seq_lens_q")).cpu()
        texts: dict[int, str] = {}
        for said in texts_of(labels, self._tokenizer):
            texts.setdefault(int(sample[said.row, said.begin]), said.text)
        pictures: dict[int, tuple[int, int]] = {}
        places = places_of_pictures(
            joined.model.counter, ids == joined.config.image_token_id, inputs.get("image_sizes")
        )
        for place in places:
            key = int(sample[place.row, place.begin])
            pictures.setdefault(key, (place.first_tile, place.last_tile))
        return [(*tiles, texts[key]) for key, tiles in pictures.items() if key in texts]


def connector_of(model: nn.Module, what: str) -> DualProjectorConnector:
    """Return the connector of a model.

    Raises:
        ConfigError: if it is no dual projector.
    """
    if isinstance(model, MMLMForConditionalGeneration):
        connector: Any = model.model.connector
        if isinstance(connector, DualProjectorConnector):
            return connector
    raise ConfigError(
        f"{what} needs `connector: {{use: dual_projector, text: {{checkpoint: …}}}}`, whose two "
        f"MLPs meet in one space."
    )
