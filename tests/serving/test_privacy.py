"""Who can reach the server is said; what people sent is neither written down nor kept."""

from __future__ import annotations

import base64
import io
import logging
import os

import httpx
import pytest

from mmlm.serving import chat_ui
from mmlm.serving.chat_ui import build_page, exposure, page_options
from mmlm.serving.serve import announce
from tests.serving.fakes import FakeSpeaker
from tests.serving.live import serving, until
from tests.tiny import picture


def test_a_server_for_others_says_what_that_exposes(capsys):
    announce("127.0.0.1", 8000, ["fake"], True, False)
    assert "everybody" not in capsys.readouterr().out
    for guarded, gate in ((True, "with a key"), (False, "without a key")):
        announce("0.0.0.0", 8000, ["fake"], True, guarded)
        told = capsys.readouterr().out
        assert "everybody who can reach this machine can use it" in told
        assert gate in told
    assert "Only this machine" in exposure("127.0.0.1", False)[0]
    assert "without a password" in exposure("0.0.0.0", False)[0]
    assert "with the name and password" in exposure("192.0.2.1", True)[0]


@pytest.mark.parametrize("fault", [None, RuntimeError("It broke.")], ids=["answered", "failed"])
def test_neither_words_nor_pictures_are_written_to_a_log(fault, caplog, capfd):
    file = io.BytesIO()
    picture(1).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    parts = [
        {"type": "text", "text": "a secret question"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    ]
    body = {"messages": [{"role": "user", "content": parts}]}
    with caplog.at_level(logging.DEBUG, "mmlm"), serving([FakeSpeaker(fault=fault)]) as address:
        response = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert response.status_code == (200 if fault is None else 500)
    shown = capfd.readouterr()
    told = caplog.text + shown.out + shown.err
    assert "secret" not in told
    assert data[:40] not in told


def test_uploads_are_deleted_after_their_time(monkeypatch):
    monkeypatch.setattr(chat_ui, "KEPT_SECONDS", 1)
    monkeypatch.setattr(chat_ui, "SWEEP_SECONDS", 1)
    page = build_page([FakeSpeaker()])
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **page_options())
    file = io.BytesIO()
    picture(1).save(file, "PNG")
    try:
        sent = {"files": ("a.png", file.getvalue(), "image/png")}
        (upload,) = httpx.post(f"{address}gradio_api/upload", files=sent, timeout=60).json()
        assert upload.endswith("a.png")
        until(lambda: not os.path.exists(upload))
    finally:
        page.close()
