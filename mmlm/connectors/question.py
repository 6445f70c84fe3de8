"""Connectors that read the question: its words reach the picture before the language model does.

    words of a picture's turn ──► embedding ──► `VisionFeatures.words` ──► connector
                                      └───────► blocks of the encoder (`Conditioning`)

`mmlm.modeling.questions` finds the words and calls what stands here. An answer is never among them:
the turn ends where the template begins an answer, whose ids a config holds (`answer_head`). Where
there are no words, a picture is seen as by a connector that reads none.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmlm.connectors.attention import Attention, normal_
from mmlm.connectors.base import Connector, ConnectorConfig
from mmlm.errors import ConfigError
from mmlm.features import VisionFeatures


class QuestionConfig(ConnectorConfig):
    """Base of the configs of connectors that read the question."""

    reads_question: ClassVar[bool] = True

    reader_depth: int = Field(default=1, ge=0)
    """Layers in which the question's words see one another before pictures read them."""

    reader_heads: int = Field(default=4, ge=1)
    """Number of heads of these layers, which divides the width of the features."""

    answer_head: tuple[int, ...] = ()
    """Ids with which the template begins an answer; found when the parts are joined, and kept."""

    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer; found when the parts are joined, and kept."""

    def with_turns(self, answer_head: tuple[int, ...], stop_ids: tuple[int, ...]) -> Self:
        """Return the config with what tells questions from answers."""
        return self.model_copy(update={"answer_head": answer_head, "stop_ids": stop_ids})


class Words:
    """Words that items read, side by side.

    Shapes:
        values: ``(items, most words, width)``
        mask: ``(items, most words)``, True = a word
    """

    def __init__(self, values: Tensor, mask: Tensor) -> None:
        self.values, self.mask = values, mask

    def __getitem__(self, items: Any) -> Words:
        return Words(self.values[items], self.mask[items])


class QuestionReader(nn.Module):
    """Brings the embeddings of words to the width of the features, in their order.

    Args:
        text_width: Of the embeddings.
        width: Of what comes out.
        config: Depth and heads.
    """

    def __init__(self, text_width: int, width: int, config: QuestionConfig) -> None:
        super().__init__()
        if width % config.reader_heads:
            raise ConfigError(
                f"connector.reader_heads {config.reader_heads} does not divide the width {width}."
            )
        self.enter = nn.Linear(text_width, width)
        self.layers = nn.ModuleList(
            _ReaderLayer(width, config.reader_heads) for _ in range(config.reader_depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, words: tuple[Tensor, ...]) -> Words | None:
        """Read the words of each item; None where no item has any.

        Args:
            words: ``(words, text_width)`` of each item; may be empty.
        """
        if not any(len(each) for each in words):
            return None
        weight = self.enter.weight
        padded = pad_sequence([each.to(weight.dtype) for each in words], batch_first=True)
        places = torch.arange(padded.shape[1], device=padded.device)
        lengths = torch.tensor([len(each) for each in words], device=padded.device)
        mask = places < lengths[:, None]
        values = self.enter(padded)
        values = values + waves(places, values.shape[-1]).to(values)
        for layer in self.layers:
            values = layer(values, mask)
        return Words(self.norm(values), mask)


class _ReaderLayer(nn.Module):
    """Words see one another, and go through a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, heads=heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return the words after both."""
        given = self.norm(values)
        values = values + read_words(self.attention, given, Words(given, mask))
        return values + self.mlp(values)


class WordAttention(nn.Module):
    """Features read the words; nothing is read where there are none.

    Shapes:
        tokens: ``(items, tokens, width)``
        returns: as `tokens`, what is to be added
    """

    def __init__(self, width: int, words_width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, words_width, heads=heads)
        normal_(self.attention, std=width**-0.5)

    def forward(self, tokens: Tensor, words: Words) -> Tensor:
        """Return what the tokens read."""
        return read_words(self.attention, self.norm(tokens), words)


class Conditioning(Connector):
    """A connector whose words also enter blocks of the encoder."""

    reader: QuestionReader

    def places_in_encoder(self, num_blocks: int) -> tuple[int, ...]:
        """Return the blocks before which it writes, of so many that the features depend on.

        Raises:
            ConfigError: if there are not enough.
        """
        raise NotImplementedError

    def condition(self, index: int, tokens: Tensor, words: Words) -> Tensor:
        """Return the tokens that enter the block ``places_in_encoder[index]``.

        Shapes:
            tokens: ``(tiles, tokens, vision_width)``
        """
        raise NotImplementedError


def last_blocks(count: int, num_blocks: int, *, name: str) -> tuple[int, ...]:
    """Return the last blocks of an encoder.

    Raises:
        ConfigError: if it has fewer.
    """
    if count > num_blocks:
        raise ConfigError(
            f"The connector {name} writes into {count} blocks of the encoder, and the features "
            f"depend on {num_blocks} of them. Lower connector.encoder_blocks."
        )
    return tuple(range(num_blocks - count, num_blocks))


def read_words(attention: Attention, queries: Tensor, words: Words) -> Tensor:
    """Let queries read the words of their item; zero where it has none."""
    some = words.mask.any(-1)[:, None, None]
    # An item without words would divide by zero: it reads everything, and forgets it.
    read = attention(queries, words.values, mask=(words.mask[:, None] | ~some)[:, None])
    return torch.where(some, read, 0.0)


def words_of(features: VisionFeatures, reader: QuestionReader) -> Words | None:
    """Return what was asked about each item, read; None where nothing was."""
    return None if features.words is None else reader(features.words)


def waves(places: Tensor, width: int) -> Tensor:
    """Return sines and cosines of places, as Transformer's: ``(places, width)``."""
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=places.device) * (-9.21 / max(half, 1)))
    angles = places[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]
