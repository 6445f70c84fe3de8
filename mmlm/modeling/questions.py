"""The question's words reach the vision side: which they are, and how they enter the encoder.

    ids ──► turns: where people ask, and where answers stand ──► words of each picture's turn
    words ──► embedding ──► one stretch for each tile ──► blocks of the encoder, or the connector

What a picture becomes then hangs on its turn, and on nothing else: never on an answer, on another
packed sample, or on padding. All follows from the ids, so that training, generation and evaluation
agree without being told. A kept cache is used only where a picture's whole turn stands in it, or
none of it (`mmlm.generation.session`); features of an encoder that reads are never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.connectors import Conditioning, Connector, ConnectorConfig, QuestionConfig, Words
from mmlm.errors import AlignmentError, ConfigError
from mmlm.modeling.config import TokenCounter
from mmlm.modeling.injection import segments_of
from mmlm.modeling.pictures import places_of_pictures
from mmlm.vision import VisionEncoder
from mmlm.vision.blocks import blocks_of, with_tokens


def with_turns(connector: ConnectorConfig, chat_of: Callable[[], Any]) -> ConnectorConfig:
    """Return the config of a connector with what tells questions from answers, if it reads any.

    Args:
        connector: Its config.
        chat_of: Gives the `ChatFormat` of the language model; asked only where it is needed.

    Raises:
        ConfigError: if the template does not say where an answer begins.
    """
    if not isinstance(connector, QuestionConfig):
        return connector
    chat = chat_of()
    return connector.with_turns(_answer_head(chat), tuple(chat.stop_ids))


def _answer_head(chat: Any) -> tuple[int, ...]:
    """Return the ids with which the template begins an answer, proven on one that is learnt."""
    from mmlm.messages import assistant, user

    asked = [user("a")]
    short = chat.encode(asked).ids
    whole = chat.encode(asked, add_generation_prompt=True).ids
    head = tuple(whole[len(short) :]) if whole[: len(short)] == short else ()
    learnt = chat.encode([*asked, assistant("b")], with_labels=True)
    numbers = turn_numbers(learnt.ids, head, ())
    leaks = any(n and label >= 0 for n, label in zip(numbers, learnt.labels, strict=True))
    if not head or leaks:
        raise ConfigError(
            "This connector reads the question, and the chat template does not say with ids of its "
            "own where an answer begins, so that answers could leak into what is seen. Use a "
            "language model whose template does, such as ChatML, or another connector."
        )
    return head


def turn_numbers(
    ids: Sequence[int], head: Sequence[int], stops: Sequence[int], *, begins: Sequence[bool] = ()
) -> list[int]:
    """Return the number of the turn in which people ask, for each token; 0 is an answer.

    Args:
        ids: Of one row.
        head: With which an answer begins.
        stops: With which it ends.
        begins: Whether a packed sample begins at a token.

    >>> turn_numbers([5, 6, 1, 2, 7, 9, 5], head=[1, 2], stops=[9])
    [1, 1, 0, 0, 0, 0, 2]
    """
    head, found = list(head), [0] * len(ids)
    number, asks, at = 1, True, 0
    while at < len(ids):
        if begins and begins[at] and at:
            number, asks = number + 1, True
        if asks and head and list(ids[at : at + len(head)]) == head:
            asks, at = False, at + len(head)
            continue
        if asks:
            found[at] = number
        elif ids[at] in stops:
            number, asks = number + 1, True
        at += 1
    return found


def question_of(
    ids: Sequence[int], span: tuple[int, int], connector: QuestionConfig
) -> tuple[int, ...]:
    """Return the ids that a picture's features hang on: those of its turn, pictures included."""
    numbers = turn_numbers(ids, connector.answer_head, connector.stop_ids)
    own = numbers[span[0]]
    return tuple(one for one, number in zip(ids, numbers, strict=True) if own and number == own)


def words_of_tiles(
    connector: QuestionConfig,
    counter: TokenCounter,
    input_ids: Tensor,
    embedded: Tensor,
    *,
    placeholder_id: int,
    image_sizes: Tensor | None,
    attention_mask: Tensor | None,
    cache: Any,
    position_ids: Tensor | None,
    borders: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the words that were asked about each tile, in the order of the tiles.

    Shapes:
        input_ids: ``(batch, tokens)``
        embedded: ``(batch, tokens, text_width)``
        position_ids, borders: as the model takes them; they say where packed samples begin
        returns: ``(words, text_width)`` for each tile

    Raises:
        AlignmentError: if a part of the conversation stands in a cache.
    """
    if cache is not None and cache.get_seq_length():
        raise AlignmentError(
            "A picture came behind a kept part of the conversation, and this connector reads the "
            "whole question of a picture. Pass the conversation from its beginning."
        )
    segments = segments_of(embedded, 0, None, position_ids, borders)
    slots = input_ids == placeholder_id
    real = torch.ones_like(slots)
    if attention_mask is not None and attention_mask.shape == slots.shape:
        real = attention_mask.bool()
    found: list[Tensor] = []
    numbers: dict[int, Tensor] = {}
    for place in places_of_pictures(counter, slots, image_sizes):
        row = place.row
        if row not in numbers:
            own = segments[row]
            begins = [True, *(own[1:] != own[:-1]).tolist()]
            turns = turn_numbers(
                input_ids[row].tolist(), connector.answer_head, connector.stop_ids, begins=begins
            )
            numbers[row] = torch.tensor(turns, device=input_ids.device)
        turn = numbers[row]
        mine = (turn == turn[place.begin]) & (turn > 0) & ~slots[row] & real[row]
        found += [embedded[row][mine]] * (place.last_tile - place.first_tile)
    return tuple(found)


class Conditioned:
    """Joins a connector that writes into the encoder with its blocks.

    Args:
        connector: The connector.
        encoder: The encoder, whose blocks get a hook.

    Raises:
        ConfigError: if the encoder has no plain list of blocks, or not enough of them.
    """

    def __init__(self, connector: Conditioning, encoder: VisionEncoder) -> None:
        self.connector = connector
        self.words: Words | None = None
        if encoder.packs_tiles:
            raise ConfigError(
                "A connector that writes into blocks of the encoder needs tiles that stand under "
                "one another, and this encoder packs them into one row. Use a ViT of one size."
            )
        used = _used(encoder)
        for index, place in enumerate(connector.places_in_encoder(len(used))):
            used[place].register_forward_pre_hook(_Into(self, index).write, with_kwargs=True)

    @classmethod
    def between(
        cls, connector: Connector, encoder: VisionEncoder, counter: TokenCounter
    ) -> Conditioned | None:
        """Return the join, or None for a connector that does not write into the encoder.

        Raises:
            ConfigError: if tiles come in another order than pictures.
        """
        config = getattr(connector, "config", None)
        if isinstance(config, QuestionConfig) and counter.video is not None:
            raise ConfigError(
                "A connector that reads the question does not take clips. Leave `video` out."
            )
        if not isinstance(connector, Conditioning):
            return None
        if counter.is_flat or counter.reducer is not None:
            raise ConfigError(
                "A connector that writes into blocks of the encoder needs tiles of one size, one "
                "encoder, and no reducer. Use an image policy such as squash, letterbox or tiles, "
                "and leave `reducer` out."
            )
        return cls(connector, encoder)

    def ask(self, words: tuple[Tensor, ...] | None) -> bool:
        """Hold what is asked about the tiles of this step; None asks nothing.

        Returns:
            Whether something that enters the encoder learns, so that it needs a graph.
        """
        self.words = held = None if words is None else self.connector.reader(words)
        if held is None:
            return False
        learns = any(weight.requires_grad for weight in self.connector.parameters())
        return learns or held.values.requires_grad


class _Into:
    """The hook before one block; an object, so that a copied model has hooks of its own."""

    def __init__(self, conditioned: Conditioned, index: int) -> None:
        self.conditioned, self.index = conditioned, index

    def write(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the block's inputs with what the words add."""
        words = self.conditioned.words
        if words is None:
            return None

        def change(tokens: Tensor) -> Tensor:
            if len(tokens) != len(words.mask):
                raise AlignmentError(
                    f"A block of the encoder got {len(tokens)} tiles, and words for "
                    f"{len(words.mask)} were prepared. With gradient checkpointing each forward "
                    f"must be followed by its own backward."
                )
            if tokens.shape[-1] != words.values.shape[-1]:
                raise ConfigError(
                    f"Blocks of the encoder are {tokens.shape[-1]} wide and its features "
                    f"{words.values.shape[-1]}. A connector that writes into blocks needs features "
                    f"that are theirs: `vision: {{use: hf}}` or timm, without a projection."
                )
            return self.conditioned.connector.condition(self.index, tokens, words)

        return with_tokens(args, kwargs, change)


def _used(encoder: VisionEncoder) -> list[nn.Module]:
    """Return the blocks that the features depend on."""
    idle = encoder.idle_parameters()
    names = {id(weight): name for name, weight in encoder.named_parameters()}
    return [
        block
        for block in blocks_of(encoder)
        if any(names.get(id(weight)) not in idle for weight in block.parameters())
    ]
