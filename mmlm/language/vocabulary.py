"""Growing a vocabulary: the image token, and a pad token that is not the end of a turn.

Tokens are added once, when parts are composed. A new token takes a free row of the embedding
where the vocabulary is padded, else the embedding grows, by as many rows as keep it a multiple
of 64 where it was one. New rows begin as the mean of the rows in use. Nothing here knows what
stands in place of the image token later.
"""

from __future__ import annotations

from typing import Any

from mmlm.language.template import IMAGE_TOKEN

_MULTIPLE = 64
_PAD_NAMES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
    "<unk>",
    "<|unk|>",
)


def add_image_token(tokenizer: Any, model: Any, *, image_token: str = IMAGE_TOKEN) -> int:
    """Add the image token to a tokenizer and its model, and settle the pad token.

    Args:
        tokenizer: The tokenizer, changed in place.
        model: The causal LM, changed in place; its embeddings grow where they must.
        image_token: The placeholder of an image.

    Returns:
        The id of the image token.
    """
    used = sorted({int(number) for number in tokenizer.get_vocab().values()})
    tokenizer.add_tokens([image_token], special_tokens=True)
    pad_token = _settle_pad(tokenizer)
    fresh = sorted({int(n) for n in tokenizer.get_vocab().values()} - set(used))
    if fresh:
        _give_rows(model, used, fresh)
    pad_id = int(tokenizer.convert_tokens_to_ids(pad_token))
    model.config.get_text_config().pad_token_id = pad_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = pad_id
    return int(tokenizer.convert_tokens_to_ids(image_token))


def _settle_pad(tokenizer: Any) -> str:
    """Choose a pad token that is not eos.

    Collators that mask padding by its id would otherwise mask every end of turn, and the model
    would never learn to stop.
    """
    eos = tokenizer.eos_token
    if tokenizer.pad_token is None or tokenizer.pad_token == eos:
        vocabulary = tokenizer.get_vocab()
        names = [name for name in _PAD_NAMES if name in vocabulary and name != eos]
        if not names:
            tokenizer.add_tokens(["<|pad|>"], special_tokens=True)
            names = ["<|pad|>"]
        tokenizer.pad_token = names[0]
    return str(tokenizer.pad_token)


def _give_rows(model: Any, used: list[int], fresh: list[int]) -> None:
    """Give rows to new token ids: free ones where there are, else new ones."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    needed = fresh[-1] + 1
    with torch.no_grad():
        head = model.get_output_embeddings()
        inputs = model.get_input_embeddings()
        known = torch.tensor([number for number in used if number < rows])
        means = [
            None if layer is None else _mean(layer.weight, known)
            for layer in (inputs, head)
        ]
        of_bias = None if getattr(head, "bias", None) is None else head.bias[known].mean()
        if needed > rows:
            wanted = -(-needed // _MULTIPLE) * _MULTIPLE if rows % _MULTIPLE == 0 else needed
            model.resize_token_embeddings(wanted, mean_resizing=False)
            fresh = sorted({*fresh, *range(rows, wanted)})
        for layer, mean in zip(
            (model.get_input_embeddings(), model.get_output_embeddings()), means, strict=True
        ):
            if layer is not None and mean is not None:
                layer.weight[fresh] = mean
        if of_bias is not None:
            model.get_output_embeddings().bias[fresh] = of_bias


def _mean(weight: Any, known: Any) -> Any:
    """Return the mean row of the rows in use, summed in float32."""
    return weight[known.to(weight.device)].float().mean(0).to(weight.dtype)
