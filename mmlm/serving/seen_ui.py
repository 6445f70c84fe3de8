"""The part of the page that shows what a model saw, after an answer.

    engine.between(look) ──► seen_ui ──► pictures under the conversation
                             you are here

Nothing is computed until somebody opens it and asks. The maps of all words come from one look.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from mmlm.errors import MissingExtraError, MMLMError
from mmlm.generation.looking import Look, look
from mmlm.messages import images_of
from mmlm.serving.engine import Engine, Speaker, in_words
from mmlm.serving.seen import draw_grid, draw_heat
from mmlm.serving.turns import ShownTurn, cut_answer, messages_of

try:
    import gradio as gr
except ImportError as fault:
    raise MissingExtraError("gradio", needed_for="The chat page", extra="app") from fault

WHOLE = "(the whole answer)"
Shown = tuple[list[tuple[Any, str]], str]


def words_of(seen: Look) -> list[tuple[str, tuple[int, int]]]:
    """Join the tokens of an answer to words; returns each with its first and last token."""
    words: list[tuple[str, tuple[int, int]]] = []
    for index, token in enumerate(seen.tokens):
        if not words or token[:1].isspace() or words[-1][0][-1:].isspace():
            words.append((token, (index, index + 1)))
        else:
            before, (first, _) = words[-1]
            words[-1] = (before + token, (first, index + 1))
    return [(word.strip(), span) for word, span in words if word.strip()]


def what_was_seen(engine: Engine, history: Sequence[ShownTurn], word: str = WHOLE) -> Any:
    """Draw what a model saw in the last turn of a conversation.

    Args:
        engine: The model.
        history: The conversation, as the page keeps it.
        word: A word of the answer, as `words_of` numbers it (``"2 fox"``), or `WHOLE`.

    Returns:
        Pictures with their captions, the words that may be chosen, and a sentence.

    Raises:
        MMLMError: in words for the person who asked.
    """
    messages = messages_of(cut_answer(history))
    pictures = images_of(messages)
    if not pictures:
        raise MMLMError("No picture was shown in this conversation yet.")
    counter = engine.sessions.processor.image_processor.counter
    drawn = [draw_grid(picture, counter) for picture in pictures]
    said = messages_of(history)[-1]
    if said.role != "assistant" or not said.text.strip():
        return drawn, [], "The grid of tokens. Ask something to see where the answer looks."
    seen = engine.between(lambda: look(engine.sessions, messages, said.text))
    words = words_of(seen)
    names = [WHOLE, *(f"{number} {text}" for number, (text, _) in enumerate(words, 1))]
    chosen = names.index(word) if word in names else 0
    first, last = words[chosen - 1][1] if chosen else (0, len(seen.tokens))
    rows = seen.heat[first:last].mean(0).numpy()
    maps = [
        (draw_heat(picture, counter, rows[start:end]), _caption(rows[start:end]))
        for picture, (start, end) in zip(pictures, seen.spans, strict=True)
    ]
    shares = [rows[start:end].sum() for start, end in seen.spans]
    share = ", ".join(f"{100 * value:.0f} %" for value in shares)
    text = f"Share of attention on the picture{'s' if len(shares) > 1 else ''}: {share}."
    pairs = [row for pair in zip(drawn, maps, strict=True) for row in pair]
    return pairs, names, text


def _caption(heat: Any) -> str:
    """Say what a map shows, and how much its warmest place stands out."""
    mean = float(heat.mean())
    peak = float(heat.max()) / mean if mean else 1.0
    return f"warmest: {peak:.1f} × the mean" if peak >= 1.05 else "looked at everywhere alike"


def seen_panel(speakers: Sequence[Speaker], talks: Sequence[Any]) -> None:
    """Lay out the panel and wire it; nothing where the speakers are no models of ours."""
    engines = [speaker for speaker in speakers if isinstance(speaker, Engine)]
    if len(engines) < len(speakers):
        return
    with gr.Accordion("What the model saw", open=False, elem_id="seen"):
        with gr.Row(elem_id="seen-choice"):
            names = [engine.name for engine in engines]
            whose = gr.Dropdown(
                names, value=names[0], type="index", label="Model", visible=len(names) > 1
            )
            word = gr.Dropdown([WHOLE], value=WHOLE, label="Word of the last answer")
            button = gr.Button("Look", size="sm", elem_id="look")
        told = gr.HTML("", elem_id="seen-told")
        gallery = gr.Gallery(
            show_label=False, label="What the model saw", columns=2, object_fit="contain",
            height="auto", buttons=["download", "fullscreen"],
            elem_id="seen-pictures", interactive=False,
        )  # fmt: skip

    def show(index: int, chosen: str, *histories: list[ShownTurn]) -> Any:
        try:
            pairs, names, text = what_was_seen(engines[index], histories[index], chosen)
        except Exception as fault:
            return [], gr.skip(), f"<p>{html.escape(in_words(fault))}</p>"
        value = chosen if chosen in names else WHOLE
        choices = gr.Dropdown(choices=names or [WHOLE], value=value)
        return pairs, choices, f"<p>{html.escape(text)}</p>"

    quiet: dict[str, Any] = {
        "api_visibility": "private", "concurrency_limit": 2, "show_progress_on": gallery,
    }  # fmt: skip
    button.click(show, [whose, word, *talks], [gallery, word, told], **quiet)
    word.input(show, [whose, word, *talks], [gallery, word, told], **quiet)
