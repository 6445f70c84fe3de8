"""What a frozen encoder knows: the kinds of thing, and their places.

    encoder ──► kinds     a linear probe on pooled features: which thing is it?
            └─► places    a linear probe on every patch: does the thing cover it?

Users choose an encoder first, so two small probes say what it holds (after Battle of the
Backbones, arXiv 2310.19909, and the grounding part of G-VUE, arXiv 2211.15402; both are far
larger). Nothing is trained but linear maps on features that stay as they are. `probe_all` puts
`alignment`, which asks the language model, beside them, and `zero_shot` where pictures and texts
share a space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.table import Table
from torch import Tensor

from mmlm.assistant import Assistant
from mmlm.errors import ConfigError, EvaluationError, MissingExtraError
from mmlm.evaluation.asking.backend import LocalBackend
from mmlm.evaluation.benchmarks.benchmark import Benchmark
from mmlm.evaluation.benchmarks.items import Item
from mmlm.evaluation.probes.alignment import Alignment, align_by_layer
from mmlm.evaluation.probes.result import Probed, Probes
from mmlm.evaluation.probes.zero_shot import joint_space_of, retrieval, zero_shot_kinds
from mmlm.evaluation.statistics import Interval, bootstrap, wilson
from mmlm.features import Grid, VisionFeatures
from mmlm.processing import MMLMProcessor

Floats = NDArray[np.float64]

_FOLDS = 5
_SIDE_PX = 256
_COLOURS = ("#d7301f", "#2b8cbe", "#31a354", "#fdae61", "#756bb1")


def probe_all(
    model: Assistant, benchmarks: Sequence[Benchmark], *, most: int = 500, seed: int = 0
) -> Probes:
    """Probe a model on drawn pictures, and on those of benchmarks.

    Args:
        model: The model, whose encoder and language model stay as they are. A stock class taken
            whole shows no encoder; its layers are asked all the same.
        benchmarks: Local or published ones; `kinds` needs those that say what `thing` is shown.
        most: Pictures of a benchmark that are looked at.
        seed: Seed of the folds, of the drawn pictures, and of the intervals.
    """
    has_parts = isinstance(model.processor, MMLMProcessor)
    backend = LocalBackend(model)
    encoder: list[Probed] = []
    alignment: list[Alignment] = []
    left_out: list[str] = []
    if not has_parts:
        left_out.append("The encoder: a stock class that is taken whole does not show it.")
    space = None
    try:
        space = joint_space_of(backend.model) if has_parts else None
    except ConfigError as error:  # its encoder of texts is not at hand
        left_out.append(str(error))
    for each in benchmarks:
        items = one_each(each.items)[:most]
        if space is not None:
            for probe in (zero_shot_kinds, retrieval):
                try:
                    found = probe(space, backend, each.name, items)
                    encoder += [found] if isinstance(found, Probed) else found
                except EvaluationError as error:
                    left_out.append(str(error))
        try:
            if has_parts:
                encoder.append(probe_kinds(backend, each.name, items, seed=seed))
        except EvaluationError as error:
            left_out.append(str(error))
        try:
            alignment += align_by_layer(backend, each.name, items[:100])
        except EvaluationError as error:
            left_out.append(str(error))
    try:
        if has_parts:
            encoder.append(probe_places(backend, seed=seed))
    except EvaluationError as error:
        left_out.append(str(error))
    return Probes(tuple(encoder), tuple(alignment), tuple(left_out))


def probe_tables(found: Probes) -> list[Table]:
    """Return the probes as tables for the terminal."""
    first = Table(title="The frozen encoder", title_justify="left")
    for name in ("probe", "set"):
        first.add_column(name)
    for name in ("pictures", "score", "chance"):
        first.add_column(name, justify="right")
    for each in found.encoder:
        score = f"{100 * each.score:.1f} ({100 * each.low:.1f}–{100 * each.high:.1f})"
        first.add_row(each.probe, each.set, f"{each.n:,}", score, f"{100 * each.chance:.1f}")
    if found.left_out:
        first.caption = "Not probed: " + " ".join(found.left_out)
    if not found.alignment:
        return [first]
    second = Table(title="Pictures and their texts, by layer of the LLM", title_justify="left")
    second.add_column("set")
    for name in ("layer", "alignment", "chance"):
        second.add_column(name, justify="right")
    for row in found.alignment:
        second.add_row(row.set, str(row.layer), f"{row.score:.3f}", f"{row.chance:.3f}")
    return [first, second]


def one_each(items: Sequence[Item]) -> list[Item]:
    """Return the first item of every picture."""
    first: dict[str, Item] = {}
    for item in items:
        if len(item.images) == 1:
            first.setdefault(item.image_keys[0], item)
    return list(first.values())


def probe_kinds(backend: LocalBackend, name: str, items: Sequence[Item], *, seed: int) -> Probed:
    """Say from pooled features which thing is shown: cross-validated, linear.

    Raises:
        EvaluationError: if the benchmark does not say what is shown, or too little of each.
    """
    counts: dict[str, int] = {}
    for item in items:
        if item.thing:
            counts[item.thing] = counts.get(item.thing, 0) + 1
    usable = [item for item in items if counts.get(item.thing, 0) >= _FOLDS]
    kinds = sorted({item.thing for item in usable})
    if len(kinds) < 2:
        raise EvaluationError(
            f"{name} has fewer than two kinds of thing with {_FOLDS} pictures each; name the "
            f"column in `thing`."
        )
    features = _pooled(backend, usable)
    labels = np.array([kinds.index(item.thing) for item in usable])
    right = _cross_validated(features, labels, seed=seed)
    interval = wilson(float(right.sum()), len(right))
    commonest = float(np.bincount(labels).max() / len(labels))
    return Probed("kinds", name, len(usable), *interval, chance=commonest)


def _pooled(backend: LocalBackend, items: Sequence[Item]) -> Floats:
    rows: list[Tensor] = []
    for start in range(0, len(items), 32):
        some = items[start : start + 32]
        found = backend.features([i.images[0] for i in some], [i.image_keys[0] for i in some])
        rows += [each.values.float().mean(dim=0).cpu() for each in found]
    return torch.stack(rows).double().numpy()


def _cross_validated(features: Floats, labels: NDArray[np.int64], *, seed: int) -> NDArray[Any]:
    """Return for each row whether a map learnt on the other folds says its label."""
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError:
        raise MissingExtraError("scikit-learn", needed_for="--probe", extra="eval") from None
    right = np.zeros(len(labels))
    folds: Any = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    for learnt, held in folds.split(features, labels):
        model = _linear().fit(features[learnt], labels[learnt])
        right[held] = model.predict(features[held]) == labels[held]
    return right


def _linear() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise MissingExtraError("scikit-learn", needed_for="--probe", extra="eval") from None
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1))


@dataclass(frozen=True)
class Drawn:
    """A picture with one disc on a busy ground, and the disc's place in shares of the side."""

    image: Image.Image
    left: float
    top: float
    size: float


def draw_disc(number: int, *, seed: int = 0) -> Drawn:
    """Draw one; a pure function of its number and the seed.

    The ground has squares of the disc's colours, so that colour alone does not tell the place.
    """
    dice = np.random.default_rng([seed, number])
    ground = Image.fromarray(dice.integers(90, 190, (16, 16, 3), dtype=np.uint8))
    image = ground.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, side = (*dice.integers(0, _SIDE_PX - 24, 2), int(dice.integers(10, 24)))
        pen.rectangle((x, y, x + side, y + side), fill=str(dice.choice(_COLOURS)))
    size = float(dice.uniform(0.25, 0.45))
    left, top = (float(dice.uniform(0, 1 - size)) for _ in range(2))
    box = [_SIDE_PX * edge for edge in (left, top, left + size, top + size)]
    pen.ellipse(box, fill=str(dice.choice(_COLOURS)))
    return Drawn(image, left, top, size)


def covered(drawn: Drawn, grid: Grid) -> NDArray[np.bool_]:
    """Return which patches have their middle in the disc.

    Shapes:
        returns: ``(rows * columns,)``, row by row
    """
    rows, columns = grid.rows, grid.columns
    y, x = np.mgrid[0:rows, 0:columns]
    half = drawn.size / 2
    across = (x + 0.5) / columns - (drawn.left + half)
    down = (y + 0.5) / rows - (drawn.top + half)
    return (across**2 + down**2 <= half**2).reshape(-1)


def probe_places(
    backend: LocalBackend, *, num_learnt: int = 48, num_held: int = 48, seed: int = 0
) -> Probed:
    """Say from each patch alone whether the disc covers it, on pictures that were not learnt from.

    The score is the area under the ROC curve of each picture's patches, averaged.

    Raises:
        EvaluationError: if the encoder gives no map of patches for a whole picture.
    """
    drawn = [draw_disc(number, seed=seed) for number in range(num_learnt + num_held)]
    keys = [f"drawn disc {seed} {number}" for number in range(len(drawn))]
    found = backend.features([each.image for each in drawn], keys)
    grids = {grid for each in found for grid in each.grids}
    if len(grids) != 1 or any(len(each.grids) != 1 for each in found):
        raise EvaluationError(
            "Places are probed where a square picture is one tile; here it is cut."
        )
    grid = grids.pop()
    if found[0].values.shape[0] != grid.rows * grid.columns or grid.rows < 3:
        raise EvaluationError("Places cannot be probed: the encoder keeps no map of patches.")
    truth = [covered(each, grid) for each in drawn]
    learnt, held = range(num_learnt), range(num_learnt, len(drawn))
    model = _linear().fit(
        np.concatenate([_patches(found[n]) for n in learnt]),
        np.concatenate([truth[n] for n in learnt]),
    )
    areas = np.array(
        [_roc_area(model.decision_function(_patches(found[n])), truth[n]) for n in held]
    )
    sums = np.stack([areas, np.ones(len(areas))], axis=1)
    interval: Interval = bootstrap(sums, seed=seed)
    return Probed("places", "drawn", len(areas), *interval, chance=0.5)


def _patches(features: VisionFeatures) -> Floats:
    return features.values.float().cpu().double().numpy()


def _roc_area(scores: Floats, truth: NDArray[np.bool_]) -> float:
    """Return how often a covered patch scores above another one; equal scores count half."""
    inside, outside = scores[truth][:, None], scores[~truth][None]
    return float(((inside > outside) + 0.5 * (inside == outside)).mean())
