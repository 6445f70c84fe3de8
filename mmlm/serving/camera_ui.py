"""The part of the page that takes a picture with the camera and puts it into the question.

Browsers open a camera only on this machine or over https, and ask the visitor first. A phone
needs none of this: its own file picker offers the camera.
"""

from __future__ import annotations

from typing import Any

from mmlm.errors import MissingExtraError

try:
    import gradio as gr
except ImportError as fault:
    raise MissingExtraError("gradio", needed_for="The chat page", extra="app") from fault


def with_picture(box: Any, path: str) -> dict[str, Any]:
    """Return what stands in the text box, and a picture more.

    >>> with_picture({"text": "What?", "files": ["a.png"]}, "b.png")
    {'text': 'What?', 'files': ['a.png', 'b.png']}
    """
    box = box or {}
    return {"text": box.get("text") or "", "files": [*(box.get("files") or ()), path]}


def camera_panel(button: gr.Button, box: gr.MultimodalTextbox) -> None:
    """Lay out the camera, which the button shows and hides."""
    shown = gr.State(False)
    camera = gr.Image(
        sources=["webcam"], type="filepath", format="jpeg", visible=False, height=300,
        label="Camera", elem_id="camera", buttons=[],
    )  # fmt: skip
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def switch(is_shown: bool) -> Any:
        return not is_shown, gr.Image(visible=not is_shown, value=None)

    def take(path: str | None, value: Any) -> Any:
        if not path:
            return gr.skip(), gr.skip(), gr.skip()
        return with_picture(value, path), False, gr.Image(visible=False, value=None)

    button.click(switch, shown, [shown, camera], queue=False, **quiet)
    camera.change(take, [camera, box], [box, shown, camera], **quiet)
