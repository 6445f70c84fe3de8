"""Position ids that the tokens of a picture share (MouSi, arXiv 2401.17221).

Several encoders one after another make long pictures; where their tokens share positions, a
picture takes few of them, and the text behind it stands near. What a token adds to the position
is known for each tile (`VisionConfig.position_steps`); text adds one each. Positions of what a
cache holds travel with it, so that an answer goes on where the prompt ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import AlignmentError, ConfigError

_HELD = "mmlm_positions"


class SharedPositions:
    """Computes position ids in which placeholders share positions.

    Args:
        steps: For each token of a tile, what it adds to the position: 1 or 0.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = tuple(steps)
        self._new: Tensor | None = None

    def __call__(
        self,
        slots: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        named: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Return position ids, and the attention mask, which must then be given.

        Shapes:
            slots: ``(batch, tokens)``, True where a placeholder stands
            attention_mask: ``(batch, past + tokens)``
            returns: ``(batch, tokens)`` and ``(batch, past + tokens)``

        Raises:
            AlignmentError: if the placeholders are not those of whole tiles.
            ConfigError: if samples of a packed row share a picture, or are told apart by positions.
        """
        borders = named.get("cu_seq_lens_q")
        adds = self._adds(slots)
        if attention_mask is not None and attention_mask.ndim == 2:
            adds = adds * attention_mask[:, -adds.shape[1] :].to(adds)
        positions = adds.cumsum(1) - 1
        if borders is not None:
            self._refuse(named)
            starts = borders[:-1].long()
            lengths = borders.diff().long()
            positions = positions - positions[0, starts].repeat_interleave(lengths)[None]
        past = int(cache.get_seq_length()) if cache is not None else 0
        held: Tensor | None = getattr(cache, _HELD, None)
        if past:
            if held is None or held.shape[1] < past:
                raise AlignmentError(
                    "The cache holds no positions of what it keeps. Begin it with this model."
                )
            held = held[:, :past].expand(len(positions), -1)
            positions = positions + held[:, -1:] + 1
        elif borders is None and attention_mask is None:
            # Without a mask, transformers takes positions that stand still for new samples.
            attention_mask = torch.ones_like(slots, dtype=torch.long)
        positions = positions.clamp(min=0)
        self._new = positions if held is None or not past else torch.cat([held, positions], 1)
        self.keep(cache)
        return positions, attention_mask

    def keep(self, cache: Any) -> None:
        """Write the positions into the cache that holds their tokens."""
        if cache is not None and self._new is not None:
            setattr(cache, _HELD, self._new)

    def _adds(self, slots: Tensor) -> Tensor:
        """Return what each token adds to the position."""
        count, each = int(slots.sum()), len(self.steps)
        if count % each:
            raise AlignmentError(
                f"vision.positions knows {each} tokens of a tile, and the batch has {count} "
                f"placeholders. A reducer or connector behind the mixture changes their number: "
                f"give each encoder a `reducer` of its own, or set vision.positions: each."
            )
        adds = torch.ones_like(slots, dtype=torch.long)
        steps = torch.tensor(self.steps, device=slots.device).repeat(count // each)
        return adds.masked_scatter(slots, steps)

    def _refuse(self, named: dict[str, Any]) -> None:
        if named.get("seen_before") is not None:
            raise ConfigError(
                "vision.positions cannot be shared where questions share a picture in a packed "
                "row. Set `turns: chain` for the source."
            )
