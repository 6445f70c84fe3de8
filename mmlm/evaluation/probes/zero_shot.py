"""What a space of pictures and texts knows without learning: kinds, and who belongs to whom.

    zero-shot kinds   the name of which kind is nearest to the picture? (CLIP, arXiv 2103.00020)
    text to picture   of all pictures, is that of a text the nearest to it, or among five?
    picture to text   of all texts, is that of a picture the nearest to it, or among five?

Two parts give such a space: the encoder `embedding`, which is a CLIP's own, and the connector
`dual_projector`, which joins two encoders that never saw one another (arXiv 2409.19425).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmlm.connectors import DualProjectorConnector
from mmlm.errors import EvaluationError
from mmlm.evaluation.asking.backend import LocalBackend
from mmlm.evaluation.benchmarks.items import Item
from mmlm.evaluation.probes.result import Probed
from mmlm.evaluation.statistics import wilson
from mmlm.features import VisionFeatures
from mmlm.language.sentences import SentenceConfig
from mmlm.vision import EmbeddingEncoder

TEMPLATES = ("a photo of a {}.", "a picture of {}.", "{}")
"""In what a kind's name is said; the mean of their vectors stands for the kind."""

_FEWEST = 4


class JointSpace(NamedTuple):
    """How pictures and texts become vectors of length one, ``(items, width)``."""

    pictures: Callable[[Sequence[VisionFeatures]], Tensor]
    texts: Callable[[Sequence[str]], Tensor]


def joint_space_of(model: Any) -> JointSpace | None:
    """Return the space that the parts of a model share, or None where they share none."""
    parts, words = model.model, model.config.vision
    if isinstance(parts.connector, DualProjectorConnector):
        connector = parts.connector
        texts = SentenceConfig.from_dict(connector.config.text, origin="connector.text").load()

        def embedded(features: Sequence[VisionFeatures]) -> Tensor:
            each = [connector.embed(parts.reduced(one)).mean(0) for one in features]
            return normalize(torch.stack(each), dim=-1)

        return JointSpace(embedded, lambda said: connector.embed_texts(texts(said)))
    if isinstance(parts.vision, EmbeddingEncoder):
        name = words.get("into") or words.get("checkpoint")
        if name is None:
            return None
        tower = SentenceConfig(checkpoint=name).load()

        def own(features: Sequence[VisionFeatures]) -> Tensor:
            return normalize(torch.stack([one.values.float().mean(0) for one in features]), dim=-1)

        return JointSpace(own, tower)
    return None


@torch.no_grad()
def zero_shot_kinds(
    space: JointSpace, backend: LocalBackend, name: str, items: Sequence[Item]
) -> Probed:
    """Say which thing is shown by the nearest name.

    Raises:
        EvaluationError: if the benchmark does not say what is shown.
    """
    usable = [item for item in items if item.thing]
    kinds = sorted({item.thing for item in usable})
    if len(kinds) < 2:
        raise EvaluationError(f"{name} names fewer than two kinds; name the column in `thing`.")
    said = [normalize(space.texts([t.format(k) for t in TEMPLATES]).mean(0), dim=0) for k in kinds]
    nearest = (_shown(space, backend, usable) @ torch.stack(said).T).argmax(-1).tolist()
    right = sum(kinds[index] == item.thing for index, item in zip(nearest, usable, strict=True))
    interval = wilson(float(right), len(usable))
    return Probed("zero-shot kinds", name, len(usable), *interval, chance=1 / len(kinds))


@torch.no_grad()
def retrieval(
    space: JointSpace, backend: LocalBackend, name: str, items: Sequence[Item]
) -> list[Probed]:
    """Find the picture of each text among all, and the text of each picture.

    A tie counts against: what is equal to all finds nothing.

    Raises:
        EvaluationError: if there are too few pictures with texts of their own.
    """
    texts = [item.target.references[0] if item.target.references else "" for item in items]
    if len(items) < _FEWEST or len(set(texts)) < len(texts):
        raise EvaluationError(
            f"{name}: to find pictures by their texts, each of at least {_FEWEST} pictures needs a "
            f"text of its own (got {len(items)} pictures and {len(set(texts))} texts)."
        )
    alike = _shown(space, backend, items) @ space.texts(texts).T
    found: list[Probed] = []
    for probe, table in (("picture to text", alike), ("text to picture", alike.T)):
        rank = (table >= table.diagonal()[:, None]).sum(-1)  # 1 is the nearest
        for most in (1, 5):
            interval = wilson(float((rank <= most).sum()), len(items))
            chance = min(1.0, most / len(items))
            found.append(Probed(f"{probe} @{most}", name, len(items), *interval, chance=chance))
    return found


def _shown(space: JointSpace, backend: LocalBackend, items: Sequence[Item]) -> Tensor:
    rows: list[Tensor] = []
    for start in range(0, len(items), 32):
        some = items[start : start + 32]
        found = backend.features([i.images[0] for i in some], [i.image_keys[0] for i in some])
        rows.append(space.pictures(found).cpu())
    return torch.cat(rows)
