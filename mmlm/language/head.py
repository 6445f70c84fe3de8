"""What stands between a language model's hidden states and its logits, proven by a probe.

Most models multiply by the head's weight and stop. Some scale the result (Cohere, Granite),
some bend it with a soft cap (Gemma 2). The joined model applies the head itself, on the
positions that need it, so it must know the rule. `head_rule_of` finds the rule, and proves it
together with a second fact on which the joined model stands: that embedded tokens handed in
as `inputs_embeds` give the same logits as their ids. A model for which either fails is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from mmlm.config import Config
from mmlm.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

_PROBE_TOKENS = 12
# Largest relative difference seen over tiny random models of twelve families in float32: 4e-7;
# a forgotten scale or cap is above 1e-2. bfloat16 keeps 8 bits, and sums differ in the last.
_TOLERANCE = {"torch.float32": 1e-4, "torch.float64": 1e-8}
_TOLERANCE_OF_HALVES = 5e-2


class HeadRule(Config):
    """How hidden states become logits: ``softcap * tanh(scale * (h W^T + b) / softcap)``."""

    scale: float = 1.0
    """Factor on the output of the head."""

    softcap: float | None = Field(default=None, gt=0)
    """Soft cap on the logits; None where there is none."""

    bias: bool = False
    """Whether the head has a bias."""

    @property
    def is_plain(self) -> bool:
        """Whether the logits are the hidden states times the weight, and nothing else."""
        return self.scale == 1.0 and self.softcap is None and not self.bias

    def apply(self, raw: Tensor) -> Tensor:
        """Turn the head's output into logits.

        Shapes:
            raw: ``(…, vocabulary)``
            returns: ``(…, vocabulary)``
        """
        import torch

        logits = raw if self.scale == 1.0 else raw * self.scale
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap


def decoder_of(model: Any) -> Any:
    """Return the model without its head: what gives the last hidden states.

    Raises:
        ConfigError: if the model does not say which of its parts that is.
    """
    decoder = model.base_model
    if decoder is model or decoder.get_input_embeddings() is None:
        raise ConfigError(
            f"{type(model).__name__} has no base model without a head, which MMLM needs to place "
            f"image features. Use a causal language model of transformers."
        )
    return decoder


def head_of(model: Any) -> nn.Linear:
    """Return the output embedding.

    Raises:
        ConfigError: if there is none, or it is not one linear layer.
    """
    from torch import nn

    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"The head of {type(model).__name__} is {type(head).__name__}, expected one linear "
            f"layer. Use a causal language model of transformers."
        )
    return head


def head_rule_of(model: Any) -> HeadRule:
    """Find the rule of a model's head, and prove it on a few random tokens.

    Raises:
        ConfigError: if no known rule gives the model's logits, or if embedded tokens do not give
            the same logits as their ids.
    """
    import torch

    head: Any = head_of(model)
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    rows = min(int(config.vocab_size), embedding.weight.shape[0])
    ids = torch.randint(rows, (1, _PROBE_TOKENS), generator=generator).to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        embedded = model(inputs_embeds=embedding(ids), use_cache=False).logits.float()
        hidden = decoder_of(model)(inputs_embeds=embedding(ids), use_cache=False).last_hidden_state
        raw = head(hidden)
    model.train(was_training)
    name = type(model).__name__
    tolerance = _TOLERANCE.get(str(head.weight.dtype), _TOLERANCE_OF_HALVES)
    if _distance(embedded, logits) > tolerance:
        raise ConfigError(
            f"{name} gives other logits for embedded tokens than for their ids (relative "
            f"difference {_distance(embedded, logits):.1e}, allowed {tolerance:.0e}), so image "
            f"features cannot be placed among its tokens. Use another language model."
        )
    candidates = _candidates(config, bias=head.bias is not None)
    measured = float((raw.float() * logits).sum() / raw.float().square().sum())
    candidates.append(HeadRule(scale=measured, bias=head.bias is not None))
    # In the model's own precision: the right rule repeats its operations and is off by nothing.
    distances = {rule: _distance(rule.apply(raw).float(), logits) for rule in candidates}
    best = min(distances, key=lambda rule: distances[rule])
    if distances[best] > tolerance:
        raise ConfigError(
            f"{name} does something to its logits that MMLM does not know: the nearest rule "
            f"{best.to_dict()} is off by {distances[best]:.1e} (relative, allowed "
            f"{tolerance:.0e}). Known are a factor and a soft cap. Use another language model."
        )
    return best


def _candidates(config: Any, *, bias: bool) -> list[HeadRule]:
    """List the rules that a config may mean: the plainest first."""
    scales = [1.0]
    for name, power in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scales.append(float(value) ** power)
    caps: list[float | None] = [None]
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logits_soft_cap"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value > 0:
            caps.append(float(value))
    return [
        HeadRule(scale=scale, softcap=cap, bias=bias)
        for cap in caps
        for scale in dict.fromkeys(scales)
    ]


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
