"""A tokenizer as llama.cpp holds one: tokens, kinds, merges, and the name of how text is cut.

llama.cpp cuts text with code of its own, which a file names. A tokenizer whose rule has no name
there is refused: it would read other tokens than the model was trained with.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {_QWEN2: "qwen2", _QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?"): "llama-bpe"}
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"


class Vocabulary(NamedTuple):
    """What a GGUF file says of a tokenizer."""

    model: str
    """``"gpt2"`` for bytes, ``"llama"`` for SentencePiece."""

    cut: str
    """The name of the rule by which text is cut before it is merged."""

    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str] | None
    begins_with_space: bool


def vocabulary_reasons(tokenizer: Any) -> list[str]:
    """Return why llama.cpp would read other tokens than this tokenizer; empty if it would not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ["the tokenizer is not one of the `tokenizers` library"]
    source: dict[str, Any] = json.loads(backend.to_str())
    if source["model"].get("type") != "BPE":
        return [f"the tokenizer is a {source['model'].get('type')}, and no BPE"]
    if _is_sentencepiece(source) or _rule_of(source) is not None:
        return []
    return [
        "llama.cpp has no name for the rule by which this tokenizer cuts text "
        f"({json.dumps(source.get('pre_tokenizer'))[:200]})"
    ]


def vocabulary_of(tokenizer: Any, *, rows: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer, filled up to the rows of the embedding."""
    source: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces: dict[str, int] = source["model"]["vocab"]
    by_id = {number: token for token, number in pieces.items()}
    kinds = dict.fromkeys(by_id, _NORMAL)
    sentences = _is_sentencepiece(source)
    if sentences:
        for number, token in by_id.items():
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[number] = _BYTE
    for added in source["added_tokens"]:
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER
    if sentences and (unknown := pieces.get(source["model"].get("unk_token") or "")) is not None:
        kinds[unknown] = _UNKNOWN
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    filled = [kinds.get(number, _UNUSED) for number in range(rows)]
    pairs = [merge if isinstance(merge, list) else merge.split(" ", 1)
             for merge in source["model"]["merges"]]  # fmt: skip
    if not sentences:
        # llama.cpp wants at least one rule; this one fits no text of bytes.
        merges = [" ".join(pair) for pair in pairs] or [f"{_SPACE} {_SPACE}"]
        rule = _rule_of(source) or "default"
        return Vocabulary("gpt2", rule, tokens, filled, None, merges, begins_with_space=False)
    # llama.cpp merges what has the highest score: the earlier a rule, the higher.
    rank: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        rank.setdefault("".join(pair), number)
    scores = [-float(rank.get(token, len(pairs))) for token in tokens]
    space = _puts_space_first(source)
    return Vocabulary("llama", "default", tokens, filled, scores, None, begins_with_space=space)


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Return the steps of a sequence, or the one step that there is."""
    if not part:
        return []
    return list(part[name]) if part.get("type") == "Sequence" else [part]


def _rule_of(source: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the rule by which byte-level text is cut."""
    steps = _steps(source.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return _RULES.get(steps[0]["pattern"].get("Regex", ""))
    return None


def _is_sentencepiece(source: dict[str, Any]) -> bool:
    """Whether a BPE stands for SentencePiece: spaces are marked, unknown letters are bytes."""
    if not source["model"].get("byte_fallback"):
        return False
    return _SPACE in json.dumps(
        [source.get("normalizer"), source.get("pre_tokenizer")], ensure_ascii=False
    )


def _puts_space_first(source: dict[str, Any]) -> bool:
    steps = _steps(source.get("normalizer"), "normalizers")
    if any(step["type"] == "Prepend" for step in steps):
        return True
    cuts = _steps(source.get("pre_tokenizer"), "pretokenizers")
    return any(cut.get("prepend_scheme", "never") != "never" for cut in cuts)
