"""Fuyu: raw patches through one linear map, a token behind each row, any language model.

Its processor has the form of a prompt in its code: the picture before all words, a mark before
the answer. A language model that learnt with `format: fuyu` reads just that. The learnt vector
behind a row is written into the embedding of `|NEWLINE|`, which nothing else uses; the head may
not share that embedding.

transformers 5.23 forgets the chat template of such a folder, so that it is asked as
`processor(images=picture, text=question)`; the processor cuts off the first token of a prompt
(the space before a text of Fuyu's own tokenizer), which the written tokenizer puts there twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmlm.connectors import LinearConnectorConfig
from mmlm.errors import CheckpointError
from mmlm.hub.keymaps import KeyMap
from mmlm.hub.stock import (
    CONNECTOR,
    HEAD,
    LANGUAGE,
    RESAMPLE,
    StockClass,
    common_reasons,
    read_normalisation,
    stock_classes,
    text_of,
)
from mmlm.hub.weights import read_json
from mmlm.images import NativeConfig
from mmlm.language import IMAGE_TOKEN
from mmlm.language.fuyu import FUYU_TEMPLATE, NEWLINE, SPEAKER
from mmlm.messages import Message
from mmlm.modeling import MMLMConfig
from mmlm.processing import MMLMProcessor
from mmlm.vision import PatchesConfig

_MARKS = "model.marks.weight"
_OLDER = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model.language_model."),
    ("vision_embed_tokens.", "model.vision_embed_tokens."),
)
# The processor cuts the first token off; only behind a first placeholder follows another mark.
_TWICE = {
    "type": "Replace",
    "pattern": {"Regex": r"^\|SPEAKER\|(?=\|)"},
    "content": SPEAKER + SPEAKER,
}


@stock_classes.register("fuyu")
class Fuyu(StockClass):
    """`FuyuForCausalLM`."""

    class_name = "FuyuForCausalLM"
    model_type = "fuyu"
    parts = (
        "patches; image native with rule padded and layout row_ends; linear; a language model "
        "with `format: fuyu` whose head is not tied"
    )
    caveat = "one picture in a conversation, asked as processor(images=…, text=…)"
    keeps_template = False
    rank = 90

    def why_not(self, config: MMLMConfig) -> list[str]:
        """Return the conditions that this composition does not meet."""
        reasons = common_reasons(config) + _image_reasons(config)
        if config.vision.get("use") != "patches":
            reasons.append(f"encoder {config.vision.get('use')!r} (Fuyu has none: patches)")
        if config.reducer is not None:
            reasons.append(f"reducer {config.reducer['use']!r} (Fuyu has none)")
        connector = config.connector_part
        if not isinstance(connector, LinearConnectorConfig) or not connector.bias:
            reasons.append(f"connector {connector.use!r} (Fuyu has linear with a bias)")
        if config.tie_word_embeddings:
            reasons.append(
                "the head shares its weights with the embedding, into which the ends of rows are "
                "written; take a language model with a head of its own"
            )
        if (config.sources.get("language") or {}).get("format") != "fuyu":
            reasons.append(
                "the language model has its own chat template, and Fuyu's processor puts pictures "
                "before all words and a mark before the answer (set `language.format: fuyu`)"
            )
        return reasons

    def stock_config(self, config: MMLMConfig) -> PretrainedConfig:
        """Return a `FuyuConfig`."""
        from transformers import FuyuConfig

        facts = config.facts
        # transformers 5.17 makes the embedding of patches as wide as this; later ones do not ask.
        older: dict[str, Any] = {"hidden_size": config.text_config.hidden_size}  # type: ignore[union-attr]
        return FuyuConfig(
            text_config=text_of(config),
            **older,
            image_size=facts.side[0],
            patch_size=facts.stride,
            num_channels=facts.channels,
            image_token_id=config.image_token_id,
            tie_word_embeddings=False,
        )

    def our_tower(self, stock: PretrainedConfig) -> PretrainedConfig | None:
        """Return None: there is no tower."""
        return None

    def named_tokens(self, processor: MMLMProcessor) -> dict[str, str]:
        """Return nothing: the processor knows its tokens by their characters."""
        return {}

    def processor(self, config: MMLMConfig, processor: MMLMProcessor, tokenizer: Any) -> Any:
        """Return a `FuyuProcessor`, with the tokenizer in Fuyu's words."""
        from transformers import FuyuImageProcessor, FuyuProcessor

        facts, policy = config.facts, config.image_policy
        assert isinstance(policy, NativeConfig)  # `why_not` has seen to it
        settings: dict[str, Any] = {
            "size": {"height": policy.box_px[0], "width": policy.box_px[1]},
            "patch_size": {"height": facts.stride, "width": facts.stride},
            "resample": RESAMPLE[facts.resample],
            "image_mean": list(facts.mean),
            "image_std": list(facts.std),
            "padding_value": 1.0,
        }
        return FuyuProcessor(FuyuImageProcessor(**settings), _edited(tokenizer, _to_fuyu))

    def our_tokenizer(self, tokenizer: Any) -> Any:
        """Return a tokenizer that was read with our name for the placeholder."""
        return _edited(tokenizer, _from_fuyu)

    def our_template(self, template: str | None) -> str | None:
        """Return the form that the processor has in its code."""
        return FUYU_TEMPLATE

    def reads(self, folder: Path) -> bool:
        """Whether the placeholder was added to the tokenizer, as it is in folders of MMLM."""
        tokens = read_json(folder / "tokenizer.json").get("added_tokens") or []
        return {SPEAKER, NEWLINE} <= {token.get("content") for token in tokens}

    def asked(self, processor: Any, messages: Sequence[Message]) -> Any:
        """Return what the processor makes of one question about one picture."""
        (message,) = messages
        return processor(images=list(message.images), text=message.text, return_tensors="pt")

    def as_ours(self, ids: Tensor, tokenizer: Any) -> Tensor:
        """Return tokens with a placeholder for each end of a row, as we have them."""
        newline, image = tokenizer.convert_tokens_to_ids([NEWLINE, IMAGE_TOKEN])
        return ids.masked_fill(ids == newline, image)

    def key_map(self, config: MMLMConfig) -> KeyMap:
        """Return the pairs of our prefixes and those of the class in memory."""
        return KeyMap(
            (
                (LANGUAGE, "model.language_model."),
                (HEAD, "lm_head."),
                (f"{CONNECTOR}linear.", "model.vision_embed_tokens."),
            )
        )

    def with_words(
        self, state: Mapping[str, Tensor], config: MMLMConfig, tokenizer: Any
    ) -> dict[str, Tensor]:
        """Return our tensors with the end of a row where Fuyu has it: in the embedding."""
        name, changed = _embedding(config), dict(state)
        table = changed[name].clone()
        table[tokenizer.convert_tokens_to_ids(NEWLINE)] = changed.pop(_MARKS)[0].to(table)
        return changed | {name: table}

    def to_ours(
        self, state: Mapping[str, Tensor], config: MMLMConfig, *, origin: str
    ) -> dict[str, Tensor]:
        """Return published tensors under our names, whichever layout they have."""
        ours = super().to_ours(_in_memory_names(state), config, origin=origin)
        table = ours.get(_embedding(config))
        if table is not None:  # an adapter brings none
            tokens = read_json(Path(origin) / "tokenizer.json").get("added_tokens") or []
            rows = [token["id"] for token in tokens if token.get("content") == NEWLINE]
            if not rows or not 0 <= rows[0] < len(table):
                raise CheckpointError(
                    f"{origin}/tokenizer.json gives {NEWLINE} no row of the embedding, in which "
                    f"Fuyu keeps the end of a row. Save or download the folder again."
                )
            ours[_MARKS] = table[rows[0]][None].clone()
        return ours

    def read(
        self, stock: PretrainedConfig, processor: dict[str, Any], *, origin: str
    ) -> MMLMConfig:
        """Return the composition that a Fuyu folder describes."""
        values, file = processor.get("image_processor") or {}, f"{origin}/processor_config.json"
        for key in ("image_mean", "image_std"):
            if isinstance(values.get(key), float):
                values[key] = [values[key]] * stock.num_channels
        seen, size = read_normalisation(values, origin=file), values.get("size") or {}
        box = size.get("height"), size.get("width")
        if values.get("padding_value") != 1 or not all(isinstance(each, int) for each in box):
            raise CheckpointError(
                f"{file}: MMLM reads a Fuyu that pads with 1 into a `size` of height and width "
                f"(got {values.get('padding_value')} and {size}). Load it with transformers."
            )
        vision = {
            "use": "patches",
            "patch_px": stock.patch_size,
            "side_px": stock.image_size,
            "channels": stock.num_channels,
            "resample": seen["resample"],
        }
        facts = PatchesConfig.from_dict(
            {key: value for key, value in vision.items() if key != "use"}, origin=origin
        ).facts()
        facts = facts.model_copy(update={"mean": tuple(seen["mean"]), "std": tuple(seen["std"])})
        return MMLMConfig(
            text_config=stock.text_config,
            image={"use": "native", "rule": "padded", "box_px": box, "layout": "row_ends"},
            vision=vision,
            vision_facts=facts.to_dict(),
            connector={"use": "linear"},
            image_token_id=stock.image_token_id,
            sources={"language": {"use": "causal_lm", "checkpoint": origin, "format": "fuyu"}},
            tie_word_embeddings=False,
        )


def _image_reasons(config: MMLMConfig) -> list[str]:
    """Return why Fuyu's processor does not give the pixels and rows of this policy."""
    policy, facts = config.image_policy, config.facts
    wanted = "{use: native, rule: padded, layout: row_ends}"
    if not isinstance(policy, NativeConfig) or policy.rule != "padded":
        return [f"image policy {policy.use!r} (Fuyu pads at its own proportions: `{wanted}`)"]
    reasons: list[str] = []
    if policy.read:
        reasons.append(f"image.read sets {', '.join(policy.read)}, which no stock processor holds")
    if policy.layout != "row_ends":
        reasons.append(f"image native has the layout {policy.layout} (Fuyu has row_ends)")
    if facts.channels != 3:
        reasons.append(f"pictures of {facts.channels} channels, which the processor does not open")
    if any(pixels % facts.stride for pixels in policy.box_px):
        reasons.append(
            f"image.box_px {list(policy.box_px)} holds no whole patches of {facts.stride} pixels"
        )
    return reasons


def _embedding(config: MMLMConfig) -> str:
    """Return our name of the weight of the language model's embedding."""
    from transformers import AutoModel

    with torch.device("meta"):
        language: Any = AutoModel.from_config(config.text_config)
    weight = language.get_input_embeddings().weight
    return LANGUAGE + next(name for name, each in language.named_parameters() if each is weight)


def _in_memory_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names of the class in memory, from either published layout."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("language_model.model."):
            key = "model.language_model." + key.removeprefix("language_model.model.")
        for old, new in _OLDER:
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        renamed[key] = value
    return renamed


def _edited(tokenizer: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """Return a copy of a tokenizer whose file was changed."""
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path, settings = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
        source: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        change(source)
        path.write_text(json.dumps(source, ensure_ascii=False), encoding="utf-8")
        words: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
        dropped = ("added_tokens_decoder", "extra_special_tokens", "tokenizer_class")
        words = {key: value for key, value in words.items() if key not in dropped}
        settings.write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
        edited = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    edited.padding_side = "left"
    for trace in ("is_local", "local_files_only", "name_or_path"):
        edited.init_kwargs.pop(trace, None)
    return edited


def _to_fuyu(source: dict[str, Any]) -> None:
    """Rename the placeholder in a tokenizer's file, and let the first one stand twice."""
    for token in source["added_tokens"]:
        if token["content"] in (IMAGE_TOKEN, NEWLINE):
            token["normalized"] = True
        if token["content"] == IMAGE_TOKEN:
            token["content"] = SPEAKER
    steps = [source["normalizer"]] if source.get("normalizer") else []
    source["normalizer"] = {"type": "Sequence", "normalizers": [*steps, _TWICE]}


def _from_fuyu(source: dict[str, Any]) -> None:
    """Undo `_to_fuyu`."""
    for token in source["added_tokens"]:
        if token["content"] in (SPEAKER, NEWLINE):
            token["normalized"] = False
        if token["content"] == SPEAKER:
            token["content"] = IMAGE_TOKEN
    steps = (source.get("normalizer") or {}).get("normalizers") or []
    steps = [step for step in steps if step.get("content") != _TWICE["content"]]
    source["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
