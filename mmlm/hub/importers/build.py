"""From a foreign checkpoint to model and processor: every tensor gets its place, or is listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmlm.errors import CheckpointError
from mmlm.hub.importers.base import Foreign, Layout, read_foreign
from mmlm.hub.keymaps import compare_keys
from mmlm.hub.weights import read_json
from mmlm.language import add_image_token, decoder_of, head_of, head_rule_of
from mmlm.modeling import MMLMConfig, MMLMForConditionalGeneration
from mmlm.processing import MMLMImageProcessor, MMLMProcessor
from mmlm.vision import encoders

_TOWER, _TEXT, _HEAD = "model.vision.tower.", "model.language.", "lm_head."
_NEW = ("model.connector.", "model.reducer.", "model.marks.")


def import_folder(
    folder: Path, layout: Layout, *, dtype: torch.dtype | None = None
) -> tuple[MMLMForConditionalGeneration, MMLMProcessor]:
    """Read a checkpoint of another project.

    Args:
        folder: Where `config.json` and the weights are.
        layout: What `layout_of` found.
        dtype: The precision of the weights; that of the files when left out.

    Returns:
        Model and processor; what differs from the project's own code stands in the config, as
        `sources.notes`.

    Raises:
        CheckpointError: listing the tensors that have no place, or that are missing.
    """
    origin = str(folder)
    state = layout.prepare(read_foreign(folder))
    foreign = layout.describe(read_json(folder / "config.json"), set(state), origin=origin)
    ours = {_plain(key): value for key, value in _renamed(foreign, state, origin).items()}
    dtype = dtype or next(iter(ours.values())).dtype
    encoder = encoders.read(foreign.vision, origin=f"{origin}: vision").load(dtype=dtype)
    tower: Any = getattr(encoder, "tower", None)
    given = _below(ours, _TOWER)
    if given:
        compare_keys(given, tower.state_dict(), origin=origin)
        tower.load_state_dict(given)
    causal, tokenizer = _language(foreign, ours, folder, dtype)
    image_token_id = add_image_token(tokenizer, causal)
    config = MMLMConfig(
        text_config=causal.config,
        vision_config=encoder.tower_config,
        image=foreign.image,
        vision=_words(foreign.vision, folder),
        vision_facts=encoder.facts.to_dict(),
        reducer=foreign.reducer,
        connector=foreign.connector,
        image_token_id=image_token_id,
        head=head_rule_of(causal).to_dict(),
        sources={
            "language": {"use": "causal_lm", "checkpoint": folder.name},
            "notes": foreign.notes,
        },
        tie_word_embeddings=bool(causal.config.tie_word_embeddings),
        dtype=dtype,
    )
    model = MMLMForConditionalGeneration(config, encoder, decoder_of(causal), head_of(causal))
    model = model.cast(dtype).eval()
    _fill(model, ours, origin)
    template = None if getattr(tokenizer, "chat_template", None) else foreign.template
    processor = MMLMProcessor(
        MMLMImageProcessor.from_config(config), tokenizer, chat_template=template
    )
    return model, processor


def _renamed(foreign: Foreign, state: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Return tensors under our names; one without a place is an error that lists it."""
    renamed = foreign.keys.to_ours(state, origin=origin)
    newline = renamed.get("model.marks.weight")
    if newline is not None and newline.ndim == 1:
        renamed["model.marks.weight"] = newline[None]
    return renamed


def _words(vision: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the encoder's words with a name instead of a whole config."""
    if "config" not in vision:
        return vision
    words = {key: value for key, value in vision.items() if key != "config"}
    return {"checkpoint": folder.name, **words}


def _plain(key: str) -> str:
    """Return a key of ours without the module that transformers 5 no longer has."""
    return key.replace(f"{_TOWER}vision_model.", _TOWER)


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _language(
    foreign: Foreign, ours: dict[str, Tensor], folder: Path, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Return the language model with its weights, and the tokenizer."""
    causal: Any = AutoModelForCausalLM.from_config(foreign.text, dtype=dtype)
    decoder, head = decoder_of(causal), head_of(causal)
    text, top = _below(ours, _TEXT), _below(ours, _HEAD)
    embedding = causal.get_input_embeddings().weight
    rows = next((v.shape[0] for k, v in text.items() if "embed" in k), embedding.shape[0])
    if rows != embedding.shape[0]:
        causal.resize_token_embeddings(rows)
    compare_keys(text, decoder.state_dict(), origin=str(folder))
    decoder.load_state_dict(text)
    if top:
        compare_keys(top, head.state_dict(), origin=str(folder))
        if not causal.config.tie_word_embeddings:
            head.load_state_dict(top)
    place = folder if (folder / "tokenizer_config.json").is_file() else foreign.tokenizer
    if place is None:
        raise CheckpointError(f"{folder} holds no tokenizer, and names none. Copy one into it.")
    return causal.eval(), AutoTokenizer.from_pretrained(place)


def _fill(model: MMLMForConditionalGeneration, ours: dict[str, Tensor], origin: str) -> None:
    """Put the tensors of the connector in their places."""
    new = {key: value for key, value in ours.items() if key.startswith(_NEW)}
    own = model.state_dict()
    compare_keys(new, [key for key in own if key.startswith(_NEW)], origin=origin)
    for key, value in new.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{origin}: {key} has the shape {tuple(value.shape)}, and the parts ask for "
                f"{tuple(own[key].shape)}. The encoder or the language model is another one."
            )
        own[key].copy_(value)
