"""Which adapter a token goes through: one for text and one for images, on the same layers.

MM-LoRA (Arcana, arXiv 2410.13733): text tokens and image tokens share every weight, and each kind
has a low-rank product of its own beside it. Both products are PEFT's; what is added here is that
each is silent where the other speaks. Both are computed for all tokens, so that every process
takes part in every step; the thin matrices are a hundredth of the work of the layer beside them.
"""

from __future__ import annotations

from typing import Any

from mmlm.errors import AlignmentError, ConfigError

TEXT, IMAGES = "default", "image"
"""The names under which PEFT holds the two."""


class TokenRouter:
    """Knows which tokens of the step are images.

    Args:
        image_token_id: The placeholder's id.
    """

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id
        self.images: Any = None

    def look(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the ids that a model is about to take: ``(batch, tokens)``; none are all text."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.images = None if ids is None else ids == self.image_token_id


class _Silence:
    """The hook behind the second matrix of an adapter; an object, so that a copy has its own."""

    def __init__(self, router: TokenRouter, *, speaks_of_images: bool) -> None:
        self.router, self.speaks_of_images = router, speaks_of_images

    def keep(self, _: Any, __: Any, output: Any) -> Any:
        """Return the output where the adapter speaks, and zeros elsewhere.

        Shapes:
            output: ``(batch, tokens, width)``, or the same tokens in one row
        """
        images = self.router.images
        if images is None:
            return output * 0.0 if self.speaks_of_images else output
        if images.numel() != output.shape[:-1].numel():
            raise AlignmentError(
                f"A layer with mm_lora got {tuple(output.shape[:-1])} tokens, and the step has "
                f"{tuple(images.shape)}: which of them are images cannot be told. Leave this layer "
                f"out of adapters.targets, or use lora."
            )
        chosen = images if self.speaks_of_images else ~images
        return output * chosen.reshape(output.shape[:-1])[..., None].to(output)


def route_by_token(model: Any, *, text: str = TEXT, images: str = IMAGES) -> None:
    """Let two adapters that a model carries speak for text and for images, both active.

    Args:
        model: The joined model, or any that has placeholders for images.
        text: PEFT's name of the adapter for text.
        images: PEFT's name of the adapter for images.

    Raises:
        ConfigError: if the model has no placeholder for images.
    """
    router = model_router(model)
    for module in model.modules():
        matrices = getattr(module, "lora_B", None)
        if matrices is None or text not in matrices or images not in matrices:
            continue
        for name, speaks in ((text, False), (images, True)):
            silence = _Silence(router, speaks_of_images=speaks)
            matrices[name].register_forward_hook(silence.keep)
    model.set_adapter([text, images])


def model_router(model: Any) -> TokenRouter:
    """Return what reads the ids of a model; it is put there once.

    Raises:
        ConfigError: if the model has no placeholder for images.
    """
    router = getattr(model, "token_router", None)
    if isinstance(router, TokenRouter):
        return router
    token = placeholder_of(model)
    if token is None:
        raise ConfigError(
            f"adapters mm_lora: {type(model).__name__} has no placeholder for images, so that text "
            f"and images cannot be told apart. Use lora."
        )
    router = TokenRouter(token)
    model.token_router = router
    # Objectives may call the model without its head, which gets the ids as well.
    for module in {model, model.base_model}:
        module.register_forward_pre_hook(router.look, with_kwargs=True)
    return router


def placeholder_of(model: Any) -> int | None:
    """Return the id of the placeholder for images, or None."""
    for name in ("image_token_id", "image_token_index"):
        token = getattr(model.config, name, None)
        if isinstance(token, int):
            return token
    return None


def is_routed(model: Any) -> bool:
    """Whether a model carries adapters that are chosen token by token."""
    return isinstance(getattr(model, "token_router", None), TokenRouter)


CANNOT_MERGE = (
    "Its adapters are chosen token by token (mm_lora), so that text and images go through "
    "different weights, and no one weight does what both do"
)
"""Why such adapters stay beside the weights, for messages."""
