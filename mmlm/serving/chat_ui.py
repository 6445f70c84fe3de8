"""The chat page: `mmlm app MODEL`, or two models side by side.

    engine ──► chat_ui ──► a browser
               you are here

`ChatPage` holds what happens when somebody sends, stops, retries, edits or takes back;
`build_page` lays out the widgets and wires them; `serve_page` opens the page. How it looks is
in `look`, what is shown and what the model reads in `turns`.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmlm.errors import MissingExtraError, MMLMError, UsageError
from mmlm.generation import GenerationSettings
from mmlm.generation.session import Piece, Usage
from mmlm.serving.engine import Engine, Speaker, in_words
from mmlm.serving.keepsake import as_page
from mmlm.serving.links import KEPT_SECONDS
from mmlm.serving.ports import check_port
from mmlm.serving.turns import (
    FAULT_MARK,
    PageLimits,
    ShownTurn,
    answered,
    asked,
    cut_answer,
    cut_question,
    edited,
    facts_line,
    messages_of,
    words_of_fault,
)

try:
    import gradio as gr
except ImportError as fault:
    raise MissingExtraError("gradio", needed_for="The chat page", extra="app") from fault

from mmlm.serving import look
from mmlm.serving.camera_ui import camera_panel
from mmlm.serving.links_ui import address_box, wire_links
from mmlm.serving.seen_ui import seen_panel

SWEEP_SECONDS = 600
"""How often uploads that are too old are looked for and deleted."""

_SHOW_EVERY_SECONDS = 0.05
_WAITING = "…"
_AT_ONCE = 8
"""Visitors who are answered or stand in the model's own line; Gradio's queue holds the others."""
_WELCOME = (
    "<div class='mmlm-welcome'><p>Show me a picture and ask about it.</p>"
    "<p>Drop it here, paste it, or use the paper clip.</p></div>"
)
History = list[ShownTurn]


class ChatPage:
    """What happens on the page; one object serves all visitors.

    Args:
        speakers: One model, or two that answer side by side.
        limits: What a visitor may send.
    """

    def __init__(self, speakers: Sequence[Speaker], limits: PageLimits | None = None) -> None:
        if not 1 <= len(speakers) <= 2:
            raise UsageError(f"The page shows one model or two side by side (got {len(speakers)}).")
        self.speakers = list(speakers)
        self.limits = limits or PageLimits()
        self._stops: dict[str, set[threading.Event]] = {}

    def ask(self, box: Any, *histories: History) -> list[Any]:
        """Put the question into every conversation, and empty the text box."""
        try:
            turns = asked(box, histories[0], self.limits)
        except MMLMError as fault:
            # Said as a warning: what was typed stays, and the conversation is not covered up.
            gr.Warning(html.escape(str(fault)), duration=15, title="This cannot be sent")
            return [gr.skip() for _ in range(1 + len(histories))]
        return [_busy_box(), *([*history, *turns] for history in histories)]

    def answer(
        self, which: Sequence[int], histories: Sequence[History], settings: GenerationSettings,
        visitor: str,
    ) -> Generator[list[History]]:  # fmt: skip
        """Let the chosen models answer, side by side, and give the conversations as they grow."""
        which = [index for index in which if histories[index] and _waits(histories[index])]
        if not which:
            return
        stop = threading.Event()
        self._stops.setdefault(visitor, set()).add(stop)
        shown = [list(history) for history in histories]
        replies = {
            index: _Reply(self.speakers[index], shown[index], settings, stop, visitor)
            for index in which
        }
        last = 0.0
        try:
            for index in which:
                shown[index].append(answered(_WAITING))
            yield shown
            while growing := [index for index, reply in replies.items() if reply.growing]:
                for index in growing:
                    replies[index].grow()
                    shown[index][-1] = replies[index].turn()
                if time.monotonic() - last >= _SHOW_EVERY_SECONDS:
                    last = time.monotonic()
                    yield shown
            yield shown
        finally:
            for reply in replies.values():
                reply.close()
            events = self._stops.get(visitor, set())
            events.discard(stop)
            if not events:
                self._stops.pop(visitor, None)

    def stop(self, visitor: str) -> None:
        """End what is being answered for a visitor, before its next token."""
        for event in list(self._stops.get(visitor, ())):
            event.set()


class _Reply:
    """One model's answer while it grows."""

    def __init__(
        self, speaker: Speaker, history: History, settings: GenerationSettings,
        stop: threading.Event, visitor: str,
    ) -> None:  # fmt: skip
        self.growing = True
        self._text = ""
        self._usage: Usage | None = None
        self._fault = ""
        self._pieces: Iterator[Piece] = speaker.stream(
            messages_of(history), settings, stop, client=visitor
        )

    def grow(self) -> None:
        """Take the next piece; a fault becomes words under what was said so far."""
        try:
            piece = next(self._pieces)
        except StopIteration:
            self.growing = False
        except Exception as fault:
            self.growing, self._fault = False, in_words(fault)
        else:
            self._text += piece.text
            self._usage = piece.usage

    def turn(self) -> ShownTurn:
        """Return the answer as it is shown now."""
        text = self._text.strip() if not self.growing else self._text.lstrip()
        if self._fault:
            return answered(text, facts_line(self._usage or Usage(), self._fault))
        if self.growing:
            return answered(text or _WAITING)
        if self._usage is None:
            return answered("", '<span class="mmlm-facts"><b>stopped</b></span>')
        return answered(text, facts_line(self._usage))

    def close(self) -> None:
        """End generation, if it still runs."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


def _waits(history: History) -> bool:
    """Whether a conversation ends with a question."""
    return history[-1]["role"] == "user"


def _busy_box() -> Any:
    return gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)


def _free_box() -> Any:
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)


def build_page(
    speakers: Sequence[Speaker], limits: PageLimits | None = None, *, max_waiting: int = 32
) -> gr.Blocks:
    """Lay out the page and wire it.

    Args:
        speakers: One model, or two to be compared.
        limits: What a visitor may send.
        max_waiting: Most visitors in line; the next one is told that the line is full.
    """
    page = ChatPage(speakers, limits)
    title = " · ".join(speaker.about.title or speaker.name for speaker in speakers)
    with gr.Blocks(
        title=title,
        fill_height=True,
        analytics_enabled=False,
        delete_cache=(SWEEP_SECONDS, KEPT_SECONDS),
    ) as blocks:
        with gr.Row(elem_id="head"):
            gr.HTML(_header(speakers), elem_id="title")
            with gr.Row(elem_id="tools"):
                fresh = gr.Button("New chat", size="sm")
                download = gr.Button("Download", size="sm")
                link = gr.Button("Link", size="sm")
                camera = gr.Button("Camera", size="sm", elem_id="camera-button")
                dials_button = gr.Button("Settings", size="sm")
                dark = gr.Button("Light / dark", size="sm")
        address = address_box()
        talks: list[gr.Chatbot] = []
        with gr.Row(scale=1, equal_height=True):
            for index, speaker in enumerate(speakers):
                with gr.Column(min_width=280, scale=1):
                    if len(speakers) > 1:
                        gr.HTML(html.escape(speaker.name), elem_classes="talk-name")
                    talks.append(_talk(index, speaker, alone=len(speakers) == 1))
        box = gr.MultimodalTextbox(
            file_count="multiple", file_types=["image"], sources=["upload"], show_label=False,
            label="Your question", elem_id="ask", max_plain_text_length=20_000,
            placeholder="Ask about a picture",
            submit_btn=True, stop_btn=False,
        )  # fmt: skip
        camera_panel(camera, box)
        seen_panel(speakers, talks)
        gr.HTML(
            "<p>Enter sends, Shift + Enter begins a new line. Answers can be wrong.</p>",
            elem_id="note",
        )
        dials = _settings()
        _wire(page, blocks, talks, box, dials, fresh)
        _wire_api(page, dials)
        kept = gr.Textbox(visible="hidden", label="The conversation as a file")
        download.click(
            lambda *histories: _pages(speakers, histories), talks, kept, api_visibility="private"
        ).then(None, kept, None, js=look.SAVE_FILE, api_visibility="private")
        wire_links(blocks, link, address, talks)
        dark.click(None, js=look.SWITCH_DARK, api_visibility="private")
        dials_button.click(None, js=look.SWITCH_SETTINGS, api_visibility="private")
    blocks.queue(max_size=max_waiting, default_concurrency_limit=8)
    return blocks


def _pages(speakers: Sequence[Speaker], histories: Sequence[History]) -> str:
    """Return the conversation with each model as a file to keep."""
    pairs = zip(speakers, histories, strict=True)
    return "".join(as_page(history, speaker.name) for speaker, history in pairs if history)


def _header(speakers: Sequence[Speaker]) -> str:
    """The model's name and what it has learned to see; long texts unfold."""
    titles = dict.fromkeys(speaker.about.title or speaker.name for speaker in speakers)
    names = " <small>and</small> ".join(html.escape(title) for title in titles)
    told: list[str] = []
    for sentence in dict.fromkeys(speaker.about.sentence for speaker in speakers):
        told.append(f'<p class="told">{html.escape(sentence)}</p>')
    for speaker in speakers:
        if speaker.about.parts:
            told.append(f'<p class="parts">{html.escape(speaker.about.parts)}</p>')
    first, rest = told[0], "".join(told[1:])
    return (
        f'<div class="brand">{look.EYE}<div><h1>{names}</h1>'
        f"<details><summary>{first}</summary>{rest}</details></div></div>"
    )


def _talk(index: int, speaker: Speaker, *, alone: bool) -> gr.Chatbot:
    """One conversation's view."""
    examples: list[Any] = []
    for example in speaker.about.examples[:4] if index == 0 else ():
        entry: dict[str, Any] = {"text": example.question, "display_text": example.question}
        if example.image:
            entry |= {"files": [example.image], "icon": example.image}
        examples.append(entry)
    return gr.Chatbot(
        show_label=False, label=speaker.name, elem_id=f"chat-{index}", elem_classes="talk",
        height="64vh" if alone else "58vh", editable="user", buttons=["copy", "copy_all"],
        layout="bubble", examples=examples or None, allow_tags=False, scale=1,
        allow_file_downloads=False, group_consecutive_messages=False,
        placeholder=_WELCOME,
    )  # fmt: skip


def _settings() -> list[Any]:
    """How answers are generated, with words for people; greedy unless asked otherwise."""
    with gr.Sidebar(position="right", open=False, width=330, elem_id="settings"):
        gr.Markdown("### Answers")
        temperature = gr.Slider(
            0, 1.5, value=0, step=0.05, label="Variety",
            info="0: the likeliest answer, the same every time.",
        )  # fmt: skip
        top_p = gr.Slider(
            0.05, 1, value=1, step=0.05, label="Keep to likely words",
            info="With variety: choose among this share of chances.",
        )  # fmt: skip
        longest = gr.Slider(
            8, 2048, value=256, step=8, label="Longest answer",
            info="In tokens; a word has one or two.",
        )  # fmt: skip
        penalty = gr.Slider(
            1, 1.5, value=1, step=0.05, label="Avoid repeating itself", info="1 changes nothing."
        )
        seed = gr.Textbox(
            value="", max_lines=1, label="Seed", placeholder="none",
            info="A whole number makes varied answers repeatable.",
        )  # fmt: skip
    return [temperature, top_p, longest, penalty, seed]


def _chosen(dials: Sequence[Any]) -> GenerationSettings:
    temperature, top_p, longest, penalty, seed = dials
    seed = str(seed or "").strip()
    return GenerationSettings(
        temperature=float(temperature), top_p=float(top_p), max_new_tokens=int(longest),
        repetition_penalty=float(penalty), seed=int(seed) % 2**63 if seed.isdecimal() else None,
    )  # fmt: skip


def _wire(
    page: ChatPage, blocks: gr.Blocks, talks: list[gr.Chatbot], box: gr.MultimodalTextbox,
    dials: list[Any], fresh: gr.Button,
) -> None:  # fmt: skip
    """Say what happens when somebody sends, stops, retries, edits, takes back or clears."""
    num = len(talks)
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def answer_by(which: Sequence[int]) -> Any:
        def answer(request: gr.Request, *values: Any) -> Iterator[Any]:
            histories, chosen = values[:num], _chosen(values[num:])
            for shown in page.answer(which, histories, chosen, _visitor(request)):
                yield shown if num > 1 else shown[0]

        return answer

    def go_on(event: Any, which: Sequence[int]) -> None:
        event.success(
            answer_by(which), [*talks, *dials], talks, concurrency_limit=_AT_ONCE,
            concurrency_id="answers", **quiet,
        ).then(_free_box, None, box, queue=False, **quiet)  # fmt: skip

    def ask(value: Any, *histories: History) -> Any:
        return page.ask(value, *histories)

    def ask_example(choice: gr.SelectData, *histories: History) -> Any:
        return page.ask(choice.value, *histories)

    def edit(change: gr.EditData, *histories: History) -> Any:
        index = change.index[0] if isinstance(change.index, list | tuple) else change.index
        return [_busy_box(), *(edited(history, index, str(change.value)) for history in histories)]

    def take_back(*histories: History) -> Any:
        pairs = [cut_question(history) for history in histories]
        return [pairs[0][1], *(kept for kept, _ in pairs)]

    everybody = range(num)
    go_on(box.submit(ask, [box, *talks], [box, *talks], **quiet), everybody)
    for index, talk in enumerate(talks):
        retried = talk.retry(
            lambda history: (_busy_box(), cut_answer(history)), talk, [box, talk],
            queue=False, **quiet,
        )  # fmt: skip
        go_on(retried, [index])
        go_on(talk.edit(edit, talks, [box, *talks], queue=False, **quiet), everybody)
        go_on(talk.example_select(ask_example, talks, [box, *talks], **quiet), everybody)
        talk.undo(take_back, talks, [box, *talks], queue=False, **quiet)
        if num > 1:
            talk.clear(lambda: [[]] * num, None, talks, queue=False, **quiet)

    def stop(request: gr.Request) -> None:
        page.stop(_visitor(request))

    box.stop(stop, None, None, queue=False, **quiet)

    def clear(request: gr.Request) -> Any:
        page.stop(_visitor(request))
        return [None, *([] for _ in talks)]

    fresh.click(clear, None, [box, *talks], queue=False, **quiet)
    blocks.unload(stop)


def _wire_api(page: ChatPage, dials: list[Any]) -> None:
    """Offer `/chat` to programs: text and files in, the answer so far out; the talk is kept."""
    kept = gr.State([])
    message = gr.MultimodalTextbox(
        visible=False, file_count="multiple", file_types=["image"], label="message"
    )
    reply = gr.Textbox(visible=False, label="answer")
    button = gr.Button(visible=False)

    def chat(
        request: gr.Request, message: Any, history: History, temperature: float, top_p: float,
        max_new_tokens: int, repetition_penalty: float, seed: str,
    ) -> Iterator[tuple[str, History]]:  # fmt: skip
        try:
            turns = asked(message, history, page.limits)
        except MMLMError as fault:
            raise gr.Error(str(fault)) from fault
        settings = _chosen([temperature, top_p, max_new_tokens, repetition_penalty, seed])
        whole: list[History] = [[*history, *turns], *([] for _ in page.speakers[1:])]
        for shown in page.answer([0], whole, settings, _visitor(request)):
            content = shown[0][-1]["content"]
            if len(content) > 1 and FAULT_MARK in content[1]:
                raise gr.Error(words_of_fault(content[1]))
            yield (content[0] if content[0] != _WAITING else "", list(shown[0]))

    button.click(
        chat, [message, kept, *dials], [reply, kept], api_name="chat",
        concurrency_limit=_AT_ONCE, concurrency_id="answers",
    )  # fmt: skip


def _visitor(request: gr.Request) -> str:
    return str(getattr(request, "session_hash", None) or "")


def page_options(limits: PageLimits | None = None) -> dict[str, Any]:
    """Return what `launch` needs so that the page looks and behaves as meant."""
    limits = limits or PageLimits()
    return {
        "theme": look.theme(),
        "css": look.CSS,
        "head": look.HEAD,
        "max_file_size": f"{limits.max_file_mb}mb",
        "show_error": True,
        "footer_links": [],
        "ssr_mode": False,
    }


def serve_page(
    sources: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    auth: tuple[str, str] | None = None,
    bits: int | None = None,
    block: bool = True,
) -> tuple[gr.Blocks, str]:
    """Load one or two models and open the page on them.

    Args:
        sources: Model folders or Hub ids.
        host: Where to listen; anything but 127.0.0.1 lets others in.
        port: The port; the first free one from 7860 on when left out.
        open_browser: Open the page in the browser of this machine.
        auth: A name and a password that visitors must give.
        bits: Hold the language models in 4 or 8 bits.
        block: Stay until interrupted.

    Returns:
        The page and its address.

    Raises:
        UsageError: if the port is taken.
        CheckpointError: if a model cannot be loaded.
    """
    if port is not None:
        check_port(host, port, "page")
    engines: list[Speaker] = [Engine.load(source, bits=bits) for source in sources]
    blocks = build_page(engines)
    examples = [e.image for engine in engines for e in engine.about.examples if e.image]
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, inbrowser=open_browser, auth=auth, quiet=True,
            prevent_thread_lock=True, allowed_paths=examples, **page_options(),
        )  # fmt: skip
    except OSError as fault:
        place = f"{host}:{port or '7860 and above'}"
        raise UsageError(f"The page cannot listen on {place}: {fault}") from fault
    print(f"The page is at {address}")
    for line in exposure(host, auth is not None):
        print(line)
    if block:
        blocks.block_thread()
    return blocks, address


def exposure(host: str, guarded: bool) -> list[str]:
    """Say who can reach a server that listens on `host`."""
    if host in ("127.0.0.1", "localhost", "::1"):
        return ["Only this machine can reach it. To let others in: --host 0.0.0.0"]
    who = "everybody who can reach this machine over the network"
    gate = "with the name and password" if guarded else "without a password"
    return [f"It listens on {host}: {who} can talk to the model, {gate}."]
