"""Which cache a stage has: of features, of what the lower layers of an encoder give, or none."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from mmlm.errors import ConfigError
from mmlm.storage import cache_folder
from mmlm.training.feature_cache import FeatureCache, TrunkCache, weights_key
from mmlm.training.learning import matching, public_name
from mmlm.training.objectives import objectives
from mmlm.training.recipe import StageConfig
from mmlm.training.shared import Run
from mmlm.training.trunk import Trunk, find_trunk
from mmlm.whole import WholeModel


class Caches:
    """The caches of a run; stages with the same frozen layers share one."""

    def __init__(self) -> None:
        self._open: list[FeatureCache] = []

    def of(self, run: Run, stage: StageConfig) -> FeatureCache | None:
        """Open the cache of a stage, where something of the encoder stands still.

        Raises:
            ConfigError: if a cache is asked for and there is nothing to keep.
        """
        config, model = run.recipe.run, run.assistant.model
        chosen = matching(model, stage.patterns)
        frozen = not any(public_name(name).startswith("vision.") for name in chosen)
        has_weights = any(True for _ in model.model.vision.parameters())
        if isinstance(model, WholeModel):
            if config.feature_cache == "on":
                raise ConfigError(
                    "run.feature_cache is on, and a stock class taken whole gives no features by "
                    "themselves. Use auto."
                )
            return None
        if model.model.conditioned is not None:
            if config.feature_cache == "on":
                raise ConfigError(
                    "run.feature_cache is on, and the connector lets the question into the "
                    "encoder, whose features differ with each. Use auto."
                )
            return None
        layered = model.config.facts.num_layers > 0  # the cache keeps one layer of a picture
        moving = model.config.video is not None  # and no clips
        if config.feature_cache == "off" or not has_weights or layered or moving:
            return None
        trunk = None if frozen else _trunk(run, stage, chosen)
        if not frozen and trunk is None:
            if config.feature_cache == "on":
                raise ConfigError(
                    f"run.feature_cache is on, but stage {stage.name} learns the encoder, whose "
                    f"features change with every step, and has no lower layers that stand still "
                    f"and could be kept instead. Use auto."
                )
            return None
        own = run.assistant.processor.image_processor.to_dict()
        facts = {key: own[key] for key in ("image", "vision_facts")} | {"v": 1}
        most_bytes = int(config.feature_cache_gib * 2**30)
        if trunk is not None:
            facts |= {"dtype": str(trunk.dtype), "trunk": trunk.names}
            folder = cache_folder("features") / weights_key(trunk.weights(), facts)
            return self._opened(folder, lambda: TrunkCache(trunk, folder, most_bytes=most_bytes))
        dtype = torch.bfloat16 if run.precision.name.startswith("bf16") else torch.float32
        facts["dtype"] = str(dtype)
        folder = cache_folder("features") / weights_key(model.model.vision.state_dict(), facts)
        width = model.config.facts.width
        return self._opened(
            folder, lambda: FeatureCache(folder, width=width, dtype=dtype, most_bytes=most_bytes)
        )

    def _opened(self, folder: Path, make: Callable[[], FeatureCache]) -> FeatureCache:
        known = [cache for cache in self._open if cache.folder == folder]
        if not known:
            known.append(make())
            self._open += known
        return known[0]

    def close(self) -> None:
        """Give the files back."""
        for cache in self._open:
            cache.close()
        self._open = []


def _trunk(run: Run, stage: StageConfig, learning: Collection[str]) -> Trunk | None:
    """Return the lower layers of an encoder whose upper layers learn, where that is safe."""
    config, model = run.recipe.run, run.assistant.model
    objective = objectives.read(stage.objective, origin=f"stages.{stage.name}.objective")
    anew = config.compile or config.gradient_checkpointing  # layers are called in other ways
    if run.engine.in_step or anew or objective.sees_pixels or model.model.counter.is_flat:
        return None
    chosen = {id(p) for name, p in model.named_parameters() if name in learning}
    encoder = model.model.vision
    return find_trunk(encoder, {n for n, p in encoder.named_parameters() if id(p) in chosen})
