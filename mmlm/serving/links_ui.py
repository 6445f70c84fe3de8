"""The part of the page that gives a conversation an address, and opens one that has an address.

links ──► links_ui ──► a button and ?talk=NAME
          you are here
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmlm.errors import MissingExtraError
from mmlm.serving.links import Links
from mmlm.serving.turns import ShownTurn

try:
    import gradio as gr
except ImportError as fault:
    raise MissingExtraError("gradio", needed_for="The chat page", extra="app") from fault

from mmlm.serving import look


def address_box() -> gr.Textbox:
    """Return the box in which the address is shown, hidden at first."""
    return gr.Textbox(
        visible=False, interactive=False, max_lines=1, elem_id="link", buttons=["copy"],
        label="The address of this conversation",
        info="Whoever has it can read the conversation and go on from here, for six hours at most.",
    )  # fmt: skip


def wire_links(
    blocks: gr.Blocks, button: gr.Button, address: gr.Textbox, talks: Sequence[gr.Chatbot]
) -> None:
    """Keep a conversation at the press of a button; open one when the page is opened by it."""
    links, name = Links(), gr.Textbox(visible="hidden", label="The name of the conversation")
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def keep(*histories: list[ShownTurn]) -> Any:
        if not any(histories):
            gr.Warning("Nothing was said yet, so there is nothing to link to.", title="No link")
            return "", gr.Textbox(visible=False)
        return links.put(histories), gr.Textbox(visible=True)

    def open_talk(request: gr.Request) -> Any:
        wanted = str(request.query_params.get("talk") or "")
        found = links.get(wanted) if wanted else None
        if wanted and found is None:
            gr.Warning("This link is no longer kept. Begin a new conversation.", title="Too late")
        if found is None or len(found) != len(talks):
            return [gr.skip() for _ in talks] if len(talks) > 1 else gr.skip()
        return found if len(talks) > 1 else found[0]

    button.click(keep, list(talks), [name, address], **quiet).then(
        None, name, address, js=look.LINK_OF, api_visibility="private"
    )
    blocks.load(open_talk, None, list(talks), **quiet)
