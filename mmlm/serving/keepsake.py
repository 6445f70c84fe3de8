"""A conversation as one file that can be kept: a web page with its pictures inside.

Everything that was written is escaped, and the page fetches nothing from anywhere.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from mmlm.errors import ImageError
from mmlm.images import open_image
from mmlm.serving.turns import ShownTurn, messages_of

_SIDE_PX = 512
_STYLE = (
    "body{font:16px/1.55 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;"
    "color:#1c1b19;background:#faf9f7}h1{font-size:1.2rem}section{margin:1.2rem 0}"
    "h2{font-size:.8rem;color:#5b5750;margin:0}p{white-space:pre-wrap;margin:.2rem 0}"
    "img{max-width:16rem;border-radius:.5rem;margin:.3rem .3rem 0 0}"
    "@media(prefers-color-scheme:dark){body{color:#f3f1ed;background:#131210}h2{color:#a39e93}}"
)


def as_page(history: Sequence[ShownTurn], title: str) -> str:
    """Return a conversation as HTML, its pictures shrunk and inside."""
    turns: list[str] = []
    for message in messages_of(history):
        who = "You" if message.role == "user" else html.escape(title)
        pictures = "".join(_picture(image) for image in message.images)
        turns.append(
            f"<section><h2>{who}</h2>{pictures}<p>{html.escape(message.text)}</p></section>"
        )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>A conversation with {html.escape(title)}</h1>"
        f"{''.join(turns)}</html>\n"
    )


def _picture(source: object) -> str:
    """Return a picture as an element that holds it."""
    try:
        image = open_image(source)  # pyright: ignore[reportArgumentType]
    except ImageError:
        return "<p>(a picture that is no longer here)</p>"
    image.thumbnail((_SIDE_PX, _SIDE_PX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="a picture that was shown" src="data:image/jpeg;base64,{data}">'
