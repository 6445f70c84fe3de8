"""One vector for each text, by a frozen encoder of texts.

    texts ──► tokenizer ──► text tower of a CLIP or SigLIP ──► its embedding
                       └──► any encoder of transformers ────► mean, first or last token

For what compares texts with pictures or with texts: it is no language model that answers. The
vectors have length one. Nothing here learns.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

from mmlm.config import Config
from mmlm.errors import ConfigError
from mmlm.storage.parts import locate

Pooling = Literal["auto", "mean", "first", "last"]

_TOWERS = {
    "clip": ("CLIPTextModelWithProjection", "text_embeds"),
    "siglip": ("SiglipTextModel", "pooler_output"),
    "siglip2": ("Siglip2TextModel", "pooler_output"),
}
"""Of joint checkpoints: the class of the text tower, and what of it pictures are compared with."""

_PADDED = ("siglip", "siglip2")
"""Towers that learnt on texts padded to their full length, and read them so."""

_MOST_TOKENS = 512


class SentenceConfig(Config):
    """A frozen encoder that turns a text into one vector."""

    checkpoint: str
    """A CLIP or SigLIP, or an encoder of texts: a folder, a Hub id, or `package:NAME/FOLDER`."""

    revision: str | None = None
    """Branch, tag or commit on the Hub."""

    pooling: Pooling = "auto"
    """How the tokens become one vector: `auto` is a CLIP's own embedding, and else the mean."""

    max_tokens: int | None = Field(default=None, ge=2)
    """Longer texts are cut; by default what the encoder reads, and 512 at most."""

    def load(self) -> SentenceEncoder:
        """Load the encoder with its weights.

        Raises:
            ConfigError: if it cannot be read, or has no tokenizer.
        """
        return SentenceEncoder(self)


class SentenceEncoder(nn.Module):
    """Turns texts into vectors of length one.

    Shapes:
        returns: ``(texts, width)``, float32
    """

    def __init__(self, config: SentenceConfig) -> None:
        super().__init__()
        place = locate(config.checkpoint, origin="text.checkpoint")
        try:
            whole: Any = AutoConfig.from_pretrained(place, revision=config.revision)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(place, revision=config.revision)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{config.checkpoint} cannot be read as an encoder of texts with its tokenizer: "
                f"{' '.join(str(error).split())[:300]}"
            ) from None
        self.name, kind = config.checkpoint, str(whole.model_type)
        self._key: str | None = None
        self._pooling = "mean" if config.pooling == "auto" else config.pooling
        self._padding: bool | str = True
        if kind in _TOWERS and config.pooling == "auto":
            name, self._key = _TOWERS[kind]
            own = whole.text_config
            if kind == "clip":
                own.projection_dim = whole.projection_dim
            tower, self._padding = getattr(transformers, name), kind not in _PADDED
        else:
            own, tower = whole.get_text_config(), AutoModel
        words: dict[str, Any] = {"revision": config.revision}
        self.tower: Any = _loaded(tower, place, own if self._key else whole, config, words)
        self.tower.eval().requires_grad_(False)
        reads = int(getattr(own, "max_position_embeddings", 0) or _MOST_TOKENS)
        reads -= int(kind in ("roberta", "xlm-roberta", "camembert")) * 2  # positions begin at 2
        self.max_tokens = min(config.max_tokens or _MOST_TOKENS, reads)
        if self._padding is False:
            self._padding = "max_length"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.width = self._width(own)

    def _width(self, config: Any) -> int:
        if self._key == "text_embeds":
            return int(config.projection_dim)
        if self._key == "pooler_output":
            return int(getattr(config, "projection_size", None) or config.hidden_size)
        return int(config.hidden_size)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return a vector for each text."""
        device = next(self.tower.parameters()).device
        given = self.tokenizer(
            list(texts), padding=self._padding, truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        ).to(device)  # fmt: skip
        ids, mask = given["input_ids"], given["attention_mask"]
        if self._padding == "max_length":
            out: Any = self.tower(input_ids=ids)
        else:
            out = self.tower(input_ids=ids, attention_mask=mask)
        if self._key is not None:
            return normalize(out[self._key].float(), dim=-1)
        return normalize(_pooled(out.last_hidden_state.float(), mask, self._pooling), dim=-1)


def _loaded(tower: Any, place: str, own: Any, config: SentenceConfig, words: Any) -> Any:
    """Load a text tower, whose weights must all be there."""
    try:
        with _quiet():  # that a tower of pictures beside it is left out is meant
            loaded, report = tower.from_pretrained(
                place, config=own, output_loading_info=True, **words
            )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{config.checkpoint} cannot be loaded as an encoder of texts: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ConfigError(
            f"{config.checkpoint} lacks {len(missing)} weights of its text tower "
            f"({', '.join(missing[:3])} …), which would stay random. Name another checkpoint."
        )
    return loaded


def _pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Make one vector of the tokens that are no padding: ``(texts, width)``."""
    real = mask.bool()
    if pooling == "mean":
        return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
    order = torch.arange(states.shape[1], device=states.device)
    at = order.masked_fill(~real, states.shape[1] if pooling == "first" else -1)
    place = at.amin(1) if pooling == "first" else at.amax(1)
    return states[torch.arange(len(states), device=states.device), place]


@contextmanager
def _quiet() -> Generator[None]:
    """Silence transformers' report of weights that are not used."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
