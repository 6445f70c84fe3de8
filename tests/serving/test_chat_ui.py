"""The page without a browser: what happens on it, and what a program that talks to it gets."""

from __future__ import annotations

import threading

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from mmlm.errors import ImageError, UsageError
from mmlm.generation import GenerationSettings
from mmlm.serving import chat_ui
from mmlm.serving.about import About, Example
from mmlm.serving.chat_ui import ChatPage, build_page, page_options
from mmlm.serving.turns import PageLimits
from tests.serving.fakes import FakeSpeaker

GREEDY = GenerationSettings()


def texts(history):
    return [turn["content"][0] for turn in history if turn["role"] == "assistant"]


def ask(page, question, *histories, who="anna", which=None):
    """Send a question to a page and return the conversations at the end."""
    _, *histories = page.ask({"text": question, "files": []}, *histories)
    return list(page.answer(which or range(len(histories)), histories, GREEDY, who))[-1]


def test_an_answer_grows_and_ends_with_its_facts():
    page = ChatPage([FakeSpeaker(words=3)])
    _, history = page.ask({"text": "What?"}, [])
    steps = [texts(shown[0])[0] for shown in page.answer([0], [history], GREEDY, "anna")]
    assert steps[0] == "…"
    assert steps[-1] == "1 turns, 0 pictures: What? word0 word1 word2"
    (history,) = ask(page, "And?", history)
    assert "tokens" in history[-1]["content"][1]


def test_the_model_reads_the_conversation_without_facts():
    speaker = FakeSpeaker()
    page = ChatPage([speaker])
    (history,) = ask(page, "One?", [])
    ask(page, "Two?", history)
    assert [message.text for message in speaker.heard[-1]] == [
        "One?", "1 turns, 0 pictures: One?", "Two?",
    ]  # fmt: skip


def test_stop_ends_generation_itself():
    speaker = FakeSpeaker(words=10_000)
    page = ChatPage([speaker])
    _, history = page.ask({"text": "What?"}, [])
    shown = []
    for histories in page.answer([0], [history], GREEDY, "anna"):
        shown = histories[0]
        page.stop("bert")  # somebody else's button does nothing here
        if speaker.num_said > 40:
            page.stop("anna")
    assert 40 < speaker.num_said < 10_000
    assert speaker.num_closed == 1
    assert "stopped" in shown[-1]["content"][1]


def test_a_visitor_who_leaves_ends_generation():
    speaker = FakeSpeaker(words=10_000)
    page = ChatPage([speaker])
    _, history = page.ask({"text": "What?"}, [])
    answer = page.answer([0], [history], GREEDY, "anna")
    next(answer)
    next(answer)
    answer.close()
    assert (speaker.num_closed, page._stops) == (1, {})


def test_two_models_answer_side_by_side_and_one_may_try_again():
    left, right = FakeSpeaker("left", words=2), FakeSpeaker("right", words=5)
    page = ChatPage([left, right])
    histories = ask(page, "What?", [], [])
    assert texts(histories[0])[0].endswith("word1")
    assert texts(histories[1])[0].endswith("word4")
    again = list(page.answer([1], [histories[0], histories[1][:-1]], GREEDY, "anna"))[-1]
    assert again[0] == histories[0]
    assert texts(again[1]) == texts(histories[1])
    assert (len(left.heard), len(right.heard)) == (1, 2)


def test_a_fault_of_one_model_is_said_under_its_answer_and_the_other_goes_on():
    page = ChatPage([FakeSpeaker(fault=ImageError("The picture <is> empty.")), FakeSpeaker()])
    left, right = ask(page, "What is this?", [], [])
    assert left[-1]["content"][0] == "1 turns,"
    assert "The picture &lt;is&gt; empty." in left[-1]["content"][1]
    assert right[-1]["content"][0].endswith("What is this?")


def test_a_conversation_without_a_question_is_left_alone():
    page = ChatPage([FakeSpeaker()])
    assert list(page.answer([0], [[]], GREEDY, "anna")) == []


def test_the_page_shows_one_model_or_two():
    with pytest.raises(UsageError, match="got 3"):
        ChatPage([FakeSpeaker()] * 3)


def test_the_page_says_what_was_learned_and_keeps_html_out(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    about = About(
        title="fox <script>", learned="Foxes & cubs.", parts="eye + talk",
        examples=(Example(question="What?", image=str(tmp_path / "a.png")),),
    )  # fmt: skip
    page = build_page([FakeSpeaker(about=about)])
    told = str(page.get_config_file())
    assert "Foxes &amp; cubs." in told
    assert "fox &lt;script&gt;" in told
    assert "<h1>fox <script>" not in told


def test_settings_are_greedy_at_first_and_a_seed_must_be_a_number():
    assert chat_ui._chosen([0, 1, 256, 1, ""]) == GenerationSettings(max_new_tokens=256)
    assert chat_ui._chosen([0.5, 0.9, 64, 1.2, " 7 "]).seed == 7
    assert chat_ui._chosen([0.5, 0.9, 64, 1.2, "seven"]).seed is None


@pytest.fixture(scope="module")
def served():
    """A page that really listens, and the model behind it."""
    speaker = FakeSpeaker(words=3)
    page = build_page([speaker], PageLimits(max_pixels=1_000_000))
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **page_options())
    yield speaker, address
    page.close()


@pytest.fixture
def client(served):
    return Client(served[1], verbose=False)


def test_a_program_chats_with_pictures_over_many_turns(served, client, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    message = {"text": "What?", "files": [handle_file(tmp_path / "a.png")]}
    assert (
        client.predict(message, api_name="/chat") == "1 turns, 1 pictures: What? word0 word1 word2"
    )
    answer = client.predict({"text": "And?", "files": []}, api_name="/chat")
    assert answer.startswith("3 turns, 1 pictures: And?")


def test_a_program_gets_the_answer_as_it_grows(served, client):
    served[0].pause = 0.06
    try:
        steps = list(client.submit({"text": "What?", "files": []}, api_name="/chat"))
    finally:
        served[0].pause = 0.0
    assert len(steps) > 2
    assert steps[-1].endswith("word2")
    assert all(steps[-1].startswith(step) for step in steps)


def test_a_program_that_cancels_ends_generation(served, client):
    speaker = served[0]
    speaker.words, speaker.pause, before = 500, 0.02, speaker.num_closed
    try:
        job = client.submit({"text": "What?", "files": []}, api_name="/chat")
        while len(job.outputs()) < 2:
            threading.Event().wait(0.02)
        job.cancel()
        for _ in range(200):
            if speaker.num_closed > before:
                break
            threading.Event().wait(0.05)
        assert speaker.num_closed > before
        said = speaker.num_said
        threading.Event().wait(0.2)
        assert speaker.num_said == said
    finally:
        speaker.words, speaker.pause = 3, 0.0


def test_a_program_is_told_in_words_what_is_wrong(client, tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    Image.new("1", (4000, 1000)).save(tmp_path / "big.png")
    for name, words in (
        ("a.png", "a.png is not a picture"),
        ("big.png", "4 megapixels, the limit is 1"),
    ):
        message = {"text": "What?", "files": [handle_file(tmp_path / name)]}
        with pytest.raises(AppError, match=words):
            client.predict(message, api_name="/chat")


def test_files_of_the_machine_cannot_be_asked_about(served):
    file = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    data = {"data": [{"text": "What?", "files": [file]}, 0, 1, 16, 1, ""]}
    heard = len(served[0].heard)
    event = httpx.post(f"{served[1]}gradio_api/call/chat", json=data).json()["event_id"]
    told = httpx.get(f"{served[1]}gradio_api/call/chat/{event}").text
    assert "event: error" in told
    assert len(served[0].heard) == heard
    for path in ("/etc/hostname", "/etc/passwd", "../../../../etc/passwd"):
        assert httpx.get(f"{served[1]}gradio_api/file={path}").status_code in (403, 404)


def test_only_chat_can_be_called_by_programs(client):
    names = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(names) == ["/chat"]
