"""The connector `frozen_block`: a layer of a language model as a layer for pictures (LM4Visual).

    features ──► linear ──► frozen layer ──► linear ──► MLP ──► tokens

The layer stays as the language model learnt it; what stands around it learns. All features see
one another (no causal mask), and none has a place (arXiv 2310.12973, section 3.1: neither mask
nor rotary positions). Its weights are buffers: no stage trains them, and every checkpoint holds
them.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.errors import ConfigError
from mmlm.features import VisionFeatures

_LAST_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@connectors.register("frozen_block")
class FrozenBlockConnectorConfig(ConnectorConfig):
    """Send the features through one frozen layer of a language model, and then an MLP."""

    checkpoint: str | None = None
    """The language model that gives the layer: a folder, a Hub id or a GGUF file. It need not be
    the one that answers."""

    layer: int = -1
    """Which of its layers; from the end where negative."""

    block: dict[str, Any] | None = Field(default=None)
    """The config of that language model; read when the parts are joined, and kept."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.checkpoint is None and self.block is None:
            raise ValueError("checkpoint must name the language model that gives the layer")
        return self

    def resolved(self) -> FrozenBlockConnectorConfig:
        """Return the config with that of the language model."""
        if self.block is not None or self.checkpoint is None:
            return self
        values = _loaded(self.checkpoint).config.get_text_config().to_dict()
        hidden = ("_name_or_path", "transformers_version", "architectures", "dtype")
        block = {key: value for key, value in values.items() if key not in hidden}
        words = {"checkpoint": self.checkpoint, "layer": self.layer, "block": block}
        return type(self).from_dict(words, origin="connector")

    def build(self, *, vision_width: int, text_width: int) -> FrozenBlockConnector:
        """Build the connector; the layer is read unless a checkpoint of MMLM brings it."""
        connector = FrozenBlockConnector(vision_width, text_width, self)
        if self.checkpoint is not None and not connector.enter.weight.is_meta:
            connector.take(_loaded(self.checkpoint), self.layer)
        return connector


class FrozenBlockConnector(Connector):
    """Sends each picture through the layer.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(tokens, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: FrozenBlockConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.block, width = _empty_block(config)
        self.enter = nn.Linear(vision_width, width)
        self.leave = nn.Linear(width, vision_width)
        self.project = nn.Sequential(
            nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width)
        )

    def take(self, language: Any, layer: int) -> None:
        """Copy a layer of a language model.

        Raises:
            ConfigError: if it has no such layer.
        """
        layers = _layers_of(language.get_decoder())
        if not -len(layers) <= layer < len(layers):
            raise ConfigError(
                f"connector.layer is {layer}, and {self.config.checkpoint} has {len(layers)} "
                f"layers. Choose one from {-len(layers)} to {len(layers) - 1}."
            )
        _layers_of(self.block)[0].load_state_dict(layers[layer].state_dict(), strict=False)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Send each picture through the layer."""
        return each_group(features, self._read, self.config.out_grid)

    def _read(self, maps: list[Tensor]) -> Tensor:
        tokens = self.enter(maps[0].flatten(1, 3))
        items, count = tokens.shape[:2]
        mask = tokens.new_zeros(items, 1, count, count)
        places = torch.zeros(items, count, dtype=torch.long, device=tokens.device)
        out = self.block(
            inputs_embeds=tokens, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state
        return self.project(self.leave(out))

    def last_linear(self) -> nn.Linear:
        """Return the layer to the text width."""
        last = self.project[-1]
        assert isinstance(last, nn.Linear)
        return last


def _loaded(checkpoint: str) -> Any:
    from mmlm.language import load_language

    return load_language(checkpoint)[0]


def _empty_block(config: FrozenBlockConnectorConfig) -> tuple[Any, int]:
    """Return a decoder of one layer whose weights are buffers, and its width."""
    from transformers import AutoConfig, AutoModel

    values = dict(config.resolved().block or {})
    types = values.get("layer_types")
    if isinstance(types, list):
        values["layer_types"] = [types[config.layer]]
    values |= {"num_hidden_layers": 1, "vocab_size": 1, "pad_token_id": None}
    own = AutoConfig.for_model(values.pop("model_type"), **values)
    block: Any = AutoModel.from_config(own, attn_implementation="sdpa")
    for name in _LAST_NORMS:
        if isinstance(getattr(block, name, None), nn.Module):
            setattr(block, name, nn.Identity())
    for module in block.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach())
        for name, table in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, table)  # tables of positions travel along too
    return block, int(own.hidden_size)


def _layers_of(decoder: Any) -> nn.ModuleList:
    """Return the layers of a decoder."""
    for part in decoder.children():
        if isinstance(part, nn.ModuleList):
            return part
    raise ConfigError(
        f"frozen_block finds no list of layers in {type(decoder).__name__}. Take a language model "
        f"of another family for `connector.checkpoint`."
    )
