"""A stock vision-language model under the names that MMLM's rooms use.

    stock.model.visual            ──► model.vision
    stock.model.language_model    ──► model.language
    stock.lm_head                 ──► lm_head
    everything else that learns   ──► model.connector

The modules are shared, not copied: what learns under the public names is what the stock class
computes with and saves. The loss needs the labelled positions only, as in
`mmlm.modeling.model`; how hidden states become logits is proven when the model is wrapped.
"""

from __future__ import annotations

import inspect
from itertools import chain
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from mmlm.errors import ConfigError
from mmlm.language import head_rule_of
from mmlm.modeling.attention import borders_given
from mmlm.modeling.head import head_loss, labelled_loss, without_first_of_each
from mmlm.modeling.head import loss_by_piece as loss_of_pieces
from mmlm.whole.processor import WholeProcessor

# Between encoder and language model, and yet inside the encoder's module: its mergers.
_MERGERS = ("merger", "merger_list", "deepstack_merger_list", "patch_merger", "aligner")


class Parts(nn.Module):
    """The parts of a stock model under their public names; the modules are the model's own."""

    def __init__(self, stock: PreTrainedModel) -> None:
        super().__init__()
        base: Any = stock.base_model
        vision, language = base.get_encoder(modality="image"), base.get_decoder()
        if vision is base or language is base:
            missing = "an image encoder" if vision is base else "a language model"
            raise ConfigError(
                f"{type(stock).__name__} does not say which of its modules is {missing}, so "
                f"`learn` could not name its parts. Tune it with the tools of its own authors."
            )
        # First, because a parameter goes by the first name under which it is found.
        self.connector = _Others()
        _gather(base, self.connector, (vision, language))
        for name in _MERGERS:
            inner = getattr(vision, name, None)
            if isinstance(inner, nn.Module):
                self.connector.add_module(name, inner)
        self.vision: Any = vision
        self.language: Any = language


class _Others(nn.Module):
    """What stands between the encoder and the language model."""


def _gather(module: nn.Module, others: nn.Module, known: tuple[nn.Module, ...]) -> None:
    """Put what is neither encoder nor language model into `others`, under its last name."""
    for name, parameter in module.named_parameters(recurse=False):
        others.register_parameter(name, parameter)
    for name, child in module.named_children():
        if child in known:
            continue
        if any(one in known for one in child.modules()):
            _gather(child, others, known)
        else:
            others.add_module(name, child)


class WholeModel(nn.Module):
    """A stock model that trains, generates and saves as part of MMLM.

    Args:
        stock: A model of `AutoModelForImageTextToText`.
        processor: Its processor.

    Raises:
        ConfigError: if its parts cannot be named, or its head does what MMLM does not know.
    """

    accepts_loss_kwargs = True

    def __init__(self, stock: PreTrainedModel, processor: WholeProcessor) -> None:
        super().__init__()
        # Beside the module tree, or every weight would have two names.
        self.__dict__["stock"] = stock
        self.rule = head_rule_of(stock)
        self.model = Parts(stock)
        self.lm_head: Any = stock.get_output_embeddings()
        self.processor = processor
        self.image_token_id = processor.image_token_id
        self.takes = frozenset(inspect.signature(stock.forward).parameters)

    stock: PreTrainedModel

    @property
    def config(self) -> Any:
        """The config of the stock class."""
        return self.stock.config

    @property
    def generation_config(self) -> Any:
        """How the stock class generates by default."""
        return self.stock.generation_config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.lm_head.weight.dtype

    def train(self, mode: bool = True) -> Self:
        """Change the mode of every part, and of the stock class around them."""
        super().train(mode)
        for module in (self.stock, self.stock.base_model):
            module.training = mode
        return self

    def cast(self, dtype: torch.dtype) -> Self:
        """Change the precision of everything that is stored; what is computed keeps its own."""
        stored = set(self.stock.state_dict())
        for name, tensor in chain(self.stock.named_parameters(), self.stock.named_buffers()):
            if name in stored and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        self.stock.config.dtype = dtype
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the language model."""
        return self.stock.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def get_decoder(self) -> Any:
        """Return the language model without its head."""
        return self.model.language

    def add_adapter(self, config: Any, adapter_name: str = "default") -> None:
        """Put adapters beside the layers that a PEFT config names."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)

    def gradient_checkpointing_enable(self, settings: dict[str, Any] | None = None) -> None:
        """Compute activations twice to save memory."""
        self.stock.gradient_checkpointing_enable(settings)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.stock.gradient_checkpointing_disable()

    def generate(self, **inputs: Any) -> Any:
        """Generate as the stock class does."""
        generator: Any = self.stock
        return generator.generate(**inputs)

    def positions(self, ids: Tensor, vision: dict[str, Tensor]) -> Tensor:
        """Return the positions of one sample, as the class counts them.

        Shapes:
            ids: ``(1, tokens)``
            returns: ``(1, tokens)``, or ``(4, 1, tokens)`` where pictures have three axes: the
                place in the row first
        """
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        index: Any = getattr(self.stock.base_model, "get_rope_index", None)
        if index is None:
            return places
        takes = inspect.signature(index).parameters
        known = {name: value for name, value in vision.items() if name in takes}
        axes, _ = index(ids, **self.types(ids, takes), **known)
        return torch.cat([places[None], axes.to(places)])

    def types(self, ids: Tensor, takes: Any = None) -> dict[str, Tensor]:
        """Return which tokens stand for images, under the names that the class asks for.

        Shapes:
            ids and returns: ``(batch, tokens)``
        """
        names = ("mm_token_type_ids", "token_type_ids")
        marked = (ids == self.image_token_id).long()
        return {name: marked for name in names if name in (takes or self.takes)}

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        labels: Int[Tensor, "batch tokens"] | None = None,
        loss_only: bool = False,
        loss_by_piece: bool = False,
        loss_weights: Float[Tensor, "batch tokens"] | None = None,
        num_items_in_batch: Tensor | float | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Int[Tensor, " borders"] | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and with `labels` the loss; with `loss_only` the loss alone.

        Shapes:
            input_ids: ``(batch, tokens)``
            labels: ``(batch, tokens)``, not shifted; -100 is not learnt
            loss_weights: ``(batch, tokens)``, a factor for each label's loss
            cu_seq_lens_q: ``(segments + 1,)``, borders of the samples packed into one row
            logits: ``(batch, tokens or logits_to_keep, vocabulary)``
        """
        if cu_seq_lens_q is not None:
            longest = int(cu_seq_lens_q.diff().max())
            inputs |= {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_q}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        if cu_seq_lens_q is not None or loss_only:
            inputs["use_cache"] = False
        inputs = self.types(input_ids) | inputs
        base: Any = self.stock.base_model
        with borders_given(cu_seq_lens_q is not None):
            outputs = base(input_ids=input_ids, **inputs)
        hidden = outputs.last_hidden_state
        result = CausalLMOutputWithPast(past_key_values=getattr(outputs, "past_key_values", None))
        if labels is not None and cu_seq_lens_q is not None:
            labels = without_first_of_each(labels, cu_seq_lens_q)
        if labels is not None and loss_by_piece:
            result.loss = loss_of_pieces(hidden, labels, cu_seq_lens_q, self._head_loss)
        elif labels is not None:
            result.loss = labelled_loss(
                self._head_loss, hidden, labels, loss_weights, num_items_in_batch
            )
        if not loss_only:
            keep: Any = logits_to_keep
            keep = slice(-keep, None) if isinstance(keep, int) else keep
            result.logits = self.rule.apply(self.lm_head(hidden[:, keep]))
        return result

    def _head_loss(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        head = self.lm_head
        return head_loss(hidden, head.weight, head.bias, targets, weights, self.rule)
