"""The joined model: an image encoder, a connector and a language model as one transformers class.

    pixel_values ─► vision ─► reducer ─► connector ─┐
    input_ids ────► embedding ──────────────────────┴─► language ─► lm_head

It is a `PreTrainedModel` with `GenerationMixin`: `Trainer`, TRL, PEFT, accelerate and
DeepSpeed treat it as a stock class. What differs is asked for by name: `loss_only=True` gives
the loss without logits, and segment borders keep packed samples apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModel
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from mmlm.errors import AlignmentError
from mmlm.features import VisionFeatures
from mmlm.modeling.attention import borders_given
from mmlm.modeling.config import MMLMConfig
from mmlm.modeling.fusion import place_image_features
from mmlm.modeling.head import Head, labelled_loss, without_first_of_each
from mmlm.modeling.head import loss_by_piece as loss_of_pieces
from mmlm.modeling.in_step import nothing_seen, ranks_wait
from mmlm.modeling.injection import Injection
from mmlm.modeling.outputs import MMLMModelOutput, MMLMOutput
from mmlm.modeling.pictures import (
    Marks,
    images_by_row,
    sizes_of,
)
from mmlm.modeling.positions import SharedPositions
from mmlm.modeling.questions import Conditioned, words_of_tiles
from mmlm.modeling.routing import Router
from mmlm.modeling.seeing import Seeing
from mmlm.vision import VisionEncoder

PARTS = {
    "model.vision.": "vision",
    "model.reducer.": "connector",
    "model.connector.": "connector",
    "model.marks.": "connector",
    "model.language.": "language",
    "lm_head.": "head",
}


def _mark_as_loaded(*modules: nn.Module | None) -> None:
    """Keep transformers from initialising weights a second time."""
    for module in modules:
        for child in module.modules() if module is not None else ():
            child._is_hf_initialized = True  # type: ignore[assignment]


class MMLMModel(Seeing):
    """The parts without the head: gives the last hidden states."""

    config_class = MMLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    config: MMLMConfig

    def __init__(
        self,
        config: MMLMConfig,
        vision: VisionEncoder | None = None,
        language: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        facts = config.facts
        _mark_as_loaded(vision, language)
        tower = None if config.vision_config is None else config.vision_config.to_dict()
        self.vision = vision or config.vision_part.build(facts, tower)
        reducer, width = config.reducer_part, facts.width
        self.reducer = None if reducer is None else reducer.build(width=width)
        text_width = config.text_config.hidden_size
        self.connector = config.connector_part.build(
            vision_width=width if reducer is None else reducer.out_width(width),
            text_width=text_width,
        )
        self.counter = config.counter()
        num_marks = self.counter.policy.num_marks
        self.marks = Marks(num_marks, text_width) if num_marks else None
        if vision is not None:
            # Composed from trained parts: the new parts keep the initialisation they chose.
            _mark_as_loaded(self.reducer, self.connector, self.marks)
        steps = config.vision_part.position_steps(facts)
        self.shared_positions = None if steps is None else SharedPositions(steps)
        self.language = language or AutoModel.from_config(config.text_config)
        self.injection = Injection.between(self.connector, self.language, num_marks=num_marks)
        self.conditioned = Conditioned.between(self.connector, self.vision, self.counter)
        self.router = Router.of(config, self.connector)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the language model."""
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of the language model."""
        self.language.set_input_embeddings(value)

    def _init_weights(self, module: nn.Module) -> None:
        # timm builds some buffers by arithmetic, which a build on the meta device leaves empty.
        if callable(restore := getattr(module, "init_non_persistent_buffers", None)):
            restore()
        super()._init_weights(module)

    def _asked(
        self, input_ids: Tensor | None, image_sizes: Tensor | None, seen: Sequence[Any], **text: Any
    ) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
        """Return the embeddings, and what is asked about each tile, if the connector reads it.

        Args:
            input_ids: ``(batch, tokens)``
            image_sizes: Of the pictures.
            seen: Pixels and features; all None or empty where there is no picture.
            text: What tells packed samples, padding and kept parts.
        """
        reading = self.question_config
        if reading is None or input_ids is None:
            return None, None
        embedded: Tensor = self.get_input_embeddings()(input_ids)  # by all ranks in one order
        if not any(each is not None and len(each) for each in seen):
            return embedded, None
        words = words_of_tiles(
            reading, self.counter, input_ids, embedded, image_sizes=image_sizes,
            placeholder_id=self.config.image_token_id, **text,
        )  # fmt: skip
        return embedded, words

    def _filled(
        self, input_ids: Tensor, embedded: Tensor | None, features: VisionFeatures | None
    ) -> Tensor:
        """Return the embeddings with the features in the places of the placeholders."""
        nothing: Tensor | None = None
        if features is None and ranks_wait(self):
            # Before the embedding, as a picture would be: ranks add up gradients in the order in
            # which they come, and read weights in the order in which parts are called.
            nothing = nothing_seen(self, input_ids.device)
        filled: Tensor = self.get_input_embeddings()(input_ids) if embedded is None else embedded
        if features is not None:
            return place_image_features(
                filled, features.values.to(filled.device), input_ids,
                placeholder_id=self.config.image_token_id,
            )  # fmt: skip
        return filled if nothing is None else filled + nothing.to(filled)

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        vision_values: Tensor | None = None,
        vision_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> MMLMModelOutput:
        """Return the language model's hidden states over text and images.

        Shapes:
            input_ids: ``(batch, tokens)``, one placeholder for each image feature
            pixel_values: ``(tiles, channels, height, width)``, all images of the batch in
                reading order, normalised; for some policies ``(numbers,)`` with `image_sizes`
            inputs_embeds: ``(batch, tokens, width)`` instead of `input_ids`, without images
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        embedded, words = self._asked(
            input_ids, image_sizes, (pixel_values, vision_values), attention_mask=attention_mask,
            cache=past_key_values, position_ids=position_ids, borders=kwargs.get("cu_seq_lens_q"),
        )  # fmt: skip
        features = self.get_image_features(
            pixel_values, vision_values, vision_grids, image_sizes, words
        )
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self._filled(input_ids, embedded, features)
        elif features is not None:
            raise AlignmentError(
                "Images came with `inputs_embeds`, in which placeholders cannot be found. "
                "Pass `input_ids`."
            )
        if self.injection is not None:
            self.injection.look(
                features, input_ids, inputs_embeds, placeholder_id=self.config.image_token_id,
                cache=past_key_values, position_ids=position_ids,
                borders=kwargs.get("cu_seq_lens_q"),
            )  # fmt: skip
        if self.shared_positions is not None and input_ids is not None:
            position_ids, attention_mask = self.shared_positions(
                input_ids == self.config.image_token_id, attention_mask, past_key_values, kwargs
            )
        outputs = self.language(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        if self.injection is not None:
            self.injection.keep(getattr(outputs, "past_key_values", None))
        if self.shared_positions is not None:
            self.shared_positions.keep(getattr(outputs, "past_key_values", None))
        return MMLMModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=getattr(outputs, "past_key_values", None),
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
            image_hidden_states=None if features is None else features.values,
        )


class MMLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A vision-language assistant out of parts that somebody else already trained.

    Args:
        config: What it is made of.
        vision: A loaded encoder; built without weights when left out.
        language: A loaded decoder; built without weights when left out.
        lm_head: The language model's output layer, whose weight is taken over.
    """

    config_class = MMLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    config: MMLMConfig

    def __init__(
        self,
        config: MMLMConfig,
        vision: VisionEncoder | None = None,
        language: PreTrainedModel | None = None,
        lm_head: nn.Linear | None = None,
    ) -> None:
        super().__init__(config)
        self.model = MMLMModel(config, vision, language)
        rule = config.head_rule
        text = config.text_config
        with torch.device("meta" if lm_head is not None else torch.get_default_device()):
            self.lm_head = Head(text.hidden_size, text.vocab_size, rule=rule, bias=rule.bias)
        if lm_head is not None:
            self.lm_head.weight, self.lm_head.bias = lm_head.weight, lm_head.bias
            _mark_as_loaded(self.lm_head)
        if self.model.router is not None:
            self.model.router.head = self.lm_head
        self._tied_weights_keys = {}
        if config.tie_word_embeddings:
            self._tied_weights_keys = {"lm_head.weight": self._embedding_name()}
        self.post_init()

    def _embedding_name(self) -> str:
        """The full name of the embedding's weight, which differs from family to family."""
        weight = self.model.get_input_embeddings().weight
        names = (name for name, value in self.model.language.named_parameters() if value is weight)
        return f"model.language.{next(names)}"

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the language model."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of the language model."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the weights of the head."""
        assert isinstance(new_embeddings, nn.Linear)
        self.lm_head.weight, self.lm_head.bias = new_embeddings.weight, new_embeddings.bias

    def get_decoder(self) -> Any:
        """Return the language model without its head."""
        return self.model.language

    def cast(self, dtype: torch.dtype) -> Self:
        """Change the precision of everything that is stored; what is computed keeps its own.

        `to(dtype)` would also round the tables of rotary positions, which no checkpoint holds.
        """
        stored = set(self.state_dict())
        for name, tensor in chain(self.named_parameters(), self.named_buffers()):
            if name in stored and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        self.config.dtype = dtype
        return self

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> VisionFeatures | None:
        """Return the features that take the places of the placeholders."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @staticmethod
    def part_of(name: str) -> str:
        """Return the public part of a parameter: vision, connector, language or head.

        Wrappers (PEFT, DDP, FSDP, torch.compile) put prefixes before the name; they are skipped.
        """
        for prefix, part in PARTS.items():
            if name.startswith(prefix) or f".{prefix}" in name:
                return part
        raise KeyError(f"{name!r} is the name of no parameter of an MMLM model")

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        vision_values: Tensor | None = None,
        vision_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        loss_only: bool = False,
        loss_by_piece: bool = False,
        loss_weights: Float[Tensor, "batch tokens"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Int[Tensor, " borders"] | None = None,
        instead: Callable[[Self], Any] | None = None,
        **kwargs: Any,
    ) -> MMLMOutput:
        """Return logits, and with `labels` the loss; with `loss_only` the loss alone.

        With `instead` the pass is what that function does with the parts, and its result is
        returned: an objective that calls parts by themselves works so where weights are spread.

        Shapes:
            input_ids: ``(batch, tokens)``
            pixel_values: ``(tiles, channels, height, width)``
            labels: ``(batch, tokens)``, not shifted; -100 is not learnt
            loss_weights: ``(batch, tokens)``, a factor for each label's loss, beside the labels
            cu_seq_lens_q: ``(segments + 1,)``, borders of the samples packed into one row
            logits: ``(batch, tokens or logits_to_keep, vocabulary)``
        """
        if instead is not None:
            return instead(self)
        if cu_seq_lens_q is not None:
            longest = int(cu_seq_lens_q.diff().max())
            kwargs |= {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_q}
            kwargs |= {"max_length_q": longest, "max_length_k": longest}
        if cu_seq_lens_q is not None or loss_only:
            # Nothing is generated from here; and only without a cache does transformers see the
            # samples of a packed row by their restarting positions.
            kwargs["use_cache"] = False
        with borders_given(cu_seq_lens_q is not None):
            outputs = self.model(
                input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask,
                position_ids=position_ids, past_key_values=past_key_values,
                inputs_embeds=inputs_embeds, vision_values=vision_values,
                vision_grids=vision_grids, image_sizes=image_sizes, **kwargs,
            )  # fmt: skip
        hidden = outputs.last_hidden_state
        if labels is not None and cu_seq_lens_q is not None:
            labels = without_first_of_each(labels, cu_seq_lens_q)
        result = MMLMOutput(
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
        if loss_by_piece and labels is not None:
            # Preferences compare the answers of a batch: each has a loss of its own.
            result.loss = loss_of_pieces(hidden, labels, cu_seq_lens_q, self.lm_head)
            return result
        if loss_only:
            given = (labels, loss_weights, num_items_in_batch)
            result.loss = labelled_loss(self.lm_head, hidden, *given)
            return result
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        result.logits = self.lm_head(hidden[:, keep])
        if labels is not None:
            loss: Any = self.loss_function
            result.loss = loss(
                logits=result.logits, labels=labels, vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
        return result

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        pixel_values: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand the pixels to the first step only: later steps find the images in the cache."""
        names = ("vision_values", "vision_grids", "image_sizes")
        vision = {name: kwargs.pop(name, None) for name in names}
        stock: Any = super()
        inputs = stock.prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, is_first_iteration=is_first_iteration,
            **kwargs,
        )  # fmt: skip
        empty = past_key_values is None or past_key_values.get_seq_length() == 0
        if is_first_iteration or empty or not kwargs.get("use_cache", True):
            inputs |= {"pixel_values": pixel_values, **vision}
        return inputs

    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows for beams; the images of a row are repeated as one block behind it."""
        pixels = model_kwargs.pop("pixel_values", None)
        image_sizes = model_kwargs.pop("image_sizes", None)
        if expand_size > 1 and pixels is not None and input_ids is not None:
            slots = (input_ids == self.config.image_token_id).sum(-1).tolist()
            if image_sizes is None:
                counts = [slot // self.model.counter.tokens_per_tile for slot in slots]
            else:
                images, counts = images_by_row(self.model.counter, sizes_of(image_sizes), slots)
                blocks = image_sizes.split(images)
                image_sizes = torch.cat([block for block in blocks for _ in range(expand_size)])
            blocks = pixels.split(counts)
            pixels = torch.cat([block for block in blocks for _ in range(expand_size)])
        stock: Any = super()
        input_ids, model_kwargs = stock._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pixels is not None:
            model_kwargs["pixel_values"] = pixels
        if image_sizes is not None:
            model_kwargs["image_sizes"] = image_sizes
        return input_ids, model_kwargs
