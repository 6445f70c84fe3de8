"""What the joined model returns: transformers' own outputs, and the features of the images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class MMLMModelOutput(BaseModelOutputWithPast):
    """Like transformers' base output, and the features that stood in for the images.

    Shapes:
        image_hidden_states: ``(image_tokens, width)`` or None
    """

    image_hidden_states: Tensor | None = None


@dataclass
class MMLMOutput(CausalLMOutputWithPast):
    """Like transformers' causal output, and the features that stood in for the images.

    Shapes:
        image_hidden_states: ``(image_tokens, width)`` or None
    """

    image_hidden_states: Tensor | None = None
