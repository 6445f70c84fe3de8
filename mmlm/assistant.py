"""A model and its processor, joined from parts or read from a folder.

    modeling, processing, generation, hub ──► assistant ──► training, evaluation, serving, cli
                                              you are here

`compose` takes the words of a recipe's `model:`, `load` takes a folder or a Hub id. Both give
an `Assistant`, which answers, chats and saves. How things are done is in the rooms below.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmlm.connectors import connectors
from mmlm.errors import CheckpointError, ConfigError
from mmlm.generation import Answer, Chat, GenerationSettings, Request, answer_batch
from mmlm.images import image_policies, video_policies
from mmlm.language import ChatFormat, add_image_token, decoder_of, head_of, head_rule_of, languages
from mmlm.modeling import MMLMConfig, MMLMForConditionalGeneration, with_turns
from mmlm.processing import MMLMImageProcessor, MMLMProcessor
from mmlm.reducers import reducers
from mmlm.vision import encoders
from mmlm.whole import WholeModel, WholeProcessor


class Assistant:
    """A vision-language assistant: model and processor together.

    Args:
        model: The joined model.
        processor: Its processor.
        notes: What a model card should say beside what the config knows.
    """

    def __init__(
        self,
        model: MMLMForConditionalGeneration | WholeModel,
        processor: MMLMProcessor | WholeProcessor,
        notes: dict[str, Any] | None = None,
    ) -> None:
        # One of both in each case, and both answer the same questions.
        self.model: Any = model
        self.processor: Any = processor
        self.notes = notes or {}

    def answer(self, question: str, images: Sequence[Any] = (), **settings: Any) -> str:
        """Answer one question about images, each a path, bytes or a PIL image.

        Args:
            question: The question.
            images: The images, in the order in which the question names them.
            **settings: Fields of `GenerationSettings`, such as ``max_new_tokens=32``.
        """
        return self.answer_all([Request(question, images)], **settings)[0]

    def answer_all(
        self, requests: Sequence[Request], batch_size: int = 8, **settings: Any
    ) -> list[str]:
        """Answer many requests, in their order; the text is the same as one by one."""
        return [answer.text for answer in self.answers(requests, batch_size, **settings)]

    def answers(
        self, requests: Sequence[Request], batch_size: int = 8, **settings: Any
    ) -> list[Answer]:
        """Like `answer_all`, with token counts and the reason why each answer ended."""
        chosen = GenerationSettings.from_dict(settings, origin="generation settings")
        # Requests of like length share a batch, so that little is padded.
        order = sorted(range(len(requests)), key=lambda index: _length(requests[index]))
        answers: dict[int, Answer] = {}
        was_training = self.model.training
        self.model.eval()
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = answer_batch(
                self.model, self.processor, [requests[row] for row in rows], chosen
            )
            answers.update(zip(rows, batch, strict=True))
        self.model.train(was_training)
        return [answers[index] for index in range(len(requests))]

    def chat(self, **settings: Any) -> Chat:
        """Begin a conversation."""
        self.model.eval()
        chosen = GenerationSettings.from_dict(settings, origin="generation settings")
        return Chat(self.model, self.processor, chosen)

    def with_video(self, **words: Any) -> Assistant:
        """Return an assistant of the same weights that takes clips: a picture model needs no more.

        Args:
            **words: Those of `model.video` in a recipe, such as ``max_frames=16``.

        Raises:
            ConfigError: if a word is unknown, or the model is a stock class taken whole.
        """
        if isinstance(self.model, WholeModel):
            raise ConfigError("A stock class taken whole reads clips by its own processor alone.")
        video = video_policies.read({"use": "frames", **words}, origin="video")
        self.model.config.video = video.to_dict()
        _check_fit(self.model.config)
        self.model.model.counter = self.model.config.counter()
        looks = MMLMImageProcessor.from_config(self.model.config)
        own = self.processor
        processor = MMLMProcessor(looks, own.tokenizer, chat_template=own.chat.template)
        return Assistant(self.model, processor, self.notes)

    def save(
        self, folder: str | Path, *, delta: bool = False, recipe: dict[str, Any] | None = None
    ) -> list[str]:
        """Write the model: as a stock class where the composition equals one, else as MMLM's.

        Args:
            folder: Where to; an earlier model there stays whole until the new one is.
            delta: Write only what was learnt, beside the names of the base parts.
            recipe: The resolved recipe, kept in the folder.

        Returns:
            The reasons why no stock class could be written; empty if one was.
        """
        from mmlm import hub

        if isinstance(self.model, WholeModel):
            if delta:
                raise CheckpointError(
                    "A stock class taken whole has no parts with names, so there is no delta. "
                    "Save without `delta=True`."
                )
            hub.save_whole(self.model, self.processor, Path(folder), recipe=recipe)
            return []
        write = hub.save_delta if delta else hub.save
        return write(self.model, self.processor, Path(folder), recipe=recipe, notes=self.notes)

    def push_to_hub(self, repo: str, *, force: bool = False, private: bool = False) -> str:
        """Save the model, write its card and send it to the Hub; returns the address."""
        from mmlm import hub

        return hub.push(
            self.model, self.processor, repo, force=force, private=private, notes=self.notes
        )


def _length(request: Request) -> int:
    return sum(len(turn.text) + 1000 * len(turn.images) for turn in request.conversation())


def compose(
    *,
    vision: dict[str, Any],
    language: dict[str, Any],
    connector: dict[str, Any] | None = None,
    image: dict[str, Any] | None = None,
    reducer: dict[str, Any] | None = None,
    video: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Assistant:
    """Join an encoder, a connector and a language model; the words are those of a recipe.

    Args:
        vision: The encoder, such as ``{"use": "hf", "checkpoint": …}``.
        language: The language model, such as ``{"use": "causal_lm", "checkpoint": …}``.
        connector: The connector; a two-layer MLP when left out.
        image: How a picture becomes the encoder's input; ``{"use": "squash"}`` when left out.
        reducer: What lowers the number of image tokens; none when left out.
        video: What becomes of clips, ``{"use": "frames"}``; takes none when left out.
        dtype: The precision of all weights.

    Raises:
        ConfigError: if a name or key is unknown, or the parts do not fit.
    """
    vision_part = encoders.read(vision, origin="model.vision")
    language_part = languages.read(language, origin="model.language")
    connector_part = connectors.read(connector or {"use": "mlp"}, origin="model.connector")
    connector_part = connector_part.resolved()
    policy = image_policies.read(image or {"use": "squash"}, origin="model.image")
    reducer_part = None if reducer is None else reducers.read(reducer, origin="model.reducer")
    video_part = None if video is None else video_policies.read(video, origin="model.video")

    encoder = vision_part.load()
    causal, tokenizer = language_part.load()
    image_token_id = add_image_token(tokenizer, causal)
    connector_part = with_turns(connector_part, lambda: ChatFormat(tokenizer))
    vision_part = vision_part.told(tokenizer)
    rule = head_rule_of(causal)
    config = MMLMConfig(
        text_config=causal.config,
        vision_config=encoder.tower_config,
        image=policy.to_dict(),
        vision=vision_part.to_dict(),
        vision_facts=encoder.facts.to_dict(),
        reducer=None if reducer_part is None else reducer_part.to_dict(),
        connector=connector_part.to_dict(),
        video=None if video_part is None else video_part.to_dict(),
        image_token_id=image_token_id,
        head=rule.to_dict(),
        sources={"language": language_part.to_dict(), "vision": vision_part.to_dict()},
        tie_word_embeddings=bool(causal.config.tie_word_embeddings),
        dtype=dtype,
    )
    _check_fit(config)
    model = MMLMForConditionalGeneration(config, encoder, decoder_of(causal), head_of(causal))
    model = model.cast(dtype).eval()
    generation = getattr(causal, "generation_config", None)
    if generation is not None:
        model.generation_config = generation
    image_processor = MMLMImageProcessor.from_config(config)
    return Assistant(model, MMLMProcessor(image_processor, tokenizer))


def _check_fit(config: MMLMConfig) -> None:
    """Refuse parts whose grids do not meet, before any weight is joined."""
    counter = config.counter()
    ragged = counter.policy.ragged or counter.frame_policy.ragged
    if ragged and counter.facts.rule == "fixed":
        name = counter.policy.use if counter.policy.ragged else counter.frame_policy.use
        raise ConfigError(
            f"The image policy {name!r} makes tiles of sizes of their own, and this "
            f"encoder takes {counter.side.height} x {counter.side.width} alone. Use `tiles`, or an "
            f"encoder that takes other sizes (`mmlm probe` says which)."
        )
    video = counter.video
    if counter.facts.frames > 1 and video is not None and (video.drop is not None or video.roll):
        raise ConfigError(
            "video.drop and video.roll are for frames that are encoded one by one, and this "
            "encoder takes whole clips. Use `pool`, or leave them out."
        )
    counter.count(counter.side)  # refuses a layout that the tokens cannot be put in
    plan = counter.plan(counter.side)
    for tile in plan.tiles:
        if counter.grid_of_tile(tile.size).num_tokens < 1:
            raise ConfigError(
                f"A picture of the encoder's own size {tuple(counter.side)} would give no image "
                f"tokens after `model.reducer` {config.reducer}. Choose a smaller factor."
            )


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    whole: bool = False,
) -> Assistant:
    """Read an assistant from a folder or the Hub: MMLM's class or a stock one.

    A stock class that MMLM does not read as a composition is taken whole: with its own
    processor, and saved as the class that it is.

    Args:
        source: A folder, the folder of a training run, or a Hub id.
        dtype: The precision of the weights; what the folder says when left out.
        device: Where to; a GPU if there is one when left out.
        whole: Take a stock class whole, even where MMLM reads it as a composition.

    Raises:
        CheckpointError: if it is neither, or damaged; the message names file and mend.
    """
    from mmlm import hub

    folder = hub.find(hub.model_of_run(source))
    model: Any
    processor: Any
    if whole or hub.is_only_whole(folder):
        model, processor = hub.load_whole(folder, dtype=dtype)
    else:
        model, processor = hub.load_parts(folder, dtype=dtype)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Assistant(model.to(device).eval(), processor)
