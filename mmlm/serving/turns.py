"""Between what the page shows and what the model reads.

The page keeps a conversation as Gradio's list of messages, which travels to the browser and
back. Under each answer stands a line of facts (tokens, seconds), which is for people and never
reaches the model. This module turns one into the other and knows neither widgets nor models.
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from typing import Any

from mmlm.errors import MMLMError
from mmlm.generation.session import Usage
from mmlm.images import open_image, read_size
from mmlm.messages import ImagePart, Message, Part, Text

ShownTurn = dict[str, Any]
"""One message as Gradio keeps it: ``{"role": …, "content": [text, file, …]}``."""

FAULT_MARK = '<span class="mmlm-fault">'
"""What a line of facts begins with if the answer ended with a fault."""

WORDLESS_QUESTION = "What is in this picture?"
"""Asked, visibly, where somebody sends a picture and no word."""


class PageLimits:
    """What a visitor may send.

    Args:
        max_pixels: Most pixels of one picture.
        max_images: Most pictures of one conversation.
        max_letters: Longest question.
        max_file_mb: Largest file of a picture.
    """

    def __init__(
        self,
        *,
        max_pixels: int = 40_000_000,
        max_images: int = 16,
        max_letters: int = 20_000,
        max_file_mb: int = 20,
    ) -> None:
        self.max_pixels = max_pixels
        self.max_images = max_images
        self.max_letters = max_letters
        self.max_file_mb = max_file_mb


def asked(box: Any, history: Sequence[ShownTurn], limits: PageLimits) -> list[ShownTurn]:
    """Turn what stands in the text box into user turns, after looking at every picture.

    Pictures and words are shown as two turns, because Gradio's pencil edits only a turn that
    is words alone; `messages_of` joins them again.

    Raises:
        MMLMError: in words for the person who asked, naming the picture by its own name.
    """
    text = str((box or {}).get("text") or "").strip()
    files = [_path_of(file) for file in (box or {}).get("files") or ()]
    if not text and not files:
        raise MMLMError("There is nothing to answer yet: write a question or add a picture.")
    if len(text) > limits.max_letters:
        raise MMLMError(
            f"The question has {len(text):,} letters; the limit is {limits.max_letters:,}."
        )
    before = sum(len(files_of(turn)) for turn in history)
    if before + len(files) > limits.max_images:
        raise MMLMError(
            f"The conversation would have {before + len(files)} pictures; the limit is "
            f"{limits.max_images}. Begin a new conversation, or take some out."
        )
    for path in files:
        check_picture(path, limits)
    return [*_pictured(files), {"role": "user", "content": text or WORDLESS_QUESTION}]


def check_picture(path: str, limits: PageLimits) -> None:
    """Open a picture once, before it is shown to anybody.

    Raises:
        MMLMError: with the name that the visitor gave the file, not the path on this machine.
    """
    name = os.path.basename(path)
    try:
        size = read_size(path, max_pixels=1 << 40)
        pixels = size.height * size.width
        if pixels > limits.max_pixels:
            raise MMLMError(
                f"{name} has {pixels / 1e6:,.0f} megapixels, the limit is "
                f"{limits.max_pixels / 1e6:,.0f}. Shrink the picture and send it again."
            )
        open_image(path, max_pixels=limits.max_pixels)
    except MMLMError as fault:
        raise MMLMError(str(fault).replace(path, name)) from fault


def messages_of(history: Sequence[ShownTurn]) -> list[Message]:
    """Return what the model reads of a shown conversation.

    Of an answer only its first part counts; the line of facts under it is for people. Pictures
    and the words that follow them are one turn.
    """
    messages: list[Message] = []
    for turn in history:
        texts = _texts_of(turn)
        if turn["role"] == "assistant":
            messages.append(Message("assistant", (Text(texts[0] if texts else ""),)))
            continue
        parts: tuple[Part, ...] = tuple(ImagePart(path) for path in files_of(turn))
        if texts:
            parts += (Text("\n".join(texts)),)
        if messages and messages[-1].role == "user":
            parts = messages.pop().content + parts
        messages.append(Message("user", parts))
    return messages


def answered(text: str, facts: str = "") -> ShownTurn:
    """Return an assistant turn with its line of facts."""
    return {"role": "assistant", "content": [text, facts] if facts else [text]}


def cut_answer(history: Sequence[ShownTurn]) -> list[ShownTurn]:
    """Take the last answer away, so that it can be given again."""
    kept = list(history)
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    return kept


def cut_question(history: Sequence[ShownTurn]) -> tuple[list[ShownTurn], dict[str, Any]]:
    """Take the last question and its answer away; returns the rest and the question."""
    kept = cut_answer(history)
    texts: list[str] = []
    files: list[str] = []
    while kept and kept[-1]["role"] == "user":
        turn = kept.pop()
        texts[:0], files[:0] = _texts_of(turn), files_of(turn)
    return kept, {"text": "\n".join(texts), "files": files}


def edited(history: Sequence[ShownTurn], index: int, text: str) -> list[ShownTurn]:
    """Change the words of a question, keep its pictures, and forget what came after it."""
    before, files = list(history[:index]), files_of(history[index])
    words: ShownTurn = {"role": "user", "content": text.strip() or WORDLESS_QUESTION}
    return [*before, *_pictured(files), words]


def facts_line(usage: Usage, fault: str = "") -> str:
    """Return the line under an answer: what it cost, and how it ended if not by itself."""
    if fault:
        return f"{FAULT_MARK}{html.escape(fault)}</span>"
    speed = usage.tokens_per_second
    facts = [
        f"{usage.num_tokens} token{'s' if usage.num_tokens != 1 else ''}",
        f"first after {seconds(usage.first_token_seconds)}",
    ]
    if speed:
        facts.append(f"{speed:,.0f} per second" if speed >= 10 else f"{speed:.1f} per second")
    read = f"read {usage.num_prompt_tokens:,}"
    if usage.num_image_tokens:
        read += f" ({usage.num_image_tokens:,} of images)"
    if usage.num_cached_tokens:
        read += f", {usage.num_cached_tokens:,} remembered"
    facts.append(read)
    ends = {"length": "cut at the length limit", "stopped": "stopped"}
    if usage.finish_reason in ends:
        facts.append(f"<b>{ends[usage.finish_reason]}</b>")
    return f'<span class="mmlm-facts">{" · ".join(facts)}</span>'


def words_of_fault(facts: str) -> str:
    """Return what `facts_line` was told went wrong."""
    return html.unescape(facts.removeprefix(FAULT_MARK).removesuffix("</span>"))


def seconds(value: float) -> str:
    """Write a duration for people.

    >>> seconds(0.0421), seconds(3.25)
    ('42 ms', '3.2 s')
    """
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _pictured(files: Sequence[str]) -> list[ShownTurn]:
    return [{"role": "user", "content": [{"path": path} for path in files]}] if files else []


def _path_of(file: Any) -> str:
    return str(file["path"]) if isinstance(file, dict) else str(file)


def files_of(turn: ShownTurn) -> list[str]:
    """Return the pictures of a turn, in either of the shapes in which Gradio hands it over."""
    found: list[str] = []
    for part in _parts(turn):
        if isinstance(part, dict) and "path" in part:
            found.append(str(part["path"]))
        elif isinstance(part, dict) and part.get("type") == "file":
            found.append(str(part["file"]["path"]))
    return found


def _texts_of(turn: ShownTurn) -> list[str]:
    texts: list[str] = []
    for part in _parts(turn):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") == "text":
            texts.append(str(part["text"]))
    return texts


def _parts(turn: ShownTurn) -> list[Any]:
    content = turn["content"]
    return list(content) if isinstance(content, list | tuple) else [content]
