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
_ROWS_AT_ONCE = 8192
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
    known = {int(number) for number in tokenizer.get_vocab().values()}
    tokenizer.add_tokens([image_token], special_tokens=True)
    pad_token = _settle_pad(tokenizer)
    rows = int(model.get_input_embeddings().weight.shape[0])
    known = {number for number in known if number < rows}
    fresh = sorted({int(number) for number in tokenizer.get_vocab().values()} - known)
    if fresh:
        _give_rows(model, sorted(known), fresh)
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


def _give_rows(model: Any, known: list[int], fresh: list[int]) -> None:
    """Give rows to new token ids: free ones where there are, else new ones.

    All new rows begin as the mean of the known ones: of the input embedding, and of the head and
    its bias, so that a model never prefers a token that it has not learnt.
    """
    import torch

    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = int(layers[0].weight.shape[0])
    with torch.no_grad():
        means = [None if layer is None else _mean(layer.weight, known) for layer in layers]
        bias = getattr(layers[1], "bias", None)
        bias_mean = None if bias is None else _mean(bias, known)
        needed = fresh[-1] + 1
        if needed > rows:
            wanted = -(-needed // _MULTIPLE) * _MULTIPLE if rows % _MULTIPLE == 0 else needed
            model.resize_token_embeddings(wanted, mean_resizing=False)
            fresh = sorted({*fresh, *range(rows, wanted)})
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        for layer, mean in zip(layers, means, strict=True):
            if layer is not None and mean is not None:
                layer.weight[fresh] = mean
        if bias_mean is not None:
            layers[1].bias[fresh] = bias_mean


def _mean(weight: Any, known: list[int]) -> Any:
    """Return the mean of some rows, summed in float32 without a copy of all of them."""
    import torch

    total = torch.zeros(weight.shape[1:], dtype=torch.float32, device=weight.device)
    for start in range(0, len(known), _ROWS_AT_ONCE):
        total += weight[known[start : start + _ROWS_AT_ONCE]].float().sum(0)
    return (total / len(known)).to(weight.dtype)
