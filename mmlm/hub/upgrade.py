"""A trained checkpoint with another encoder or another language model: what fits is kept.

    folder + {"vision": …} ──► the old language model, the new encoder,
                               of the connector every tensor whose shape still fits

Parts that are not named are taken from the checkpoint, with what they have learnt; parts that
are named come fresh. What was kept is said part by part. A cheap training puts it right again:
see the recipes `new_encoder` and `new_language`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmlm.connectors import connectors
from mmlm.errors import ConfigError
from mmlm.hub.load import load_parts, model_of_run
from mmlm.images import image_policies
from mmlm.language import ChatFormat, add_image_token, decoder_of, head_of, head_rule_of, languages
from mmlm.modeling import MMLMConfig, MMLMForConditionalGeneration, with_turns
from mmlm.processing import MMLMImageProcessor, MMLMProcessor
from mmlm.reducers import reducers
from mmlm.vision import encoders

JOINS = ("model.connector.", "model.reducer.", "model.marks.")
"""What stands between the two models, and is kept as far as it fits."""

PARTS = ("image", "vision", "reducer", "connector", "language")


class Upgrade(NamedTuple):
    """A model of old and new parts."""

    model: MMLMForConditionalGeneration
    processor: MMLMProcessor

    kept: list[str]
    """What was kept and what is new, a line for each part."""


def upgrade(
    source: str | Path, parts: Mapping[str, Any], *, dtype: torch.dtype | None = None
) -> Upgrade:
    """Read a checkpoint and put other parts in it.

    Args:
        source: A folder, the folder of a run, or a Hub id.
        parts: The new parts, in the words of a recipe: any of image, vision, reducer, connector
            and language.
        dtype: The precision of the weights; what the folder says when left out.

    Raises:
        CheckpointError: if the checkpoint cannot be read as parts.
        ConfigError: if a word is unknown, or the new parts do not fit.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ConfigError(
            f"model.{unknown[0]} cannot be exchanged under a checkpoint; these can: "
            f"{', '.join(PARTS)}."
        )
    old, processor = load_parts(model_of_run(source), dtype=dtype)
    was, dtype = old.config, dtype or next(old.parameters()).dtype
    words: dict[str, Any] = {
        "image": was.image, "reducer": was.reducer, "connector": was.connector, "vision": was.vision
    }  # fmt: skip
    tables: dict[str, Any] = {
        "image": image_policies, "reducer": reducers, "connector": connectors
    }  # fmt: skip
    for key in tables.keys() & parts.keys():
        given = parts[key]
        read = None if given is None else tables[key].read(given, origin=f"model.{key}")
        words[key] = None if read is None else read.to_dict()
    encoder, facts, tower = old.model.vision, was.vision_facts, was.vision_config
    sources = dict(was.sources)
    if "vision" in parts:
        part = encoders.read(parts["vision"], origin="model.vision")
        encoder = part.load(dtype=dtype)
        facts, tower = encoder.facts.to_dict(), encoder.tower_config
        words["vision"] = part.to_dict()
        sources["vision"] = words["vision"]
    decoder, head, text = old.model.language, old.lm_head, was.text_config
    tokenizer, template, rule = processor.tokenizer, processor.chat.template, was.head
    image_token_id, tied = was.image_token_id, was.tie_word_embeddings
    if "language" in parts:
        spoken = languages.read(parts["language"], origin="model.language")
        causal, tokenizer = spoken.load()
        image_token_id = add_image_token(tokenizer, causal)
        decoder, head, text = decoder_of(causal), head_of(causal), causal.config
        rule, template = head_rule_of(causal).to_dict(), None
        tied = bool(causal.config.tie_word_embeddings)
        sources["language"] = spoken.to_dict()
    read = connectors.read(words["connector"], origin="model.connector")
    talks = with_turns(read, lambda: ChatFormat(tokenizer, template))
    words["connector"] = talks.to_dict()
    looks = encoders.read(words["vision"], origin="model.vision").told(tokenizer, template)
    words["vision"] = looks.to_dict()
    config = MMLMConfig(
        **words, text_config=text, vision_config=tower, vision_facts=facts,
        video=getattr(was, "video", None), image_token_id=image_token_id, head=rule,
        sources=sources, tie_word_embeddings=tied, dtype=dtype,
    )  # fmt: skip
    model = MMLMForConditionalGeneration(config, encoder, decoder, head).cast(dtype).eval()
    kept = _keep(model, old.state_dict())
    said = [_said(name, name in parts, sources) for name in ("vision", "language")]
    images = MMLMImageProcessor.from_config(config)
    joined = MMLMProcessor(images, tokenizer, chat_template=template)
    return Upgrade(model, joined, [*said, *kept])


@torch.no_grad()
def _keep(model: MMLMForConditionalGeneration, old: Mapping[str, Tensor]) -> list[str]:
    """Copy what fits between the two models, and say what did."""
    lines: list[str] = []
    own = model.state_dict()
    for prefix in JOINS:
        mine = {key: value for key, value in own.items() if key.startswith(prefix)}
        fits = [key for key, value in mine.items() if key in old and old[key].shape == value.shape]
        for key in fits:
            mine[key].copy_(old[key])
        if not mine:
            continue
        name = prefix.removeprefix("model.").removesuffix(".")
        new = [key.removeprefix(prefix) for key in mine if key not in fits]
        lines.append(f"{name}: {len(fits)} of {len(mine)} tensors kept{_news(new)}")
    return lines


def _news(new: list[str]) -> str:
    if not new:
        return ""
    return f"; new: {', '.join(new[:4])}" + (f" and {len(new) - 4} more" if len(new) > 4 else "")


def _said(part: str, is_new: bool, sources: Mapping[str, Any]) -> str:
    if not is_new:
        return f"{part}: kept with what it has learnt"
    return f"{part}: new ({(sources.get(part) or {}).get('checkpoint', 'as named')})"
