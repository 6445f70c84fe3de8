"""The connector `proto_memory`: attention that also reads what other pictures were like (PMA-Net).

    keys, values of this picture ─────────────────────────┐
    keys, values of past pictures ─► bank ─► k-means ─────┴─► attention
                                   (slides)  prototypes

A layer of attention keeps keys and values of the samples that it has learnt from in a bank, which
slides: the newest take the place of the oldest. Every so many steps the keys in the bank are
brought to a few prototypes by k-means; the value of a prototype is the mean of those of its nearest
keys, weighed by how near they are. Prototypes stand beside the keys and values of each picture; a
learnt vector for each of the two kinds is added to their keys (arXiv 2308.12383, sections 3.2 and
3.3).

The paper's layers are those of a captioner's decoder, learnt from nothing. Here the language model
is a trained one that stays as it is, and the layers with memory stand in the connector, over
the features of the picture. Choices where the paper is silent: a prototype spans all heads; of a
picture, `per_item` keys at even distances are kept; nearness is the softmax of minus the distance;
prototypes are small random vectors until the first k-means. Bank and prototypes are buffers: they
travel in every checkpoint, move when a step is over (`after_step`), and never while answering.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mmlm.connectors.activations import ActivationName, activation
from mmlm.connectors.attention import STD, Attention, check_heads, normal_
from mmlm.connectors.base import ConnectorConfig, Remembering, connectors
from mmlm.connectors.groups import each_group
from mmlm.features import VisionFeatures


@connectors.register("proto_memory")
class ProtoMemoryConnectorConfig(ConnectorConfig):
    """Let features read prototypes of past samples beside one another (PMA-Net)."""

    depth: int = Field(default=2, ge=1)
    """Number of layers."""

    width: int = Field(default=768, ge=1)
    """Width inside the layers."""

    heads: int = Field(default=12, ge=1)
    """Number of heads, which divides the width."""

    prototypes: int = Field(default=256, ge=1)
    """Vectors that stand for the past, in each layer."""

    bank: int = Field(default=4096, ge=1)
    """Keys and values of past samples that each layer keeps; at least as many as prototypes."""

    per_item: int = Field(default=8, ge=1)
    """How many of them come from one picture."""

    every: int = Field(default=100, ge=1)
    """Optimiser steps from one k-means to the next."""

    rounds: int = Field(default=10, ge=1)
    """Rounds of k-means."""

    neighbours: int = Field(default=8, ge=1)
    """How many of the nearest keys give a prototype its value."""

    activation: ActivationName = "gelu"
    """Of the feed-forward layers, by its name in transformers."""

    eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in the norms."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_heads(self.width, self.heads)
        if self.bank < self.prototypes:
            raise ValueError(f"bank {self.bank} is smaller than prototypes {self.prototypes}")
        return self

    def build(self, *, vision_width: int, text_width: int) -> ProtoMemoryConnector:
        """Build the connector between features and embeddings of these widths."""
        return ProtoMemoryConnector(vision_width, text_width, self)


class Memory(nn.Module):
    """The bank of past keys and values of one layer, and their prototypes.

    Shapes:
        keys, values:                     ``(bank, width)``
        prototype_keys, prototype_values: ``(prototypes, width)``
    """

    keys: Tensor
    values: Tensor
    prototype_keys: Tensor
    prototype_values: Tensor
    seen: Tensor
    """How many keys have ever been put in, ``()``; the next takes the place of the oldest."""
    steps: Tensor
    """Steps since the bank has enough for a k-means, ``()``."""

    def __init__(self, config: ProtoMemoryConnectorConfig) -> None:
        super().__init__()
        self.config = config
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(config.bank, config.width))
            drawn = torch.randn(config.prototypes, config.width) * STD
            self.register_buffer(f"prototype_{name}", drawn)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def put(self, keys: Tensor, values: Tensor) -> None:
        """Put the newest keys and values in the places of the oldest.

        Shapes:
            keys, values: ``(new, width)``
        """
        size, seen = self.config.bank, int(self.seen)
        first = max(0, len(keys) - size)  # more than the bank holds: the last ones
        places = (torch.arange(seen + first, seen + len(keys)) % size).to(self.keys.device)
        self.keys[places] = keys[first:].to(self.keys)
        self.values[places] = values[first:].to(self.values)
        self.seen += len(keys)

    @torch.no_grad()
    def step(self) -> None:
        """Count one step, and find the prototypes anew where it is time."""
        held = min(int(self.seen), self.config.bank)
        if held < self.config.prototypes:
            return
        due = int(self.steps) % self.config.every == 0
        self.steps += 1
        if not due:
            return
        keys, values = self.keys[:held].float(), self.values[:held].float()
        centres = k_means(keys, self.config.prototypes, self.config.rounds)
        found = values_of(centres, keys, values, min(self.config.neighbours, held))
        self.prototype_keys.copy_(centres)
        self.prototype_values.copy_(found)


class MemoryAttention(nn.Module):
    """Self-attention over a picture's features and the prototypes.

    Shapes:
        tokens:  ``(items, tokens, width)``
        returns: the same
    """

    def __init__(self, config: ProtoMemoryConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = Attention(config.width, config.width, heads=config.heads)
        self.memory = Memory(config)
        self.present = nn.Parameter(torch.empty(config.width))
        self.past = nn.Parameter(torch.empty(config.width))
        self.fresh: list[tuple[Tensor, Tensor]] = []
        """Keys and values of the step that is running."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Let every token read the others and the past."""
        own, items = self.attention, len(tokens)
        keys, values = own.key(tokens), own.value(tokens)
        if self.training and torch.is_grad_enabled():
            self.fresh.append((self._some(keys), self._some(values)))
        past_keys = (self.memory.prototype_keys.to(keys) + self.past).expand(items, -1, -1)
        past_values = self.memory.prototype_values.to(values).expand(items, -1, -1)
        read = scaled_dot_product_attention(
            self._heads(own.query(tokens)),
            self._heads(torch.cat([keys + self.present, past_keys], dim=1)),
            self._heads(torch.cat([values, past_values], dim=1)),
        )
        return own.out(read.transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

    def _some(self, tokens: Tensor) -> Tensor:
        """Return some tokens of each picture, at even distances: ``(items, some, width)``."""
        count = min(self.config.per_item, tokens.shape[1])
        places = torch.linspace(0, tokens.shape[1] - 1, count).round().long()
        return tokens.detach()[:, places.to(tokens.device)]

    def take_in(self) -> None:
        """Put what the step has seen, on all ranks, into the bank."""
        width = self.config.width
        empty = self.memory.keys[:0]
        keys = torch.cat([empty, *(k.reshape(-1, width).to(empty) for k, _ in self.fresh)])
        values = torch.cat([empty, *(v.reshape(-1, width).to(empty) for _, v in self.fresh)])
        self.fresh = []
        keys, values = from_all_ranks(keys), from_all_ranks(values)
        if len(keys):
            self.memory.put(keys, values)
            self.memory.step()


class MemoryLayer(nn.Module):
    """Attention with memory and a feed-forward layer, each beside a bypass.

    Shapes:
        tokens: ``(items, tokens, width)``
    """

    def __init__(self, config: ProtoMemoryConnectorConfig) -> None:
        super().__init__()
        width = config.width
        self.norm = nn.LayerNorm(width, eps=config.eps)
        self.reading = MemoryAttention(config)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=config.eps),
            nn.Linear(width, 4 * width),
            activation(config.activation),
            nn.Linear(4 * width, width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens after the layer."""
        tokens = tokens + self.reading(self.norm(tokens))
        return tokens + self.mlp(tokens)


class ProtoMemoryConnector(Remembering):
    """Sends each picture through the layers.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(tokens, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: ProtoMemoryConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.enter = nn.Linear(vision_width, config.width)
        self.layers = nn.ModuleList(MemoryLayer(config) for _ in range(config.depth))
        self.project = nn.Linear(config.width, text_width)
        normal_(self.layers)
        for attention in self._attentions():
            nn.init.normal_(attention.present, std=STD)
            nn.init.normal_(attention.past, std=STD)

    def _attentions(self) -> list[MemoryAttention]:
        return [each for each in self.modules() if isinstance(each, MemoryAttention)]

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Let each picture read itself and the past."""
        return each_group(features, self._read, self.config.out_grid)

    def _read(self, maps: list[Tensor]) -> Tensor:
        tokens = self.enter(maps[0].flatten(1, 3))
        for layer in self.layers:
            tokens = layer(tokens)
        return self.project(tokens)

    def before_step(self) -> None:
        """Forget what a step that is repeated has seen."""
        for attention in self._attentions():
            attention.fresh = []

    def after_step(self) -> None:
        """Put what the step has seen into the banks; called on every rank."""
        for attention in self._attentions():
            attention.take_in()

    def last_linear(self) -> nn.Linear:
        """Return the layer to the text width."""
        return self.project


def k_means(points: Tensor, count: int, rounds: int) -> Tensor:
    """Return the centres of `count` clusters, by Lloyd's rounds; the same for the same points.

    Begins at points at even distances. A cluster that loses all of its points stays where it is.

    Shapes:
        points:  ``(points, width)``
        returns: ``(count, width)``
    """
    places = torch.linspace(0, len(points) - 1, count).round().long()
    centres = points[places.to(points.device)].clone()
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        members = torch.nn.functional.one_hot(nearest, count).to(points)  # (points, count)
        sizes = members.sum(0)[:, None]
        centres = torch.where(sizes > 0, members.T @ points / sizes.clamp(min=1), centres)
    return centres


def values_of(centres: Tensor, keys: Tensor, values: Tensor, neighbours: int) -> Tensor:
    """Return the value of each centre: that of its nearest keys, weighed by how near they are.

    Shapes:
        centres:      ``(prototypes, width)``
        keys, values: ``(bank, width)``
    """
    distances, places = torch.cdist(centres, keys).topk(neighbours, dim=1, largest=False)
    return (distances.neg().softmax(dim=1)[..., None] * values[places]).sum(dim=1)


def from_all_ranks(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, one rank after another: ``(rows of all, width)``."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    found: list[Tensor | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, rows.cpu())
    return torch.cat([each.to(rows.device) for each in found if each is not None])
